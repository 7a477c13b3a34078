"""Classes as colours: pictures that hold the numbers, and sheets whose pixels say what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_data
from PIL import Image

from maekit.data.annotations import VOID, Numbering, read_values
from maekit.data.pairs import open_pairs
from maekit.viz import overlays, panels
from maekit.viz.overlays import INK_SHARE, UNKNOWN, WRONG, OverlayRow, draw_overlays, palette, save_index_png

RNG = np.random.default_rng(2)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("count", [1, 2, 11, 150, 255, 1000])
def test_colours_differ_and_void_is_black(count: int) -> None:
    colours = palette(count)
    assert colours.shape == (count + 1, 3)
    assert colours.dtype == np.uint8
    assert not colours[0].any()
    assert len(np.unique(colours, axis=0)) == count + 1
    assert np.array_equal(colours, palette(1000)[: count + 1]), "the first colours depend on the number of classes"


def test_few_colours_are_far_apart() -> None:
    """In CIELAB, which the palette was not made in: at least 25 between any two of 12, where 2.3 can just be seen."""
    from PIL import ImageCms

    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")

    def lab(colours: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        image = ImageCms.applyTransform(Image.fromarray(colours[None]), to_lab)
        assert image is not None
        raw = np.array(image)[0].astype(float)
        raw[:, 0] *= 100 / 255
        raw[:, 1:] = (raw[:, 1:] + 128) % 256 - 128  # signed bytes
        return raw

    places = lab(np.concatenate([palette(12), WRONG[None]]))
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1000 * np.eye(len(places))
    assert apart.min() > 25, apart.round()


def test_more_classes_than_colours_repeat() -> None:
    colours = palette(1030)
    assert np.array_equal(colours[1:7], colours[1025:])


@pytest.mark.parametrize(("classes", "mode"), [(3, "P"), (255, "P"), (256, "I;16"), (5000, "I;16")])
def test_index_pictures_come_back(tmp_path: Path, classes: int, mode: str) -> None:
    labels = RNG.integers(-1, classes, (30, 40)).astype(np.int16)
    labels[0, :2] = (VOID, classes - 1)
    for given in (None, classes):
        path = tmp_path / "deep" / "a.png"
        save_index_png(labels, path, num_classes=given)
        with Image.open(path) as image:
            assert image.mode == mode
            numbers = np.array(image)
        assert np.array_equal(numbers, labels.astype(int) + 1)
        assert np.array_equal(Numbering(0, classes).ids(read_values(str(path))), labels)
    if mode == "P":
        assert np.array_equal(pixels(path), palette(classes)[labels + 1])
    assert [one.name for one in path.parent.iterdir()] == ["a.png"]


def test_one_format_for_a_folder(tmp_path: Path) -> None:
    save_index_png(np.zeros((2, 2), int), tmp_path / "a.png", num_classes=300)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "I;16"
    with pytest.raises(AssertionError):
        save_index_png(np.full((2, 2), 3), tmp_path / "b.png", num_classes=3)
    with pytest.raises(AssertionError):
        save_index_png(np.full((2, 2), -2), tmp_path / "b.png")


def test_predictions_are_annotations_that_open_pairs_reads(tmp_path: Path) -> None:
    """What `--predict` writes can be taken as annotations, as for training on one's own predictions."""
    labels = RNG.integers(-1, 4, (8, 9)).astype(np.int16)
    (tmp_path / "images").mkdir()
    Image.fromarray(RNG.integers(0, 256, (8, 9, 3), np.uint8)).save(tmp_path / "images" / "a.jpg")
    save_index_png(labels, tmp_path / "annotations" / "a.png")
    assert np.array_equal(open_pairs(str(tmp_path)).train.read(0)[1], labels)


# ---- sheets ----


def over(gray: int, colour: Any, share: float = INK_SHARE) -> np.ndarray[Any, Any]:
    return np.round(share * np.asarray(colour, float) + (1 - share) * gray)


