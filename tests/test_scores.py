"""maekit reconstruct --scores: each row against one image scored by hand, the order, masks, labels, refusals."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_classes as tiny
import torch
from PIL import Image
from torch import Tensor

import maekit
from maekit import cli
from maekit.config import ModelConfig
from maekit.data.loader import Batch
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks
from maekit.models.targets import bilinear_fill, make_target, patchify, take_patches
from maekit.rng import Purpose
from maekit.tasks.reconstruct import Scores
from maekit.training.monitor import heldout_sums

PARTS = {"cat": 4, "dog": 3}
GRID = (4, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("source"), target="pixels", img_size=(16,))


def score(source: Path, data: Path, out: Path, *more: str) -> int:
    panel = ["--out", str(out.parent / "panel.png")]
    return cli.main(["reconstruct", str(source), "--data", str(data), "--scores", str(out), "--device", "cpu", *panel,
                     *more])  # fmt: skip


def by_hand(model: MaskedAutoencoder, path: Path, sample_id: int, views: int = 1) -> tuple[float, float]:
    """Loss and the better trivial predictor's of one image, a mask and a patch at a time, in float64."""
    pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 255)[None, None]
    normal = (pixels - tiny.MEAN[0]) / tiny.STD[0]
    patches_1NP = patchify(normal, 4)
    sums = [0.0, 0.0, 0.0]
    for view in range(views):
        masks = make_masks("random", GRID, 0.75, [sample_id], seed=0, purpose=Purpose.HELDOUT_MASK, view=view)
        pred_MP = model(normal, masks.ids_keep_BV).pred_BMP[0].double()
        visible = patches_1NP[0, masks.ids_keep_BV[0]].double().mean()
        fill_NP = bilinear_fill(patches_1NP, masks.ids_keep_BV, GRID, 4)[0].double()
        # the decoder tells hidden patches in ascending order where only the visible ones are given
        for row, patch in enumerate(sorted(masks.ids_masked_BM[0].tolist())):
            true_P = patches_1NP[0, patch].double()
            for place, guess in enumerate((pred_MP[row], visible, fill_NP[patch])):
                sums[place] += float((guess - true_P).square().mean()) / 12 / views
    return sums[0], min(sums[1:])


