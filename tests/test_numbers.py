"""Numbers that are not finite: skipped on every process, counted, named, rolled back once, dumped and replayed."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_runs import DIGITS, assert_same_run, checkpoints, equal, metrics, run, spoil_loss, state, tensors

import maekit
from maekit import cli
from maekit.config import UserError
from maekit.data.loader import SampleOrder, split_heldout
from maekit.data.sources import open_source
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import pretrain
from maekit.training import guard
from maekit.training.guard import Guard, update
from maekit.training.nonfinite import is_spike, replay

PROMISE = "non-finite numbers: skipped, named, rolled back once, replayable"

EVERY_STEP = ["--save-every", "0.0909", "--keep", "20", "--eval-every", "10"]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.without_pictures(monkeypatch)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def poison_gradient(value: torch.Tensor) -> torch.Tensor:
    """The same finite loss, with an infinite gradient."""
    value.register_hook(lambda gradient: gradient * INF)
    return value


SPOILERS = {
    "loss is NaN": lambda value: value * NAN,
    "loss is infinite, its gradient finite": lambda value: value + INF,
    "gradient is infinite, the loss finite": poison_gradient,
}


@pytest.mark.parametrize("how", SPOILERS)
def test_a_bad_step_is_skipped_and_named(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and AdamW's state stay as they were to the last bit; count and sample ids are written down."""
    spoil_loss(monkeypatch, lambda part, loss: SPOILERS[how](loss) if part == 3 else loss)  # part 1 of step 2 (from 1)
    words = [*DIGITS, "--accum", "2", "--steps", "4", *EVERY_STEP, "--log-every", "2", "--clip-grad", "1"]
    assert run(words, tmp_path / "run") == 0
    before, bad, after = (f"step-{step:06d}" for step in (1, 2, 3))
    for name in ("model", "optimizer"):
        assert equal(tensors(tmp_path / "run", name, before), tensors(tmp_path / "run", name, bad))
        assert not equal(tensors(tmp_path / "run", name, bad), tensors(tmp_path / "run", name, after))
    named = lines(tmp_path / "run" / "nonfinite.jsonl")
    order = SampleOrder(split_heldout(1438, 0.02)[0], 128, seed=0)
    assert named == [{"step": 2, "epoch": 0, "rollbacks": 0, "ids": order.step_ids(1)[1].tolist()}]
    steps = [line for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert [line.get("nonfinite") for line in steps] == [1, None]
    assert all(0.2 < line["loss"] < 5 for line in steps)  # the mean of the good step
    assert (state(tmp_path / "run")["bad_steps"], state(tmp_path / "run")["bad_row"]) == (1, 0)


def test_a_line_without_a_good_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to average: null, and the run goes on."""
    spoil_loss(monkeypatch, lambda part, loss: loss * NAN if part == 1 else loss)
    assert run([*DIGITS, "--steps", "3"], tmp_path / "run") == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert losses[1] is None
    assert losses[0] > 0
    assert losses[2] > 0


def test_back_once_with_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three bad steps in a row, a checkpoint in each: back before the last good step, and from there on as the same
    steps with half the rate; and a run that is stopped afterwards continues bit-equal."""
    words = [*DIGITS, "--steps", "8", *EVERY_STEP, "--max-bad-steps", "3", "--warmup-epochs", "0"]

    def fails(part: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * NAN if 4 <= part < 7 else loss

    with monkeypatch.context() as patch:
        spoil_loss(patch, fails)
        assert run(words, tmp_path / "run") == 0
    assert "3 bad steps in a row: back to step 3" in capsys.readouterr().out
    records = metrics(tmp_path / "run")
    back = [line for line in records if line["kind"] == "rollback"]
    assert back == [{"kind": "rollback", "step": 3, "epoch": pytest.approx(3 / 11), "from": 7, "lr_scale": 0.5}]
    steps = [line for line in records if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    peak = 4e-3 * 128 / 256
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [line["lr"] for line in steps] == pytest.approx(cosine[:3] + [rate / 2 for rate in cosine[3:]])
    assert len(lines(tmp_path / "run" / "nonfinite.jsonl")) == 3
    assert checkpoints(tmp_path / "run")[-1] == "step-000008"
    position = state(tmp_path / "run")
    assert (position["rollbacks"], position["lr_scale"], position["bad_steps"]) == (1, 0.5, 3)

    stop_after(4, monkeypatch)  # after going back; the signal comes too late for that step, so one more is done
    with monkeypatch.context() as patch:
        spoil_loss(patch, fails)
        assert run(words, tmp_path / "stopped") == 143
    assert checkpoints(tmp_path / "stopped")[-1] == "step-000005"  # those of the row are gone
    assert cli.main(["resume", str(tmp_path / "stopped")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_bad_steps_leave_the_checkpoints_to_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set so small that every step is saved: the row's checkpoints stand beside the kept ones, not in their place."""
    spoil_loss(monkeypatch, lambda part, loss: loss * NAN if 4 <= part < 7 else loss)
    words = [*DIGITS, "--steps", "8", *EVERY_STEP, "--keep", "2", "--max-bad-steps", "3", "--warmup-epochs", "0"]
    assert run(words, tmp_path / "run") == 0
    back = [line for line in metrics(tmp_path / "run") if line["kind"] == "rollback"]
    assert [line["step"] for line in back] == [3]
    assert checkpoints(tmp_path / "run") == ["step-000007", "step-000008"]


def test_a_longer_run_that_went_back_before_its_old_end_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new schedule began at the old end, and the checkpoint to go back to is older; stopped there, it resumes."""
    words = [*DIGITS, "--steps", "4", *EVERY_STEP, "--max-bad-steps", "3", "--warmup-epochs", "0"]
    assert run(words, tmp_path / "run") == 0
    stop_after(4, monkeypatch)
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda part, loss: loss * NAN if part < 3 else loss)
        assert cli.main(["resume", str(tmp_path / "run"), "--steps", "8"]) == 143
    assert "back to step 3" in capsys.readouterr().out
    assert state(tmp_path / "run")["schedule_start"] == 3
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert checkpoints(tmp_path / "run")[-1] == "step-000008"


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a SIGTERM when a step is done after the run went back."""
    real = pretrain.log_training

    def logged(job: Any, *arguments: Any) -> Any:
        found = real(job, *arguments)
        if job.position.step == step and job.position.rollbacks:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(pretrain, "log_training", logged)


def test_stopped_within_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row goes on counting after a resume, and nonfinite.jsonl names each step once."""
    words = [*DIGITS, "--steps", "5", *EVERY_STEP, "--max-bad-steps", "3"]
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda part, loss: loss * NAN if part >= 3 else loss)
        patch.setattr(pretrain, "watch", lambda job, *rest: job.position.step < 5 or stop(job))
        assert run(words, tmp_path / "run") == 143
    assert state(tmp_path / "run")["bad_row"] == 2
    spoil_loss(monkeypatch, lambda part, loss: loss * NAN if part == 0 else loss)
    assert cli.main(["resume", str(tmp_path / "run"), "--steps", "6"]) == 0
    kinds = [line["kind"] for line in metrics(tmp_path / "run")]
    assert kinds.count("rollback") == 1
    assert [line["step"] for line in lines(tmp_path / "run" / "nonfinite.jsonl")] == [4, 5, 6]


def stop(job: Any) -> bool:
    job.stop.number = 15
    return False


def test_the_second_row_ends_the_run_with_a_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; the dump does the last bad step again, with and without the fault, and names the bad sample."""
    words = [*DIGITS, "--steps", "8", *EVERY_STEP, "--max-bad-steps", "2", "--drop-path", "0"]
    real = MaskedAutoencoder.loss

    def loss(self: MaskedAutoencoder, pred: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """NaN where a batch holds a certain image: what it hides is known by its sum."""
        sums = hidden.double().sum(dim=(1, 2))
        bad = ((sums * 1000).round().long() % 8 == 3).any() and self.training
        return real(self, pred, hidden) * (NAN if bad else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "loss", loss)
        assert run(words, tmp_path / "run") == 1
        folder = tmp_path / "run" / "nonfinite" / "step-2"
        again = replay(folder)
    assert "the run stops" in capsys.readouterr().out
    record = json.loads((folder / "step.json").read_text())
    order = SampleOrder(split_heldout(1438, 0.02)[0], 128, seed=0)
    assert record["ids"] == order.step_ids(1)[1].tolist()
    assert math.isnan(again.loss)
    assert math.isnan(again.gradient_norm)
    assert 0 < len(again.bad_ids) < 128
    assert set(again.bad_ids) <= set(record["ids"])
    healthy = replay(folder)
    assert healthy.bad_ids == []
    assert healthy.loss == pytest.approx(loss_by_hand(folder, record["ids"]), rel=1e-5)
    assert 0 < healthy.gradient_norm < 100
    assert equal(tensors(tmp_path / "run", step="step-000000"), tiny_runs.load_file(folder / "model.safetensors"))
    with pytest.raises(UserError, match="holds no dump"):
        replay(tmp_path)


def loss_by_hand(folder: Path, ids: list[int]) -> float:
    """The model on the pixels as they are: this recipe neither crops nor flips."""
    mae, part = maekit.load(folder), open_source("digits", in_chans=1).train
    pixels = torch.stack([torch.from_numpy(part.read(i)).permute(2, 0, 1) for i in ids])
    masks = mae.draw_masks(np.array(ids), seed=0, epoch=0)
    return float(mae(pixels, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM).loss.detach())


def test_nan_on_one_process_is_skipped_by_both(tmp_path: Path) -> None:
    """Two processes, the loss of one is infinite in one step: the step is skipped by both, and only that one."""

    def job(rank: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            tiny_runs.without_pictures(patch)
            spoil_loss(patch, lambda part, loss: loss + INF if part == 1 and rank == 1 else loss)
            return run([*DIGITS, "--steps", "4", *EVERY_STEP, "--drop-path", "0"], tmp_path / "run")

    assert tiny_runs.ends(tiny_runs.fork_ranks(job, tmp_path)) == [0, 0], (tmp_path / "rank1.log").read_text()
    weights = [tensors(tmp_path / "run", step=f"step-{step:06d}") for step in (0, 1, 2, 3)]
    assert [equal(one, other) for one, other in itertools.pairwise(weights)] == [False, True, False]
    assert [line["step"] for line in lines(tmp_path / "run" / "nonfinite.jsonl")] == [2]


@pytest.mark.parametrize("fused", [True, False])
def test_weights_stay_however_late_the_host_looks(fused: bool) -> None:
    """After a row that is too long the good steps behind it change nothing either; the look tells of the row only."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    watch = Guard(torch.device("cpu"), limit=3, row=1)
    seen = []
    for step, gradient in enumerate([1.0, NAN, 1.0, INF, NAN, -INF, 1.0, NAN, 1.0]):
        weight.grad = torch.full((3,), gradient)
        update(optimizer, watch.note(step, watch.judge(weight.grad.norm())))
        seen.append(float(weight.detach()[0]))
    assert seen[0] < 1
    assert seen[1] == seen[0]
    assert seen[2] < seen[1]
    assert set(seen[3:]) == {seen[2]}
    assert float(optimizer.state[weight]["step"]) == 2
    assert watch.look() == ([1, 3, 4, 5], 3, True)


def test_a_row_goes_on_over_a_look() -> None:
    watch = Guard(torch.device("cpu"), limit=3, row=1)
    watch.note(7, watch.judge(torch.tensor(NAN)))
    assert watch.look() == ([7], 2, False)
    assert watch.look() == ([], 2, False)
    watch.note(8, watch.judge(torch.tensor(INF)))
    assert watch.look() == ([8], 3, True)


def test_blank_images_leave_nothing_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear line instead of a division by zero, and no folder: the same command works when the data are mended."""
    (tmp_path / "wells").mkdir()
    for number in range(60):
        Image.new("RGB", (8, 8), (4 * number, 100, 200)).save(tmp_path / "wells" / f"{number:02d}.png")
    words = [*tiny_runs.folder_words(tmp_path / "wells"), "--img-size", "16", "--steps", "1", "--target", "norm-pixels"]
    assert run(words, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "under --target norm-pixels a predictor that learns nothing has a loss of " in said
    assert "on the training images, as on blank ones" in said
    assert not any(path.name == "config.json" for path in tmp_path.rglob("*"))


def test_spikes_are_reported_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss far above the last ones; the run with reports is the run without."""
    calm = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98, 1.0, 1.01]  # median 1, median deviation 0.02
    assert is_spike(calm, 1.15)
    assert not is_spike(calm, 1.11)
    assert not is_spike(calm[:9], 9.0)
    assert not is_spike([1.0] * 20, 1.0005)
    words = [*DIGITS, "--steps", "4", "--eval-every", "10"]
    assert run(words, tmp_path / "alone") == 0
    monkeypatch.setattr("maekit.training.run.is_spike", lambda before, value: len(before) == 2)
    assert run(words, tmp_path / "told") == 0
    assert "loss spike at step 3" in capsys.readouterr().out
    told = metrics(tmp_path / "told")
    losses = [line["loss"] for line in told if line["kind"] == "step"]
    spikes = [line for line in told if line["kind"] == "spike"]
    assert [(line["step"], line["loss"]) for line in spikes] == [(3, losses[2])]
    assert spikes[0]["median"] == pytest.approx((losses[0] + losses[1]) / 2)
    assert [line for line in told if line["kind"] != "spike"] == metrics(tmp_path / "alone")
    assert equal(tensors(tmp_path / "told"), tensors(tmp_path / "alone"))


def test_the_norm_is_that_of_all_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.nn.Linear(5, 5))
    guard.backward(model[:2](torch.ones(4, 3)).square().mean())
    squares = sum(float(g.square().sum()) for p in model.parameters() if (g := p.grad) is not None)
    assert float(guard.gradient_norm(model)) == pytest.approx(math.sqrt(squares))