def count(sheet: np.ndarray[Any, Any], colour: Any) -> int:
    return int((np.abs(sheet - np.asarray(colour)).max(axis=2) <= 1).sum())


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line that is written."""
    seen: list[str] = []
    put = panels.Words._put

    def watch(self: Any, text: str, *args: Any, **style: Any) -> None:
        seen.append(text)
        put(self, text, *args, **style)

    monkeypatch.setattr(panels.Words, "_put", watch)
    return seen


def test_every_pixel_of_a_sheet_says_what_it_should(tmp_path: Path, words: list[str]) -> None:
    """Gray, 100 x 120: truth class 2 above and void below, prediction class 2 at the left and 4 at the right."""
    image = np.full((100, 120, 3), 90, np.uint8)
    truth, prediction = np.full((100, 120), 2), np.full((100, 120), 2)
    truth[60:], prediction[:, 90:] = VOID, 4
    draw_overlays([(image, truth, prediction)], tmp_path / "o.png", list("abcde"), "a title")
    sheet = pixels(tmp_path / "o.png")
    colours = palette(5)
    swatch = overlays._SWATCH_PX**2
    assert count(sheet, (90, 90, 90)) >= 100 * 120
    assert count(sheet, over(90, colours[3])) == 60 * 120 + 100 * 90
    assert count(sheet, over(90, colours[5])) == 100 * 30
    assert count(sheet, over(90, UNKNOWN)) == 40 * 120
    assert count(sheet, UNKNOWN) == 40 * 120 + swatch  # the error's void, and the legend's
    assert count(sheet, over(90, WRONG, 0.85)) == 60 * 30
    assert count(sheet, over(128, colours[3])) == count(sheet, over(128, colours[5])) == swatch
    assert count(sheet, over(128, colours[1])) == 0, "class a does not occur"
    assert words == [
        "a title", "image", "truth", "prediction", "error", "25.0 % wrong", "c", "e", "wrong", "void, not counted",
    ]  # fmt: skip


def test_large_images_are_shown_smaller_but_counted_whole(tmp_path: Path, words: list[str]) -> None:
    truth = np.zeros((1500, 1200), np.int16)
    prediction = truth.copy()
    prediction[:, 1] = 1  # one column of 1200; of 384 in the smaller picture, where it would be 0.3 %
    row = OverlayRow(np.zeros((1500, 1200, 1), np.float32), truth, prediction, "b/name.jpg")
    draw_overlays([row], tmp_path / "o.png", ["a", "b"], "")
    assert pixels(tmp_path / "o.png").shape[1] < 4 * 480
    assert "0.1 % wrong" in words
    assert "b/name.jpg" in words


def test_without_truth_there_are_two_columns(tmp_path: Path, words: list[str]) -> None:
    row = (RNG.random((50, 40, 2)), None, RNG.integers(0, 3, (50, 40)))
    draw_overlays([row, row], tmp_path / "o.png", list("abc"), "predictions")
    note = "images of 2 channels, shown as red and green"
    assert words == ["predictions", note, "image", "prediction", "a", "b", "c"]


def test_a_row_without_truth_among_others_stays_blank(tmp_path: Path, words: list[str]) -> None:
    labels, image = np.zeros((100, 100), int), np.zeros((100, 100, 3), np.uint8)
    draw_overlays([(image, None, labels), (image, labels, labels)], tmp_path / "o.png", ["a"], "")
    assert words == ["image", "truth", "prediction", "error", "0.0 % wrong", "a", "wrong"]
    assert count(pixels(tmp_path / "o.png"), over(0, palette(1)[1])) == 3 * 100 * 100


def test_many_classes_and_long_names_fit(tmp_path: Path, words: list[str]) -> None:
    labels = np.arange(100 * 150).reshape(100, 150) % 150
    names = [f"a class with quite a long name, number {i}" for i in range(150)]
    draw_overlays([(np.zeros((100, 150, 3)), labels, labels)], tmp_path / "o.png", names, "t" * 300)
    assert "... 90 more" in words
    sheet = pixels(tmp_path / "o.png")
    assert (sheet[:, -panels.MARGIN_PX // 2 :] == 255).all(), "something runs over the margin"


@pytest.mark.parametrize("rows", [[], [(np.zeros((4, 5, 3)), np.zeros((4, 4), int), np.zeros((4, 5), int))]])
def test_wrong_rows_are_our_mistake(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(AssertionError):
        draw_overlays(rows, tmp_path / "o.png", ["a"], "")
    assert not list(tmp_path.iterdir())


def test_camvid(tmp_path: Path) -> None:
    pairs = open_pairs(str(shared_data("camvid")))
    assert pairs.val is not None
    image, labels = pairs.val.read(0)
    draw_overlays([OverlayRow(image, labels, np.maximum(labels, 0), "0")], tmp_path / "o.png", pairs.class_names, "x")
    assert pixels(tmp_path / "o.png").shape[1] > 4 * 480
