"""`maekit plan`: the arithmetic of a whole run worked by hand, the search for a batch that fits, a dry run, errors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from rich.console import Console
from tiny_runs import SMALLEST, folder_words, make_images

from maekit import cli, recipes
from maekit.config import PlanConfig, PretrainConfig, UserError
from maekit.data.loader import Batch
from maekit.runtime import Choice
from maekit.tasks import plan
from maekit.training import capacity
from maekit.training.trial import Trial

STEPS = ["--dry-steps", "2", *SMALLEST]


@pytest.fixture
def tiny() -> Trial:
    config = PretrainConfig(**TINY, batch_size=8)
    return Trial(config, torch.device("cpu"), precision="fp32", fused_attention=True)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one plan."""
    code = cli.main(["plan", *words])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_the_forecast_worked_by_hand() -> None:
    """1,000 images in batches of 64 on 2 processes, timed in batches of 8.

    A process has 32 images a step: 4 x 0.5 s + 0.1 s = 2.1 s, so 64 / 2.1 images/s in all. 15 steps an epoch and
    10 epochs are 150 steps, 315 s. Held-out passes: one at the start, then one every 2 epochs: 6,
    of 60 images, at a third of the time.
    """
    config = PlanConfig(images=1060, batch_size=64, processes=2, epochs=10, eval_every=2)
    data = plan.Data("x", 1000, 60)
    timing = plan.Timing(8, [0.5, 0.4, 9.0], [0.1, 0.1, 0.1], None)
    found = plan.predict(config, data, timing, shares_cores=True)
    assert (found.steps, found.bound) == (150, "the step")
    assert found.step_speed == pytest.approx(64 / 2.1)
    assert found.training == pytest.approx(315)
    assert found.heldout == pytest.approx(6 * 60 / 3 * 2.1 / 64)


@pytest.mark.parametrize(
    ("shares_cores", "loader", "speed"),
    [(True, 30.0, 1 / (1 / 20 + 1 / 30)), (False, 30.0, 20.0), (False, 5.0, 5.0)],
)
def test_the_loader_counts(shares_cores: bool, loader: float, speed: float) -> None:
    """Beside a GPU the slower of step and loader counts; on a CPU both want the same cores."""
    config = PlanConfig(images=1, batch_size=10, steps=7, epochs=None)
    timing = plan.Timing(10, [0.4], [0.1], loader)  # 20 images/s
    found = plan.predict(config, plan.Data("x", 100, 10), timing, shares_cores=shares_cores)
    assert found.speed == pytest.approx(speed)
    assert found.training == pytest.approx(70 / speed)
    assert ("loader" in found.bound) == (speed != 20.0)


