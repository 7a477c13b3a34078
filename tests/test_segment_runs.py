"""maekit segment through the command line, on tiny images: training, resume, scores, class maps, wrong input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, jaccard_score
from tiny_pairs import NAMES, TINY, card, leave_pictures_out, make_place, pairs_of, train, write_pairs
from tiny_runs import checkpoints, metrics, tensors

from maekit import cli
from maekit.config import UserError, typed_flags
from maekit.config.segmentation import SegmentConfig, adapted, preset
from maekit.data import pair_transforms
from maekit.data.loader import SampleOrder, split_heldout
from maekit.models.segmentation import Scores, loss_denominator, pixel_loss
from maekit.tasks import segment
from maekit.terminal import make_console
from maekit.training import segmentation_job, segmentation_metrics, segmentation_prepare
from maekit.training.segmentation_inference import View, predict_classes
from maekit.training.segmentation_job import scheduled_rate
from maekit.training.supervised import SupervisedRun
from maekit.weights.passport import Passport
from maekit.weights.segmenters import load_segmenter
from maekit.weights.store import load_as


@pytest.fixture(autouse=True)
def _without_pictures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_pictures_out(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("segment"))


# ---- a run ----


def test_a_run_leaves_what_it_should(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    assert {"config.json", "env.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "card.json",
            "overlays.png", "heldout.png", "curves.png"} <= {path.name for path in run.iterdir()}  # fmt: skip
    kinds = [(line["kind"], line["step"]) for line in metrics(run)]
    assert kinds == [("step", 1), ("step", 2), ("step", 3), ("heldout", 3), ("step", 4), ("step", 5), ("step", 6),
                     ("heldout", 6)]  # fmt: skip
    model, passport = load_segmenter(run / "model.safetensors")
    assert (passport.kind, passport.classes, passport.head.kind) == ("segmenter", tuple(NAMES), "upernet")
    assert (passport.head.width, passport.head.blocks, passport.steps) == (8, (0, 1, 2, 3), 6)
    assert passport.model.size_hw == (16, 16) and passport.grid == (4, 4)
    assert passport.origin.endswith("mae.safetensors")
    assert not model.training and model.auxiliary is None
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["preset"], config["steps"]) == ("segment", "small", 6)


def test_the_card_is_what_scikit_learn_says_of_the_weights(place: Path) -> None:
    """Every validation image through the weights that the run left, at its own size of 20 x 28 px, void left out."""
    model, _ = load_segmenter(place / "run" / "model.safetensors")
    true, predicted = [], []
    for image, truth in pairs_of(place):
        padded = np.zeros((3, 20, 28), np.float32)
        padded[:] = (image.transpose(2, 0, 1) / 255 - model.mean[0].numpy()) / model.std[0].numpy()
        with torch.no_grad():
            classes = model(torch.from_numpy(padded)[None]).main[0].argmax(0).numpy()
        true.append(truth[truth >= 0])
        predicted.append(classes[truth >= 0])
    found = card(place / "run")
    y_true, y_pred = np.concatenate(true), np.concatenate(predicted)
    assert found["confusion"] == confusion_matrix(y_true, y_pred, labels=range(3)).tolist()
    seen = sorted(set(y_true) | set(y_pred))
    assert found["score"]["miou"] == pytest.approx(jaccard_score(y_true, y_pred, labels=seen, average="macro"))
    assert found["score"]["pixels"] == 3 * 19 * 28
    assert found["images"] == {"train": 6, "held-out": 4, "validation": 3} and found["part"] == "validation"


def test_the_same_command_gives_the_same_weights_and_workers_change_nothing(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "again", "--workers", "1") == 0
    mine, other = tensors(place / "run"), tensors(tmp_path / "again")
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_stopped_run_continues_exactly(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the fourth step; the resumed run is bit-equal to the one left alone, metrics too."""
    real = segmentation_job.scheduled_rate

    def rate(config: SegmentConfig, step: int) -> float:
        if step == 3 and not (tmp_path / "told").exists():
            (tmp_path / "told").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, step)

    monkeypatch.setattr(segment, "scheduled_rate", rate)
    assert train(place, tmp_path / "run") == 128 + signal.SIGINT
    assert not (tmp_path / "run" / "card.json").exists() and len(metrics(tmp_path / "run")) < 8
    assert cli.main(["resume", str(tmp_path / "run"), "--log-every", "1"]) == 0
    for name in ("model", "optimizer"):
        mine, other = tensors(place / "run", name), tensors(tmp_path / "run", name)
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine), name
    assert metrics(place / "run") == metrics(tmp_path / "run")
    assert card(place / "run")["confusion"] == card(tmp_path / "run")["confusion"]
    for file in ("model.safetensors", "best.safetensors"):
        one, two = (load_segmenter(folder / file)[0].state_dict() for folder in (place / "run", tmp_path / "run"))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_stopped_while_it_scores_ends_with_the_same_card(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return segmentation_job.measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(segment, "measure", interrupted)
        assert train(place, tmp_path / "run") == 128 + signal.SIGINT
    assert not (tmp_path / "run" / "card.json").exists()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    for name in ("last_heldout", "score", "confusion", "best_step"):
        assert card(tmp_path / "run")[name] == card(place / "run")[name] is not None
    assert metrics(place / "run") == metrics(tmp_path / "run")


def test_a_step_that_is_skipped_leaves_no_trace(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite pixel in the fourth step: no weight moves, no running mean turns NaN, and the run can be resumed."""
    real: Any = segmentation_job.next_parts
    seen: list[dict[str, torch.Tensor]] = []

    def parts(job: Any, batches: Any) -> Any:
        found = real(job, batches)
        seen.append({name: value.clone() for name, value in job.model.state_dict().items()})
        if job.run.position.step == 3:
            found[0][0][0, 0, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(segment, "next_parts", parts)
    assert train(place, tmp_path / "run", "--steps", "5") == 0
    assert all(torch.equal(seen[3][name], seen[4][name]) for name in seen[3])
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000005" / "state.json").read_text())
    assert state["bad_steps"] == 1 and all(torch.isfinite(value).all() for value in tensors(tmp_path / "run").values())
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert losses[3] is None and np.isfinite([loss for loss in losses if loss is not None]).all()


def test_a_finished_run_is_not_trained_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "run" / "card.json").read_bytes()
    assert cli.main(["resume", str(place / "run")]) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert (place / "run" / "card.json").read_bytes() == before and checkpoints(place / "run") == ["step-000006"]
    assert cli.main(["resume", str(place / "run"), "--steps", "9"]) == 2


def test_accumulation_changes_neither_length_nor_images(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 parts of 2 images: 6 steps still, on the images of 6 batches of 4, at the rates of the run without parts."""
    parts: list[list[int]] = []
    real = pair_transforms.train_batches

    def batches(*arguments: Any, **named: Any) -> Any:
        for batch in real(*arguments, **named):
            parts.append(batch.sample_ids.tolist())
            yield batch

    monkeypatch.setattr(segmentation_job, "train_batches", batches)
    counted: list[int] = []
    known = segmentation_job.step_denominator

    def denominator(job: Any, labels: Any) -> torch.Tensor:
        counted.append(sum(len(part) for part in labels))
        return known(job, labels)

    monkeypatch.setattr(segment, "step_denominator", denominator)
    assert train(place, tmp_path / "run", "--accum", "2") == 0
    assert counted == [4] * 6  # a step is divided by the pixels of all its parts
    order = SampleOrder(split_heldout(10, 0.1, segmentation_prepare.MIN_HELDOUT)[0], 4, seed=0)
    assert [len(part) for part in parts] == [2] * 12
    assert [i for part in parts for i in part] == [i for step in range(6) for i in order.step_ids(step)[1]]
    rates = [[(line["step"], line["lr"]) for line in metrics(run) if line["kind"] == "step"]
             for run in (place / "run", tmp_path / "run")]  # fmt: skip
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_accumulated_parts_weigh_by_their_pixels() -> None:
    """Two parts with 16 x 16 and with half as many known pixels lose together what they lose as one batch."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16)
    labels = torch.randint(0, 3, (2, 16, 16))
    labels[1, :8] = -1
    whole = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1)
    denominator = sum(loss_denominator(one[None], -1, None) for one in labels)
    parts = [
        pixel_loss(Scores(one[None], None), truth[None], -1, None, torch.as_tensor(denominator), 0.0)
        for one, truth in zip(logits, labels, strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_from_scratch_has_other_weights_and_one_rate(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they under the licence of the source, whose architecture they have."""

    def licensed(*arguments: Any) -> Any:
        model = load_as(*arguments)
        model.passport.weights_license, model.passport.eps, model.passport.crop_pct = "cc-by-nc-4.0", 1e-5, 0.9
        return model

    config = preset("small")
    config.source, config.crop = str(place / "mae.safetensors"), (16,)
    same, _ = segmentation_prepare.start_encoder(config, make_console())
    config.from_scratch = True
    monkeypatch.setattr(segmentation_prepare, "load_as", licensed)
    random, passport = segmentation_prepare.start_encoder(config, make_console())
    assert (passport.weights_license, passport.eps) == (
        Passport(model=passport.model, mean=(), std=()).weights_license,
        1e-6,
    )
    assert passport.crop_pct == 0.9
    name = "blocks.0.mlp.fc1.weight"
    start = tensors_of(place / "mae.safetensors")[f"encoder.{name}"]
    assert torch.equal(same.state_dict()[name], start) and not torch.equal(random.state_dict()[name], start)
    assert random.state_dict()[name].shape == start.shape and passport.model.embed_dim == 32
    assert config.layer_decay < 1 and adapted(config, {"--from-scratch"}).layer_decay == 1.0
    config.layer_decay = 0.5
    assert adapted(config, {"--from-scratch", "--layer-decay"}).layer_decay == 0.5


def test_without_a_best_file_the_card_names_no_best_score(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is full: the last weights are scored."""
    monkeypatch.setattr(SupervisedRun, "keep_best", lambda *_: False)
    assert train(place, tmp_path / "run", "--score", "best") == 0
    assert card(tmp_path / "run")["best_heldout_miou"] is None
    assert card(tmp_path / "run")["weights"] == "last"


def test_linear_head_does_not_move_the_encoder_and_its_best_weights_are_scored(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, scores = segmentation_metrics.score, [0.5, 0.4]  # on held-out images: the first are the best
    monkeypatch.setattr(segmentation_job, "score", lambda matrix: dataclasses.replace(real(matrix), miou=scores.pop(0)))
    assert train(place, tmp_path / "linear", "--head", "linear", "--score", "best") == 0
    start, end = tensors_of(place / "mae.safetensors"), tensors(tmp_path / "linear")
    moved = [name for name, value in end.items()
             if name.startswith("encoder.blocks.") and not torch.equal(value, start[name])]  # fmt: skip
    assert not moved
    best, passport = load_segmenter(tmp_path / "linear" / "best.safetensors")
    assert card(tmp_path / "linear")["best_step"] == passport.steps == 3  # other weights than the last ones
    assert (passport.head.kind, passport.head.width, passport.head.blocks) == ("linear", 0, (3,))
    total = np.zeros((3, 3), int)
    for image, truth in pairs_of(place):
        found = predict_classes(best, torch.from_numpy(image.copy()).permute(2, 0, 1), View()).numpy()
        total += confusion_matrix(truth[truth >= 0], found[truth >= 0], labels=range(3))
    assert card(tmp_path / "linear")["confusion"] == total.tolist()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


# ---- schedule and presets ----


def test_poly_by_hand() -> None:
    config = SegmentConfig(data="-", steps=10, warmup_steps=2, lr=1.0)
    expected = [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [scheduled_rate(config, step) for step in range(10)] == pytest.approx(expected)
    cosine = SegmentConfig(data="-", steps=10, warmup_steps=2, lr=1.0, schedule="cosine")
    assert scheduled_rate(cosine, 6) == pytest.approx(0.5)


def test_presets_and_flags() -> None:
    paper = preset("ade20k")
    paper.data = "-"
    assert not paper.problems()
    assert (paper.crop_hw, paper.steps, paper.batch_size) == ((512, 512), 160_000, 16)
    assert (paper.lr, paper.layer_decay) == (1e-4, 0.65)
    assert (paper.warmup_steps, paper.drop_path, paper.weight_decay, paper.schedule) == (1500, 0.1, 0.05, "poly")
    small = preset("small")
    small.data, small.steps = "-", small.steps // 10
    share = small.warmup_steps / preset("small").steps
    assert adapted(small, {"--steps"}).warmup_steps == int(share * small.steps)
    assert max(small.crop_hw) <= 240 and small.head_width == 128
    paper.inference = "whole"
    assert adapted(paper, {"--inference"}).window is None and not paper.problems()
    other = preset("ade20k")
    other.data, other.window, other.head = "-", 256, "linear"
    assert (adapted(other, {"--window", "--head"}).stride, other.lr) == (None, None) and not other.problems()
    other.layer_decay, other.from_scratch = 0.5, True
    assert adapted(other, typed_flags(["--layer_decay=0.5"])).layer_decay == 0.5
    with pytest.raises(UserError, match="--preset huge: no such preset"):
        preset("huge")


def test_class_weights_have_mean_one() -> None:
    config = SegmentConfig(data="-", class_weights="sqrt")
    part: Any = SimpleNamespace(class_pixels=lambda ids: np.array([900, 100, 0]))
    weights = segmentation_prepare.class_weights(config, part, np.arange(2), torch.device("cpu"))
    assert weights is not None
    assert float(weights[1] / weights[0]) == pytest.approx(3.0) and float(weights[2]) == 1.0
    assert float(0.9 * weights[0] + 0.1 * weights[1]) == pytest.approx(1.0)


# ---- wrong input ----


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--crop", "18"], ["--crop 18: not a multiple of the patch of 4 px: take --crop 16"]),
        (["--batch-size", "3", "--accum", "2", "--lr", "-1"], ["--lr -1: must be above 0", "divisible by --accum 2"]),
        (["--blocks", "1", "2"], ["--blocks 1 2: --head upernet reads 4 blocks"]),
        (["--inference", "slide", "--window", "8", "--stride", "9"], ["--stride 9: is larger than --window 8"]),
        (["--inference", "whole", "--window", "16"], ["--window and --stride belong to --inference slide"]),
        (["--void", "x", "--scales", "0"], ["--void x: give a pixel value", "--scales 0: give one or more numbers"]),
        (["--steps", "5", "--warmup-steps", "6"], ["--warmup-steps 6 is longer than the run (--steps 5)"]),
        (["--batch-size", "1", "--crop", "8"], ["with one image on a process, batch norm needs a larger crop"]),
        (["--heldout-share", "0.99"], ["10 images are too few"]),
        (["--void", "255"], ["values that stand for no class: 3 ("]),
    ],
)
def test_wrong_flags(place: Path, tmp_path: Path, more: list[str], words: list[str], capsys: Any) -> None:
    assert train(place, tmp_path / "run", *more) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_wrong_folders_and_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, place / "run") == 2
    assert "maekit resume" in capsys.readouterr().err
    for source in (str(place / "mae.safetensors"), str(tmp_path)):
        assert cli.main(["segment", source, "--predict", str(place), "--out", str(tmp_path / "x")]) == 2
    assert "maekit segment" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a 'mae', not a segmenter"):
        load_segmenter(place / "mae.safetensors")
    nothing = ["--predict", str(tmp_path / "none"), "--out", str(tmp_path / "x")]
    assert cli.main(["segment", str(place / "run"), *nothing]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_annotations_are_checked_before_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "data")
    Image.new("RGB", (28, 20), (1, 2, 3)).save(data / "annotations" / "training" / "00.png")
    Image.new("L", (9, 9), 1).save(data / "annotations" / "training" / "01.png")
    words = ["segment", str(place / "mae.safetensors"), "--data", str(data), *TINY, "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "00.png" in said and "01.png" in said and "convert an annotation from colours" in said