@pytest.mark.parametrize("views", [1, 3])
def test_each_row_is_what_the_image_gives_alone(
    views: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of noise, where the mean is the better guess, and of a ramp, where the fill is; written a few rows at a time."""
    monkeypatch.setattr("maekit.tasks.reconstruct.ROWS_AT_ONCE", 3)
    data = tiny.write_images(tmp_path / "data", PARTS, 16)
    ramp = np.add.outer(np.arange(16), 10 * np.arange(16))
    Image.fromarray(ramp.astype(np.uint8)).save(data / "cat" / "2.png")
    assert score(source, data, tmp_path / "s.parquet", "--masks-per-image", str(views)) == 0
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["part", "path", "label", "loss", "trivial", "excess", "skill", "error"]
    rows = table.to_pylist()
    model, names = maekit.load(source), [f"{name}/{k}.png" for name in PARTS for k in range(PARTS[name])]
    for row in rows:
        with torch.no_grad():
            loss, trivial = by_hand(model, data / row["path"], names.index(row["path"]), views)
        assert (row["loss"], row["trivial"]) == pytest.approx((loss, trivial), rel=1e-5)
        assert row["skill"] == pytest.approx(1 - loss / trivial, rel=1e-4, abs=1e-5)
        assert row["excess"] == pytest.approx(loss - trivial, rel=1e-4, abs=1e-5)
        assert (row["part"], row["label"], row["error"]) == ("train", row["path"].split("/")[0], None)
    assert sorted(row["path"] for row in rows) == names
    assert [row["excess"] for row in rows] == sorted((row["excess"] for row in rows), reverse=True)
    facts = json.loads(table.schema.metadata[b"maekit"])
    assert (facts["masks_per_image"], facts["target"], facts["mask_ratio"]) == (views, "pixels", 0.75)

    assert score(source, data, tmp_path / "s.csv", "--masks-per-image", str(views)) == 0
    with (tmp_path / "s.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["path"], line["label"], line["error"]) for line in lines] == [
        (row["path"], row["label"], "") for row in rows
    ]
    assert [float(line["skill"]) for line in lines] == pytest.approx([row["skill"] for row in rows], rel=1e-5)


@pytest.mark.parametrize("target", ["pixels", "norm-pixels", "norm-pixels-whitened"])
def test_losses_of_single_images_have_the_mean_of_the_model_itself(target: Any) -> None:
    """The same as the model's loss of the batch, and the trivial ones as they are defined over it."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        ModelConfig(**{**tiny.SHAPE, "target": target, "img_size": (16,)}), tiny.MEAN, tiny.STD
    ).eval()
    images = torch.randint(0, 256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ids = np.arange(10, 16)
    masks = make_masks("random", GRID, 0.75, ids, seed=0, purpose=Purpose.HELDOUT_MASK)

    class Given:
        def eval_batches(self, ids: Any, batch_size: int) -> Any:
            for start in range(0, len(ids), batch_size):
                yield Batch(images[start : start + batch_size], ids[start : start + batch_size], [])

    with torch.no_grad():
        normal = model.normalize(images)
        loss = float(model(normal, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM).loss)
        patches = patchify(normal, 4)
        fill = bilinear_fill(patches, masks.ids_keep_BV, GRID, 4)
        hidden, guess = (
            make_target(take_patches(values, masks.ids_masked_BM), target, model.spectrum) for values in (patches, fill)
        )
        visible: Tensor | float = take_patches(patches, masks.ids_keep_BV).mean(dim=(1, 2), keepdim=True)
        constant = visible if target == "pixels" else 0.0
        trivial = [float((other - hidden).square().mean()) for other in (constant, guess)]
    for batch_size in (6, 4, 1):
        sums = heldout_sums(model, Given(), ids, batch_size, with_trivial=True)  # type: ignore[arg-type]
        assert (sums / 6).tolist() == pytest.approx([loss, *trivial, 1], rel=1e-6)
    assert heldout_sums(model, Given(), ids, 4, with_trivial=False)[1:3].tolist() == [0, 0]  # type: ignore[arg-type]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_file_of_scores_changes_no_number_over_the_part(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and skill are the means over the rows, with or without the file; more masks give other numbers."""
    data = tiny.write_images(tmp_path / "data", PARTS, 16)
    words = ["reconstruct", str(source), "--data", str(data), "--device", "cpu", "--out", str(tmp_path / "panel.png")]
    assert cli.main(words) == 0
    plain = told(capsys)
    assert score(source, data, tmp_path / "s.parquet") == 0
    first, rest = told(capsys), re.compile(r"images 7.*lie below")
    assert rest.findall(first) == rest.findall(plain) != []
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert f"loss {np.mean([row['loss'] for row in rows]):.4f} on hidden patches" in plain
    spread = "  ".join(f"{x:.3f}" for x in np.percentile([row["skill"] for row in rows], (5, 25, 50, 75, 95)))
    assert " ".join(spread.split()) + " (5, 25, 50, 75 and 95 % lie below;" in plain
    assert all(row["path"] in plain for row in rows[:5]) and not any(row["path"] in plain for row in rows[5:])
    assert score(source, data, tmp_path / "s4.parquet", "--masks-per-image", "4") == 0
    four = told(capsys)
    assert "random masks of 75 %, 4 of each image)" in four and rest.findall(four) != rest.findall(plain)


def test_blank_and_unreadable_images_have_rows(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A blank one has a loss and no skill; an unreadable one nothing, and comes last."""
    data = tiny.write_images(tmp_path, {"data": 5}, 16) / "data"
    (data / "1.png").write_bytes(b"nothing")
    Image.new("L", (16, 16), 90).save(data / "2.png")
    for name in ("s.parquet", "s.csv"):
        assert score(source, data, tmp_path / name) == 0
    said = told(capsys)
    assert "images 5, 1 of them unreadable, 1 of them blank (nothing to predict, no skill)" in said
    *rows, last = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert "label" not in last, "the data have none"
    assert list(last.values()) == ["train", "1.png", None, None, None, None, "not an image"]
    (blank,) = [row for row in rows if row["path"] == "2.png"]
    assert blank["skill"] is None and blank["loss"] > 0.01 and blank["error"] is None
    assert blank["trivial"] == pytest.approx(0, abs=1e-9) and blank["excess"] == pytest.approx(blank["loss"])
    assert {row["path"] for row in rows} == {"0.png", "2.png", "3.png", "4.png"}
    assert [row["excess"] for row in rows] == sorted((row["excess"] for row in rows), reverse=True)
    assert (tmp_path / "s.csv").read_text().splitlines()[-1] == "train,1.png,,,,,not an image"


def test_blank_images_alone_have_no_skill(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trivial predictors' loss is 0, which divides nothing."""
    (tmp_path / "data").mkdir()
    for index in range(3):
        Image.new("L", (16, 16)).save(tmp_path / "data" / f"{index}.png")
    shown: dict[str, Any] = {}
    monkeypatch.setattr("maekit.tasks.reconstruct.draw", lambda rows, path, **more: shown.update(more))
    assert score(source, tmp_path / "data", tmp_path / "s.csv") == 0
    said = told(capsys)
    assert "images 3, 3 of them blank" in said and "of each image" not in said and "1: perfect" not in said
    assert sorted(shown["row_labels"]) == [f"- {k}.png" for k in range(3)]


def test_the_order_of_images() -> None:
    """By excess, ties by id; then a loss that is no number, of broken weights; then what cannot be read."""
    losses_3N = np.array([[1.0, 3, 2, np.nan, 1, 9], [2, 2, 0, 2, 2, 9], [5, 1, 1, 1, 9, 9]])
    scores = Scores.of(losses_3N, {0: "not an image"})
    assert scores.worst_first_N.tolist() == [1, 2, 5, 4, 3, 0] and scores.worst.tolist() == [1, 2, 5, 4, 3]
    assert scores.excess_N[1:].tolist() == pytest.approx([2, 2, np.nan, -1, 0], nan_ok=True)
    assert scores.skill_N[1:].tolist() == pytest.approx([-2, np.nan, np.nan, 0.5, 0], nan_ok=True)


def test_an_unreadable_image_is_not_drawn(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another would stand under its name."""
    data = tiny.write_images(tmp_path, {"data": 4}, 16) / "data"
    (data / "1.png").write_bytes(b"nothing")
    shown: dict[str, Any] = {}
    monkeypatch.setattr("maekit.tasks.reconstruct.draw", lambda rows, path, **more: shown.update(more))
    assert cli.main(["reconstruct", str(source), "--data", str(data), "--device", "cpu"]) == 0
    assert shown["row_labels"] == ["0.png", "2.png", "3.png"] and not shown["note"]


def test_the_panel_shows_the_worst(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its skill beside its name, under its first mask; without --scores a few that stay the same."""
    data = tiny.write_images(tmp_path / "data", {"cat": 12}, 16)
    shown: dict[str, Any] = {}
    monkeypatch.setattr("maekit.tasks.reconstruct.draw", lambda rows, path, **more: shown.update(more, rows=rows))
    assert score(source, data, tmp_path / "s.parquet", "--masks-per-image", "2") == 0
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()[:8]
    assert shown["row_labels"] == [f"{row['skill']:.2f} {row['path']}" for row in rows]
    for row, picture in zip(rows, shown["rows"], strict=True):
        original = np.asarray(Image.open(data / row["path"]))[:, :, None] / 255
        assert np.allclose(picture.original, original, atol=1e-6)
        sample_id = sorted(os.listdir(data / "cat")).index(Path(row["path"]).name)
        masks = make_masks("random", GRID, 0.75, [sample_id], seed=0, purpose=Purpose.HELDOUT_MASK)
        hidden_N = (picture.masked == 0.5).reshape(4, 4, 4, 4).all(axis=(1, 3)).reshape(-1)
        assert sorted(masks.ids_masked_BM[0].tolist()) == hidden_N.nonzero()[0].tolist()
    assert shown["note"].startswith("of 12 images those whose loss is the most above")


def test_an_earlier_file_stays_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then under a numbered name, where it said something else."""
    data = tiny.write_images(tmp_path / "data", PARTS, 16)
    out = tmp_path / "s.csv"
    out.write_text("mine")

    def stopped(*_: Any, **__: Any) -> Any:
        assert len(os.listdir(tmp_path)) == 3, "the new one is begun"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maekit.tasks.reconstruct.write_scores", stopped)
        assert score(source, data, out) == 130
    assert sorted(os.listdir(tmp_path)) == ["data", "s.csv"] and out.read_text() == "mine"
    assert score(source, data, out) == 0
    assert (tmp_path / "s-1.csv").read_text() == "mine" and len(out.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scores", "s.csv", "--image", "x.png"], "--scores s.csv: give --data D, the images to score"),
        (["--scores", "s.csv"], "--scores s.csv: give --data D, the images to score"),
        (["--scores", "s.txt", "--data", "digits"], "--scores s.txt: name a file that ends in .parquet or .csv"),
        (["--masks-per-image", "0", "--data", "digits"], "--masks-per-image 0: must be at least 1"),
        (["--masks-per-image", "2", "--image", "x.png"], "--masks-per-image 2: goes with --data D"),
        (["--scores", "nowhere/file/s.csv", "--data", "digits"], "--scores nowhere/file/s.csv: cannot be written"),
    ],
)
def test_wrong_flags_give_one_sentence(
    words: list[str],
    said: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nowhere").write_text("a file where a folder should be")
    assert cli.main(["reconstruct", str(source), *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"maekit: error: {said}") and error.count("\n") == 1