@pytest.mark.parametrize(
    ("share", "fits", "at_least", "accum"),
    [(4096, 4096, 1, 1), (4096, 500, 1, 16), (4096, 512, 1, 8), (96, 40, 1, 3), (7, 6, 1, 7),
     (8, 0, 1, None), (8, 9, 4, 4)],
)  # fmt: skip
def test_accumulation_keeps_the_batch(share: int, fits: int, at_least: int, accum: int | None) -> None:
    """The fewest equal parts that fit: 4096 in parts of at most 500 are 16 x 256."""
    assert capacity.least_accum(share, fits, at_least) == accum


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 17, 100, 1000, 5000])
def test_the_search_finds_what_fits(limit: int) -> None:
    """It never settles above the limit, nor more than 7 % below; and it stops at the cap."""
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = capacity.search(fits, 4096)
    assert found <= min(limit, 4096)
    assert found >= 0.93 * min(limit, 4096) - 1
    assert max(tried) <= 4096
    assert len(tried) < 20


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_batch_that_leaves_no_memory_to_cudas_libraries_does_not_fit(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS asks for memory of its own, and says in other words that there is none; other errors are not hidden."""
    for name, value in {"empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 0,
                        "max_memory_allocated": 1200}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def step(batch: int) -> None:
        if batch > 12:
            raise error

    trial: Any = SimpleNamespace(
        device=torch.device("cuda"), saved_bytes=lambda batch: batch, images=lambda batch: (batch,), step=step,
        wait=lambda: None, optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), state_bytes=0,
    )  # fmt: skip
    assert capacity.find_limit(trial, 0, Console(quiet=True)) == (12, 100)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        capacity.find_limit(trial, 0, Console(quiet=True))


def test_what_a_forward_pass_keeps_grows_with_the_batch(tiny: Trial) -> None:
    """Evenly, by at least the images' patches in float32; weights are four tensors of the parameters' size."""
    two, four, six = (tiny.saved_bytes(batch) for batch in (2, 4, 6))
    assert four - two == six - four > 2 * 4 * 16 * 24 * 3 // 4
    trained = sum(p.numel() for p in tiny.model.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in tiny.model.parameters() if not p.requires_grad)
    assert tiny.state_bytes == 4 * (4 * trained + fixed)


def test_a_trial_step_is_a_training_step(tiny: Trial) -> None:
    """The loss falls on one batch, gradients are dropped, and a loss that is not finite changes no weight."""
    images, ids = tiny.images(8)
    tiny.config.mask_ratio = 0.5
    for group in tiny.optimizer.param_groups:
        group["lr"] = 1e-2
    before = float(tiny.loss(images, ids).detach())
    for _ in range(30):
        tiny.step(images, ids)
    assert float(tiny.loss(images, ids).detach()) < 0.9 * before
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    weights = [parameter.clone() for parameter in tiny.model.parameters()]
    tiny.step(torch.full((8, 3, 16, 24), float("nan")), ids)
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny.model.parameters(), strict=True))


def test_the_dry_runs_batch_is_doubled_while_it_is_quick(tiny: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.4 s an image and 3 s at most: 1, 2, 4 (1.6 s; 8 would take 3.2 s)."""
    monkeypatch.setattr(plan, "timed_step", lambda trial, draw: (0.4 * len(draw()[1]), 9.9))
    assert plan.suitable_batch(tiny, 100) == 4
    assert plan.suitable_batch(tiny, 3) == 3


def test_replayed_steps_are_timed_in_a_row(tiny: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, nothing waits between them; the first row records, and is not counted."""
    steps: list[int] = []

    def replayed(images: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(len(images))
        return torch.zeros(()), torch.zeros(3)

    tiny.replayed = replayed  # type: ignore[assignment]
    monkeypatch.setattr(tiny, "update", pytest.fail)
    config = PlanConfig(**TINY, images=100, batch_size=8, dry_steps=3)
    timing = plan.time_run(tiny, config, plan.Data("x", 90, 10), 4, plan.make_console())
    assert steps == [4] * plan.REPLAYS * 4
    assert len(timing.gradients) == 3 and timing.updates == [0.0] * 3
    monkeypatch.setattr(plan, "timed_replays", lambda trial, draw: (2.0, 0.0))
    timing = plan.time_run(tiny, config, plan.Data("x", 90, 10), 4, plan.make_console())
    assert len(timing.gradients) == 2, "forty steps of two seconds"


def test_slow_steps_end_the_dry_run(tiny: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 s a step and 20 s at most: two steps instead of twenty."""
    monkeypatch.setattr(plan, "timed_step", lambda trial, draw: (14.0, 1.0))
    config = PlanConfig(**TINY, images=100, batch_size=8)
    timing = plan.time_run(tiny, config, plan.Data("x", 90, 10), 4, plan.make_console())
    assert (timing.gradients, timing.updates) == ([14.0, 14.0], [1.0, 1.0])


def test_a_model_that_does_not_fit_is_never_built() -> None:
    """ViT-H needs 16 bytes for each of 657 million parameters: 10.5 GB."""
    config = PlanConfig(model="mae_vit_huge_patch14", images=1)
    with pytest.raises(UserError, match=r"take 10\.5 GB, and 8\.0 GB are free"):
        capacity.check_memory(config, 8 * 10**9)


def test_plan_of_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but --out is written, and the plan says its arithmetic; the recipe's own data are not asked for."""
    monkeypatch.chdir(tmp_path)
    words = ["digits", "--images", "1000", "--processes", "2", "--epochs", "10", *STEPS, "--out", "plans/p.json"]
    code, said, error = run(capsys, *words)
    assert (code, error) == (0, "")
    assert "980 to train on, 20 held out" in said
    assert "150 steps = 10 epochs x 15 steps" in said
    assert "64 = 32 images x 2 processes x --accum 1" in said
    assert "2 steps of" in said
    assert "torchrun --nproc_per_node 2 -m maekit pretrain digits --data FOLDER" in said
    assert "--epochs 10 --warmup-epochs 0.5" in said
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["p.json"]
    found = json.loads((tmp_path / "plans" / "p.json").read_text())
    assert found["forecast"]["steps"] == 150
    assert len(found["timing"]["gradients"]) == 2
    assert found["accum"] == 1
    assert not found["memory"]["measured"]


def test_the_command_gives_the_same_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed after `maekit pretrain`, it yields the planned config; the accumulation that fits is in it."""
    base = recipes.get("photos")
    changes = {
        "flip": not base.flip,
        "img_size": (24, 40),
        "std": (0.5, 0.25, 1.0),
        "lr": 1.5e-7,
        "warmup_epochs": None,
    }
    changes |= {"mean": (0.1, 0.2, 0.3), "data": "my images", "mask": "block", "warmup_steps": 3}
    config = PlanConfig(**{**vars(base), **changes})
    words = shlex.split(plan.next_command(config, base, "photos", 4))
    assert words[:3] == ["maekit", "pretrain", "photos"]
    got: list[PretrainConfig] = []
    monkeypatch.setattr("maekit.tasks.pretrain.main", got.append)
    cli.main(words[1:])
    assert vars(got[0]) == {**vars(base), **changes, "accum": 4, "out": "runs/photos"}


@pytest.mark.parametrize(
    ("processes", "gpus", "launcher"),
    [(64, 8, "torchrun --nnodes 8 --nproc_per_node 8 -m maekit"), (8, 8, "torchrun --nproc_per_node 8 -m maekit"),
     (6, 4, "torchrun --nproc_per_node 6 -m maekit"), (4, 0, "torchrun --nproc_per_node 4 -m maekit"),
     (1, 8, "maekit")],
)  # fmt: skip
def test_more_processes_than_cards_are_several_nodes(
    processes: int, gpus: int, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipes.get("photos")
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = PlanConfig(**{**vars(base), "processes": processes})
    assert plan.next_command(config, base, "photos", 1).startswith(f"{launcher} pretrain photos --data")


def test_plan_of_a_folder_times_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streamed images: the loader is timed; images in memory are part of the step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "LOADER_SECONDS", 0.2)
    words = folder_words(make_images(tmp_path / "images"))[1:]
    code, said, _ = run(capsys, *words, "--dry-steps", "2")
    assert code == 0
    assert "step and loader, which share the cores" in said
    assert "images of noise" in said
    words[words.index("--in-memory") + 1] = "yes"
    code, said, _ = run(capsys, *words, "--dry-steps", "2")
    assert code == 0
    assert "images from memory" in said
    assert "images/s alone" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_the_loader_is_timed_without_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a fake loader moves by 10 s while it starts, then by 0.5 s for each batch of 32."""
    clock = [0.0]

    class Pool:
        def train_batches(self, shares):
            clock[0] += 10
            for _, ids in shares:
                clock[0] += 0.5
                yield Batch(torch.zeros(1), ids, [])

    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock[0])
    order = plan.SampleOrder(np.arange(64), 1, 0)
    data = plan.Data("x", 64, 8, Pool(), order, Choice(False, "no"))  # type: ignore[arg-type]
    assert plan.loader_speed(data) == pytest.approx(64.0)


ERRORS = {
    "neither": (["folder"], ["give --data, or --images"]),
    "both": (["digits", "--data", "digits", "--images", "9"], ["--data digits --images 9", "give one of them"]),
    "no images": (["digits", "--images", "0"], ["--images 0", "above 0"]),
    "few images": (["digits", "--images", "50"], ["--batch-size 64", "42 training images"]),
    "processes": (["digits", "--images", "500", "--processes", "3"], ["--batch-size 64", "--processes 3"]),
    "steps": (["digits", "--images", "500", "--dry-steps", "0"], ["--dry-steps 0"]),
    "several": (
        ["digits", "--images", "0", "--epochs", "0", "--img-size", "9"],
        ["--images 0", "--epochs 0", "size 9"],
    ),
    "no recipe": (["--images", "500"], ["recipe comes first: maekit plan"]),
    "folder as a file": (["digits", "--images", "500", "--out", "."], ["--out .", "is a folder"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_plan_names_the_value_and_the_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the words, before anything is timed."""
    words, expected = ERRORS[name]
    code, _, error = run(capsys, *words)
    assert code == 2
    assert all(text in error for text in expected), error


def test_nothing_is_run_where_not_even_one_image_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error instead of a machine that swaps; a batch that fits in parts only gets its accumulation."""
    monkeypatch.setattr(plan, "find_limit", lambda *_: (0, 10**9))
    monkeypatch.setattr(plan, "suitable_batch", lambda *_: pytest.fail("a step was tried"))
    code, _, error = run(capsys, "digits", "--images", "500", *STEPS)
    assert (code, "not even one image fits" in error) == (2, True)
    monkeypatch.undo()
    monkeypatch.setattr(plan, "find_limit", lambda *_: (20, 10**6))
    code, said, _ = run(capsys, "digits", "--images", "500", *STEPS)
    assert code == 0
    assert "64 = 16 images x 1 process x --accum 4" in said
    assert "--accum 4 --device cpu" in said
