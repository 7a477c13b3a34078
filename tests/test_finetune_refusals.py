"""Fine-tuning: what is refused, in words, before a folder is made or a card is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_classes as tiny

from maekit import cli
from maekit.config import PRESETS, FinetuneConfig, UserError
from maekit.data.labelled import split_labelled
from maekit.data.parts import ArrayPart, Source


def run(source: Path, out: Path, *more: str) -> int:
    return cli.main(["finetune", str(source), *tiny.TRAINING, "--out", str(out), *more])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run(source, out, "--preset", "light", "--steps", "2") == 0
    return out


def part(labels: list[int]) -> ArrayPart:
    return ArrayPart(np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels, np.int64), ["cat", "dog"], 1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source("x", ArrayPart(np.zeros((40, 8, 8, 1), np.uint8), None, None, 1)), "has no labels"),
        (Source("x", part([0, 1] * 20), test=part([-1] * 9)), "no image of its test split has a label"),
        (Source("x", part([0, 1] * 20), val=part([0, 1]), empty=("test",)), "its test split holds no image"),
        (Source("x", part([-1] * 40), test=part([0, 1])), "none of the training images has a label"),
        (Source("x", part([1] * 40), test=part([0, 1])), r"are of one class \(dog\)"),
    ],
)
def test_labels_that_cannot_be_learned_from_are_refused(source: Source, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_labelled(source, "x", 0.1)


def test_a_report_is_about_images_with_labels() -> None:
    """ImageNet's test images have none that are public: then it is about the validation part."""
    both = Source("x", part([0, 1] * 20), val=part([0, 1, 1]), test=part([-1] * 9))
    splits = split_labelled(both, "x", 0.1)
    assert splits.test is both.val and splits.test_what == "validation split"


@pytest.mark.parametrize("name", ["test", "validation"])
def test_an_empty_split_is_refused(name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fifth of the training images in its place would be another report than was meant."""
    data = tiny.write_images(tmp_path / "data" / "train", {"cat": 10, "dog": 10}).parent
    (data / name).mkdir()
    for words in (["finetune", str(source), "--out", str(tmp_path / "run")], ["probe", str(source)]):
        assert cli.main([*words, "--data", str(data)]) == 2
        assert f"its {name} split holds no image" in capsys.readouterr().err


def test_splits_do_not_overlap_and_leave_unlabelled_images_out() -> None:
    splits = split_labelled(Source("x", part([0, 1, 1, -1] * 100)), "x", 0.1, train_share=0.5)
    assert splits.test is splits.train
    ids = [set(some.tolist()) for some in (splits.train_ids, splits.heldout_ids, splits.test_ids)]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert not any(index % 4 == 3 for some in ids for index in some)
    whole = split_labelled(Source("x", part([0, 1, 1, -1] * 100)), "x", 0.1)
    assert ids[0] < set(whole.train_ids.tolist())
    assert len(ids[0]) == round(len(whole.train_ids) / 2)


def test_a_run_that_is_refused_leaves_no_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path / "data", {"cat": 30})
    assert run(source, tmp_path / "run", "--data", str(data), "--batch-size", "4", "--steps", "2") == 2
    assert "has no labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_of_other_classes_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_images(tmp_path / "data", {"cat": 30, "dog": 30})
    assert cli.main(["finetune", str(trained), "--data", str(data), "--eval", "--out", str(tmp_path / "card")]) == 2
    assert "labels of other classes (cat, dog)" in capsys.readouterr().err


def test_problems_are_told_together_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--data nowhere --mixup -1 --smoothing 1 --auto-augment rand-q3 --ema 2 --batch-size 9 --epochs 1 --steps 2 "
    )
    words += "--cutmix-minmax 0.5 0.5 --patch-drop 1"
    assert cli.main(["finetune", str(tmp_path / "nothing"), *words.split()]) == 2
    told = capsys.readouterr().err
    for word in (
        "--mixup -1",
        "--smoothing 1",
        "--patch-drop 1: must lie in [0, 1)",
        "rand-q3",
        "--ema 2",
        "--cutmix-minmax 0.5 0.5",
        "the 9 images",
        "either as --epochs or as --steps",
    ):
        assert word in told, word


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: None, "no such run or file"),
        (lambda run: run.mkdir(), "not a run: no model.safetensors"),
        (lambda run: tiny.write_encoder(run), "--model vit_base_patch16_224: the passport"),
    ],
)
def test_a_source_that_cannot_be_tuned_is_refused(
    make: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out", "--model", "vit_base_patch16_224") == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(source, out, "--preset", "light", "--steps", "2") == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"pool": "cls"}))
    assert cli.main(["resume", str(out), "--steps", "3"]) == 2
    told = capsys.readouterr().err
    assert "encoder.norm.weight is missing" in told
    assert "fc_norm.weight is unknown" in told


def test_presets_follow_the_runs_images_and_flips(tmp_path: Path) -> None:
    def write(img_size: list[int], flip: bool) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"data": "x", "img_size": img_size, "flip": flip}))
        return str(tmp_path)

    assert cli.finetune_defaults(write([32], False), []) == FinetuneConfig(**vars(PRESETS["small"]) | {"flip": False})
    assert cli.finetune_defaults(write([224], True), []) == PRESETS["paper"]
    assert cli.finetune_defaults(write([224], True), ["--preset", "light"]) == PRESETS["light"]
    assert cli.finetune_defaults("timm:x", ["--preset=official", "--data"]) == PRESETS["official"]
    with pytest.raises(UserError, match="did you mean small"):
        cli.finetune_defaults("x", ["--preset", "smal"])


def test_eval_does_not_write_over_a_runs_card(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "card.json").read_bytes()
    assert cli.main(["finetune", str(trained), "--data", "digits", "--eval", "--out", str(trained)]) == 2
    assert "holds a run, whose own card would be lost" in capsys.readouterr().err
    assert (trained / "card.json").read_bytes() == before
