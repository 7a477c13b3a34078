"""Steps as CUDA graphs, and what is drawn for several steps at once: the numbers are those of single steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from conftest import TINY
from tiny_runs import run
from torch import Tensor

from maekit.config import PretrainConfig
from maekit.data import memory
from maekit.data.order import together
from maekit.data.parts import ArrayPart
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import Choice
from maekit.training import prepare
from maekit.training.guard import Guard
from maekit.training.metrics import MetricsLog
from maekit.training.optim import make_optimizer, set_learning_rate
from maekit.training.replayed import WARM_UP, Replayed
from maekit.training.step import masks_ahead, whole_step

NAN_STEP, STEPS = WARM_UP + 3, WARM_UP + 6


class FakeGraph:
    """A graph on a CPU, whose replay a test writes."""

    def replay(self) -> None:
        """Nothing."""


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """CUDA's graphs by `FakeGraph`; the list fills with those that are made."""
    made: list[FakeGraph] = []

    def graph() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    @contextlib.contextmanager
    def recording(_: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def trained(device: str, replay: bool, **changes: Any) -> tuple[list[float], list[Tensor], Guard]:
    """Losses, weights and guard after some steps whose images, masks and rates differ; one has images of NaN."""
    config = PretrainConfig(**(TINY | {"precision": "fp32", "data": "-", "clip_grad": 1.0} | changes))
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).to(device).train()
    optimizer, guard = make_optimizer(model, config, 1e-3), Guard(torch.device(device), 5, 0)
    step = whole_step(model, config, optimizer, guard, model)
    work = Replayed(step, optimizer, pytest.fail) if replay else step
    masks = masks_ahead(model, config, ((0, np.arange(4 * i, 4 * i + 4)) for i in range(STEPS)), torch.device(device))
    found = []
    for number in range(STEPS):
        images = torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(number)).to(device)
        set_learning_rate(optimizer, 1e-3 * (number + 1), encoder_waits=number == STEPS - 1)
        some = next(masks)
        images = images * torch.nan if number == NAN_STEP else images
        loss, verdict = work(images, some.ids_keep_BV, some.ids_masked_BM)
        guard.note(number, verdict.clone())
        found.append(float(loss))
    return found, [parameter.detach().cpu() for parameter in model.parameters()], guard


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{}, {"decoder": "cross"}, {"drop_path": 0.3}, {"precision": "bf16"}], ids=str)
def test_a_replayed_step_is_the_step(change: dict[str, Any]) -> None:
    """Losses, weights, the rate of each group and the step that is skipped, beside steps that are launched singly."""
    losses, weights, guard = trained("cuda", replay=True, **change)
    wanted_losses, wanted, wanted_guard = trained("cuda", replay=False, **change)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    for one, other in zip(weights, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert guard.look() == wanted_guard.look() == ([NAN_STEP], 0, False)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_seeded_step_draws_the_same_in_a_replay(compiled: bool) -> None:
    """Fine-tuning seeds the generators for each step: which patches and paths it drops, also by compiled code."""

    def drop(inputs: Tensor) -> Tensor:
        return torch.nn.functional.dropout(inputs, 0.5).sum(dim=1)

    forward = torch.compile(drop, dynamic=False) if compiled else drop
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, device="cuda"))], lr=0.5, fused=True)
    work = Replayed(lambda inputs: (forward(inputs),), optimizer, pytest.fail)
    seen = []
    for seed in range(WARM_UP + 4):
        torch.manual_seed(seed)
        found = work(torch.ones(8, 64, device="cuda"))[0].clone()
        torch.manual_seed(seed)
        assert torch.equal(found, forward(torch.ones(8, 64, device="cuda")))
        seen.append(tuple(found.tolist()))
    assert len(set(seen)) == len(seen)


@pytest.mark.gpu
def test_a_run_of_replayed_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its losses are those of steps that are launched singly, and what is seen between steps changes nothing."""
    words = "pretrain digits --steps 12 --device cuda --log-every 1 --probe-every 0.5 --panel-every 0".split()
    assert run([*words, "--compile", "graphs"], tmp_path / "graphs") == 0
    assert "no CUDA graph" not in capsys.readouterr().out
    assert run([*words, "--compile", "off"], tmp_path / "off") == 0
    recorded, single = (
        [record["loss"] for record in MetricsLog(tmp_path / name / "metrics.jsonl").read() if record["kind"] == "step"]
        for name in ("graphs", "off")
    )
    assert len(recorded) == 12
    np.testing.assert_allclose(recorded, single, rtol=1e-2)


def test_what_changes_goes_in_by_copying(fake_cuda: list[FakeGraph]) -> None:
    """The recording reads its own images and rates, which every call fills; the groups keep numbers."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    group = optimizer.param_groups[0]

    def step(images: Tensor) -> tuple[Tensor]:
        return (images.sum() * group["lr"],)

    work = Replayed(step, optimizer, pytest.fail)
    for _ in range(WARM_UP + 1):
        work(torch.ones(2))
    (graph,) = fake_cuda
    result, images, rates = work._outputs[0], work._inputs[0], work._rates
    assert rates is not None
    graph.replay = lambda: result.copy_(images.sum() * rates[0])  # type: ignore[method-assign,assignment]
    for value, rate in ((2.0, 0.25), (3.0, 0.125)):
        group["lr"] = rate
        assert float(work(torch.full((2,), value))[0]) == 2 * value * rate
    assert group["lr"] == 0.125 and not group["capturable"]


