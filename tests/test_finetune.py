"""Fine-tuning: what a score says, and whole runs that stop, go on and are scored."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_classes as tiny
import tiny_runs
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from timm.layers import PatchDropout
from torch import nn

import maekit
from maekit import cli
from maekit.config import PRESETS, FinetuneConfig
from maekit.data.sources import open_source
from maekit.models import encoder as encoders
from maekit.models.classifier import Classifier
from maekit.tasks import finetune
from maekit.training import checkpoint as checkpoints
from maekit.training.mixing import Mixing
from maekit.training.scoring import Answers, answer, score
from maekit.viz import confusion
from maekit.weights.sources import read_passport

PLAIN = "--mixup 0 --cutmix 0 --erase 0 --smoothing 0 --drop-path 0 --auto-augment none --crop none --no-flip".split()
"""Nothing is random but the order."""


def run(source: Path, out: Path, *more: str) -> int:
    return cli.main(["finetune", str(source), *tiny.TRAINING, "--out", str(out), *more])


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    """Pictures take half a second and touch no number; models that are built to be asked for sizes are kept."""
    patch = pytest.MonkeyPatch()
    patch.setattr(finetune, "draw_training", lambda *_, **__: None)
    patch.setattr(confusion, "draw_confusion", lambda *_, **__: None)
    patch.setattr(encoders, "plain_vit", tiny_runs._plain_vit)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("source") / "run")


HARD = (
    "--steps 10 --eval-every 0.2 --ema 0.8 --accum 2 --clip-grad 1 --auto-augment rand-m9-mstd0.5-inc1 --erase 0.5 "
    "--patch-drop 0.25"
).split()
"""With everything that is random or has a state of its own; 22 steps an epoch, so an evaluation every 4."""


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(source, out, *HARD) == 0
    return out


# ---- what a score says ----


def test_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 7)), random.integers(0, 6, 200)  # nobody is of class 6
    own = logits[np.arange(200), labels]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ahead = (logits >= own[:, None]).sum(axis=1) - 1
    found = score(Answers(labels, logits.argmax(axis=1), ahead, -np.log(shares[np.arange(200), labels])), 7)
    assert found.top1 == pytest.approx(accuracy_score(labels, logits.argmax(axis=1)))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, shares, k=5, labels=range(7)))
    assert found.loss == pytest.approx(log_loss(labels, shares, labels=range(7)))
    table = confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))
    assert found.confusion_KK is not None and np.array_equal(found.confusion_KK, table)
    assert found.per_class[:6] == pytest.approx(list(table.diagonal()[:6] / table.sum(axis=1)[:6]))
    assert (found.per_class[6], found.class_images[6], found.images) == (None, 0, 200)


def test_nothing_is_right_where_a_classifier_says_nan() -> None:
    batch = SimpleNamespace(images=torch.zeros(2, 3, 4, 4), sample_ids=np.arange(2))
    pool: Any = SimpleNamespace(eval_batches=lambda ids, size: [batch], unreadable={})

    class Broken(nn.Module):
        mean = torch.zeros(1)

        def normalize(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 10), torch.nan)

    broken: Any = Broken()
    found = score(answer(broken, pool, np.arange(2), np.array([0, 3]), 2, "fp32"), 10)
    assert (found.top1, found.top5) == (0, 0)


def test_the_best_epoch_has_the_most_right_answers_and_then_the_lowest_loss() -> None:
    def of(right: int, loss: float) -> float:
        return score(
            Answers(
                np.zeros(4, np.int64), np.zeros(4, np.int64), (np.arange(4) >= right).astype(np.int64), np.full(4, loss)
            ),
            2,
        ).rank

    ranks = [of(1, 0.1), of(2, 99.0), of(2, 5.0), of(2, 0.01), of(3, float("inf")), of(4, 3.0)]
    assert ranks == sorted(set(ranks))
    assert -1 <= of(0, float("nan")) < of(0, 100.0)


# ---- whole runs ----


def test_the_card_is_what_the_saved_classifier_says_of_the_test_split(alone: Path) -> None:
    card = json.loads((alone / "card.json").read_text())
    model, test = maekit.load(alone), open_source("digits", in_chans=1).test
    assert isinstance(model, Classifier)
    assert test is not None
    assert test.labels is not None
    images = torch.from_numpy(np.stack([test.read(index) for index in range(len(test))])).permute(0, 3, 1, 2)
    said = model.predict(images)
    right = (said.class_ids.numpy() == test.labels).mean()
    assert (card["top1"], card["test_images"], card["test"]) == (pytest.approx(right), 359, "test split")
    assert card["top5"] == pytest.approx(top_k_accuracy_score(test.labels, said.probabilities.numpy(), k=5))
    assert np.array_equal(card["confusion"], confusion_matrix(test.labels, said.class_ids.numpy(), labels=range(10)))
    assert list(card["per_class"]) == list(tiny.DIGITS)
    assert card["training_images"] + card["heldout_images"] == 1438


def test_the_scored_weights_are_those_of_the_best_held_out_score(alone: Path) -> None:
    lines = [line for line in tiny_runs.metrics(alone) if line["kind"] == "heldout"]
    assert [line["step"] for line in lines] == [4, 8, 10]
    best = max(lines, key=lambda line: (line["top1"], -line["loss"]))
    card, passport = json.loads((alone / "card.json").read_text()), read_passport(alone / "model.safetensors")
    assert (card["weights"], card["step"], passport.steps) == ("best", best["step"], best["step"])
    assert (passport.kind, passport.classes, passport.weights_license) == ("classifier", tiny.DIGITS, "cc0-1.0")
    chosen, kept = (load_file(alone / name) for name in ("model.safetensors", "best.safetensors"))
    assert tiny_runs.equal(chosen, kept)


@pytest.mark.parametrize("at", [1, 6])
def test_a_stopped_run_goes_on_to_the_last_bit(
    at: int, alone: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "run", [0]
    real: Callable[..., None] = finetune.set_scaled_rate

    def interrupt(*arguments: Any) -> None:
        steps[0] += 1
        if steps[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    moved = Path(shutil.copytree(source, tmp_path / "source"))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "set_scaled_rate", interrupt)
        assert run(moved, out, *HARD, "--workers", "0") == 130
    assert tiny_runs.state(out)["step"] in (at - 1, at)
    shutil.rmtree(moved)  # a run goes on without its source
    assert cli.main(["resume", str(out)]) == 0
    tiny_runs.assert_same_run(alone, out)
    for name in ("model.safetensors", "best.safetensors"):
        assert tiny_runs.equal(load_file(alone / name), load_file(out / name))
    one, other = (json.loads((folder / "card.json").read_text()) for folder in (alone, out))
    assert all(one[key] == other[key] for key in ("top1", "loss", "confusion", "step"))


def test_a_finished_run_is_not_scored_again_and_can_be_made_longer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run(source, out, *PLAIN, "--steps", "2", "--score", "last") == 0
    before = (out / "card.json").stat().st_mtime_ns
    assert cli.main(["resume", str(out)]) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert (out / "card.json").stat().st_mtime_ns == before
    rates = []
    monkeypatch.setattr(finetune, "set_scaled_rate", lambda optimizer, lr: rates.append(lr))
    assert cli.main(["resume", str(out), "--steps", "4"]) == 0
    assert rates == pytest.approx([rates[0], 1e-6 + (rates[0] - 1e-6) / 2]) and rates[0] > 1e-5  # a cosine of its own
    assert cli.main(["resume", str(out), "--steps", "3"]) == 2
    assert "beyond the new end at 3" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["steps"] == 4
    assert (json.loads((out / "card.json").read_text())["step"], tiny_runs.state(out)["step"]) == (4, 4)
    assert read_passport(out / "model.safetensors").steps == 4


def test_a_signal_before_the_first_checkpoint_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    assert run(source, tmp_path / "run", *PLAIN, "--steps", "2") == 143
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_the_scoring_of_the_test_split(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finetune.answer

    def interrupted(model: Any, pool: Any, ids: Any, *more: Any) -> Any:
        if len(more) == 4:  # with a progress bar: the test split
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, pool, ids, *more)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "answer", interrupted)
        assert run(source, tmp_path / "run", *PLAIN, "--steps", "2") == 143
    assert not (tmp_path / "run" / "card.json").exists()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    card = tmp_path / "run" / "card.json"
    assert json.loads(card.read_text())["steps"] == 2
    with monkeypatch.context() as patch:  # a longer run has the old card until it is scored, and is not finished by it
        patch.setattr(finetune, "answer", interrupted)
        assert cli.main(["resume", str(tmp_path / "run"), "--steps", "4"]) == 143
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert json.loads(card.read_text())["steps"] == 4


def test_accumulation_changes_neither_length_nor_rates_nor_updates(source: Path, tmp_path: Path) -> None:
    for accum in ("1", "4"):
        assert run(source, tmp_path / accum, *PLAIN, "--steps", "3", "--accum", accum) == 0
    lines = [tiny_runs.metrics(tmp_path / accum) for accum in ("1", "4")]
    rates = [[line["lr"] for line in some if line["kind"] == "step"] for some in lines]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 3
    for kind in ("step", "heldout"):
        losses = [[line["loss"] for line in some if line["kind"] == kind] for some in lines]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_train_as_one(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "one", *PLAIN, "--steps", "3") == 0
    children = tiny_runs.fork_ranks(lambda rank: run(source, tmp_path / "two", *PLAIN, "--steps", "3"), tmp_path)
    assert tiny_runs.ends(children) == [0, 0], (tmp_path / "rank1.log").read_text()
    one, two = (tiny_runs.tensors(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("one", "two")]
    assert cards[0]["test_images"] == cards[1]["test_images"] == 359
    assert cards[0]["loss"] == pytest.approx(cards[1]["loss"], rel=1e-4)


def test_eval_gives_the_cards_numbers_again(alone: Path, tmp_path: Path) -> None:
    words = ["finetune", str(alone), "--data", "digits", "--eval", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*words, "--precision", "fp32"]) == 0
    one, again = (json.loads((folder / "card.json").read_text()) for folder in (alone, tmp_path))
    assert all(one[key] == again[key] for key in ("top1", "top5", "confusion", "per_class", "classes"))


def test_clean_epochs_are_trained_on_whole_unmixed_images(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two of four steps, and those of a run that is taken up there too."""
    unmixed: list[bool] = []
    tokens: list[int] = []
    real = Mixing.__call__

    def look(self: Mixing, images: torch.Tensor, labels: torch.Tensor) -> Any:
        before = images.clone()  # they are changed in place
        mixed = real(self, images, labels)
        unmixed.append(torch.equal(mixed[0], before))
        return mixed

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if isinstance(module, PatchDropout) and module.training:
            tokens.append(output.shape[1])

    monkeypatch.setattr(Mixing, "__call__", look)
    with torch.nn.modules.module.register_module_forward_hook(count):
        words = "--preset light --patch-drop 0.5 --erase 1 --warmup-steps 1 --score last".split()
        out = tmp_path / "run"
        assert run(source, out, *words, "--clean-epochs", str(2 / 22), "--steps", "4") == 0
        assert unmixed == [False, False, True, True]
        assert tokens == [3, 3, 5, 5]  # half of the four patches, and the class token
        assert cli.main(["resume", str(out), "--steps", "7"]) == 0
    assert tokens[4:] == [3, 5, 5]


