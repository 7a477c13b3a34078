"""maekit predict: every row against the classifier asked by hand, labels by name, unreadable images, refusals."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_classes as tiny
import torch
from PIL import Image

from maekit import cli
from maekit.models.classifier import Classifier

CLASSES = ("dog", "cat", "eel")
PARTS = {"cat": 4, "dog": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    folder = tmp_path_factory.mktemp("model")
    return folder, tiny.write_classifier(folder, CLASSES)


def by_hand(model: Classifier, path: Path) -> list[float]:
    """One image alone, in float64."""
    pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float64) / 255)[None, None]
    logits = model(((pixels - tiny.MEAN[0]) / tiny.STD[0]).float())[0].double()
    shares: list[float] = (logits.exp() / logits.exp().sum()).tolist()
    return shares


def predict(source: Path, data: Path, out: Path, *more: str) -> int:
    return cli.main(["predict", str(source), "--data", str(data), "--out", str(out), "--device", "cpu", "--precision",
                     "fp32", "--workers", "0", "--batch-size", "3", *more])  # fmt: skip


def test_rows_are_what_the_classifier_says_of_each_image_alone(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path / "data", PARTS)
    assert predict(model[0], data, tmp_path / "p.parquet", "--top", "2") == 0
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["path"] for row in rows] == [f"{name}/{k}.png" for name in ("cat", "dog") for k in range(PARTS[name])]
    right = 0
    for row in rows:
        shares = by_hand(model[1], data / row["path"])
        order = sorted(range(3), key=lambda k: -shares[k])
        assert (row["class"], row["top"]) == (CLASSES[order[0]], [CLASSES[k] for k in order[:2]])
        assert row["probabilities"] == pytest.approx([shares[k] for k in order[:2]], abs=1e-5)
        assert row["probability"] == row["probabilities"][0]
        assert (row["label"], row["part"], row["error"]) == (row["path"].split("/")[0], "train", None)
        right += row["class"] == row["label"]
    # The data's classes are cat, dog; the classifier's dog, cat, eel: they are matched by name.
    told = " ".join(capsys.readouterr().out.split())
    assert f"own labels, train: {100 * right / 7:.1f} % (95 %" in told
    assert "balanced" not in told, "the classes have nearly the same size"

    assert predict(model[0], data, tmp_path / "p.csv", "--top", "9") == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["path"] for line in lines] == [row["path"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert (line["class"], line["class_1"], line["class_2"]) == (row["class"], *row["top"])
        assert float(line["probability_2"]) == pytest.approx(row["probabilities"][1], rel=1e-4)
        assert sum(float(line[f"probability_{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-4)
    assert "class_4" not in lines[0]


def test_classes_of_different_sizes_have_their_mean_beside_the_accuracy(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path / "data", {"cat": 1, "dog": 6, "eel": 1})
    assert predict(model[0], data, tmp_path / "p.parquet") == 0
    told = " ".join(capsys.readouterr().out.split())
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    right = {name: [row["class"] == name for row in rows if row["label"] == name] for name in ("cat", "dog", "eel")}
    mean = sum(100 * sum(one) / len(one) for one in right.values()) / 3
    assert f"always answering dog would be right for 75.0 % of these; mean over the classes (balanced "\
           f"accuracy) {mean:.1f} %" in told  # fmt: skip


def test_an_image_that_cannot_be_read_has_a_row_and_no_class(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path, {"data": 3}) / "data"
    (data / "1.png").write_bytes(b"nothing")
    for out in (tmp_path / "p.parquet", tmp_path / "p.csv"):
        assert predict(model[0], data, out) == 0
        told = capsys.readouterr().out
        assert "unreadable: 1.png: not an image" in told
        assert "2 images by class" in told
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["error"] for row in rows] == [None, "not an image", None]
    assert (rows[1]["class"], rows[1]["probability"], rows[1]["top"]) == (None, None, [])
    assert "label" not in rows[0], "the data have none"
    assert rows[2]["probability"] == pytest.approx(max(by_hand(model[1], data / "2.png")), abs=1e-5)
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[2] == "train,1.png,,,,,,,,,not an image"


def test_labels_of_other_classes_give_no_accuracy(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path / "data", {"cat": 2, "yak": 2})
    assert predict(model[0], data, tmp_path / "p.csv") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "accuracy: not measured" in told
    assert "labels of other classes (yak)" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.txt", "--top", "0"], ["--out x.txt", "--top 0"]),
        (["--part", "test"], ["has no such part; choose train"]),
        (["--data", "nowhere"], ["no such file or folder"]),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: list[str],
    said: list[str],
    model: tuple[Path, Classifier],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tiny.write_images(tmp_path / "data", PARTS)
    assert predict(model[0], data, tmp_path / "p.csv", *words) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in said), told
    assert os.listdir(tmp_path) == ["data"], "nothing is left behind"


def test_a_file_below_a_file_cannot_be_written(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path / "data", PARTS)
    out = data / "cat" / "0.png" / "p.csv"
    assert predict(model[0], data, out) == 2
    assert f"--out {out}: cannot be written (" in capsys.readouterr().err


def test_data_without_one_readable_image_leave_no_file(
    model: tuple[Path, Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_images(tmp_path, {"data": 2}) / "data"
    for path in data.iterdir():
        path.write_bytes(b"")
    assert predict(model[0], data, tmp_path / "p.parquet") == 2
    assert "can be read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["data"]


def test_an_encoder_predicts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = tiny.write_encoder(tmp_path / "run"), tiny.write_images(tmp_path / "data", PARTS)
    assert predict(run, data, tmp_path / "p.csv") == 2
    assert "no classifier; train one: maekit finetune" in capsys.readouterr().err


def test_info_says_what_a_classifier_is(model: tuple[Path, Classifier], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(model[0])]) == 0
    told: Any = capsys.readouterr().out
    assert "classifier of 3 classes (dog, cat, eel)" in told
    assert f"next: maekit predict {model[0]} --data FOLDER" in told