def test_without_a_graph_steps_go_on(monkeypatch: pytest.MonkeyPatch, fake_cuda: list[FakeGraph]) -> None:
    """The reason is said once, and the optimiser's groups are as before."""

    @contextlib.contextmanager
    def failing(_: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    said: list[str] = []
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5)

    def step(inputs: Tensor) -> tuple[Tensor]:
        return (inputs.sum(),)

    work = Replayed(step, optimizer, said.append)
    assert [float(work(torch.full((2,), float(i)))[0]) for i in range(WARM_UP + 3)] == [0, 2, 4, 6, 8, 10]
    assert len(fake_cuda) == len(said) == 1 and "operation not permitted when stream" in said[0]
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.param_groups[0]["capturable"]


@pytest.mark.usefixtures("fake_cuda")
def test_another_shape_is_not_replayed() -> None:
    """A batch with unreadable images is smaller."""
    seen: list[int] = []

    def step(inputs: Tensor) -> tuple[Tensor]:
        seen.append(len(inputs))
        return (inputs.sum(),)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    work = Replayed(step, optimizer, pytest.fail)
    for size in (2,) * WARM_UP + (3, 3, 2):
        found = work(torch.ones(size))
    assert seen == [2] * WARM_UP + [3, 2], "recorded for three, replayed for three, and two by itself"
    assert float(found[0]) == 2


@pytest.mark.usefixtures("fake_cuda")
def test_another_type_is_not_replayed() -> None:
    """Of 8-bit images with some of 16 bits among them, a batch may hold bytes, and the next one floats."""
    seen: list[torch.dtype] = []

    def step(inputs: Tensor) -> tuple[Tensor]:
        seen.append(inputs.dtype)
        return (inputs.float().sum(),)

    work = Replayed(step, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5), pytest.fail)
    for dtype in (torch.uint8,) * (WARM_UP + 2) + (torch.float32, torch.uint8):
        found = work(torch.full((2,), 0.5).to(dtype))
        if dtype == torch.float32:
            assert float(found[0]) == 1, "not 0, as copied into bytes"
    assert seen == [torch.uint8] * (WARM_UP + 1) + [torch.float32]


def test_successive_shares_of_an_epoch_come_together() -> None:
    shares = [(epoch, np.arange(size)) for epoch, size in ((0, 3), (0, 3), (0, 3), (1, 3), (1, 9), (1, 1))]
    found = [(epoch, [len(ids) for ids in group]) for epoch, group in together(iter(shares), 7)]
    assert found == [(0, [3, 3]), (0, [3]), (1, [3]), (1, [9]), (1, [1])]
    assert list(together(iter([]), 7)) == []


@pytest.mark.parametrize("change", [{}, {"masks_per_image": 2}, {"decoder": "cross", "predict_share": 0.25}], ids=str)
def test_masks_drawn_ahead_are_those_of_each_step(change: dict[str, Any]) -> None:
    config = PretrainConfig(**(TINY | {"data": "-", "seed": 3} | change))
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3)
    rng = np.random.default_rng(0)
    shares = [(step // 3, rng.integers(0, 99, 4)) for step in range(7)]
    ahead = masks_ahead(model, config, iter(shares), torch.device("cpu"), at_once=17)
    for (epoch, ids), masks in zip(shares, ahead, strict=True):
        alone = model.draw_masks(ids, seed=3, epoch=epoch, views=config.masks_per_image)
        assert torch.equal(masks.ids_keep_BV, alone.ids_keep_BV)
        assert torch.equal(masks.ids_masked_BM, alone.ids_masked_BM)


def test_images_augmented_ahead_are_those_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU; here on the CPU: the same crops and flips, unreadable images told once."""
    settings = PretrainConfig(**(TINY | {"data": "-", "crop_scale": (0.3, 1.0)}))
    images = np.random.default_rng(0).integers(0, 256, (20, 18, 26, 3), np.uint8)
    pool = memory.MemoryPool(ArrayPart(images, None, None, in_chans=3), settings, torch.device("cpu"), (18, 26))
    pool.bad = [(3, "torn")]
    shares = [(step // 3, np.arange(step, step + 4)) for step in range(7)]
    alone = list(pool.train_batches(iter(shares)))
    monkeypatch.setattr(memory.MemoryPool, "_ahead", 9)
    ahead = list(pool.train_batches(iter(shares)))
    assert [batch.bad for batch in ahead] == [[(3, "torn")]] + [[]] * 6
    for one, other in zip(alone, ahead, strict=True):
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_run_takes_what_a_replayed_step_gives(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses are those of a run that steps singly; the graph is left out, which needs CUDA."""
    tiny_runs.without_pictures(monkeypatch)
    first = [*tiny_runs.DIGITS, "--drop-path", "0", "--steps", "3"]
    assert run(first, tmp_path / "first") == 0
    words = first
    if task == "finetune":
        words = ["finetune", str(tmp_path / "first"), "--data", "digits", "--steps", "3", "--batch-size", "128"]
        words += "--log-every 1 --clean-epochs 0.1 --compile off --workers 0 --device cpu".split()
    assert run(words, tmp_path / "single") == 0
    made: list[Any] = []

    def replayed(step: Any, optimizer: Any, report: Any) -> Any:
        made.append(optimizer)
        return step

    monkeypatch.setattr(prepare, "choose_compile", lambda *_, **__: Choice("graphs", "for the test"))
    monkeypatch.setattr(f"maekit.tasks.{task}.compile_or_eager", lambda model, how, report: model.__call__)
    monkeypatch.setattr(f"maekit.tasks.{task}.Replayed", replayed)
    assert run(words, tmp_path / "replayed") == 0
    assert len(made) == (2 if task == "finetune" else 1)  # another graph for the clean epochs
    one, other = (
        [r["loss"] for r in MetricsLog(tmp_path / name / "metrics.jsonl").read() if r["kind"] == "step"]
        for name in ("single", "replayed")
    )
    assert one == other and len(one) == 3