def test_random_weights_are_trained_at_one_rate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer decay is care for what was learned; where nothing was, it would only handicap the comparison."""
    asked: list[FinetuneConfig] = []

    def note(source: str, config: FinetuneConfig) -> int:
        asked.append(config)
        return 0

    monkeypatch.setattr(finetune, "main", note)
    words = ["finetune", str(source), "--data", "digits"]
    random = ["finetune", "random:vit_tiny_patch16_224", "--data", "digits"]
    for some in (words, [*words, "--from-scratch"], random, [*words, "--from-scratch", "--layer-decay", "0.5"]):
        assert cli.main(some) == 0
    assert [config.layer_decay for config in asked] == [0.75, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(("size_hw", "seen"), [((32, 32), 0.875), ((224, 300), 0.875), ((256, 256), 1.0)])
@pytest.mark.parametrize(("more", "told"), [({}, True), ({"eval": True}, False), ({"preset": "light"}, False)])
def test_all_of_an_image_is_scored_above_224_px(
    size_hw: tuple[int, int], seen: float, more: dict[str, Any], told: bool
) -> None:
    """The released code's rule, by the weights' size; what is typed holds, and --eval reads as the run did."""
    config = dataclasses.replace(PRESETS["official"], **more)
    config.adapt(["--crop-pct"])
    assert config.seen_share(size_hw) == 0.875
    config.adapt([])
    assert config.seen_share(size_hw) == (seen if told else None)


def test_from_scratch_takes_the_architecture_alone(source: Path, tmp_path: Path) -> None:
    for name, more in (("scratch", ["--from-scratch"]), ("tuned", [])):
        assert run(source, tmp_path / name, *PLAIN, "--steps", "1", "--warmup-steps", "1", *more) == 0
    # The warm-up's first step has the rate 0.
    theirs = load_file(source / "model.safetensors")
    for name, same in (("scratch", False), ("tuned", True)):
        weights = tiny_runs.tensors(tmp_path / name)
        assert (
            torch.equal(weights["encoder.blocks.0.attn.qkv.weight"], theirs["encoder.blocks.0.attn.qkv.weight"]) is same
        )
    assert read_passport(tmp_path / "scratch" / "model.safetensors").origin == ""
    assert read_passport(tmp_path / "tuned" / "model.safetensors").origin == str(source)
