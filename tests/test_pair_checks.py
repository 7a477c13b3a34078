"""Every mistake in images with annotations is named before training, and what is counted is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import png16
from pair_files import RNG, SIZE_HW, ade, annotation, picture, refusal
from PIL import Image

from maekit.data.annotations import read_values
from maekit.data.pairs import VOID, Pairs, check_pairs, open_pairs
from maekit.data.pixels import BadImage

# ---- the check ----


def counted_slowly(pairs: Pairs, part: str, ids: Sequence[int] | None = None) -> tuple[list[int], int]:
    pixels, void = [0] * pairs.num_classes, 0
    for index in range(len(pairs.parts[part])) if ids is None else ids:
        flat = pairs.parts[part].read(index)[1].ravel().tolist()
        for label in flat:
            void += label == VOID
            if label != VOID:
                pixels[label] += 1
    return pixels, void


@pytest.mark.parametrize("workers", [0, 2])
def test_check_counts(tmp_path: Path, workers: int) -> None:
    pairs = open_pairs(str(ade(tmp_path, count=20, classes=4)))
    seen: list[tuple[int, int]] = []
    found = check_pairs(pairs, workers=workers, on_progress=lambda done, total: seen.append((done, total)))
    for part in ("train", "val"):
        one = found[part]
        assert (one.class_pixels.tolist(), one.void_pixels) == counted_slowly(pairs, part)
        some = pairs.parts[part].class_pixels([3, 0, 7])
        assert some.tolist() == counted_slowly(pairs, part, [3, 0, 7])[0]
        assert one.checked == 20
    assert seen == [(16, 40), (20, 40), (36, 40), (40, 40)]


def spoil(root: Path, how: str) -> None:
    """Damage one annotation of the training part."""
    path = root / "annotations" / "training" / "1.png"
    values = np.ones(SIZE_HW, np.uint8)
    if how == "value":
        values[2, 3:5] = 77
        annotation(path, values)
    elif how == "size":
        annotation(path, np.ones((6, 8)))
    elif how == "turned":
        annotation(path, values.T)
    elif how == "colours":
        Image.fromarray(RNG.integers(0, 256, (*SIZE_HW, 3), np.uint8)).save(path)
    elif how == "16-bit colours":
        path.write_bytes(png16(np.full((*SIZE_HW, 3), 300)))
    elif how == "alpha":
        Image.fromarray(RNG.integers(0, 256, (*SIZE_HW, 4), np.uint8)).save(path)
    elif how == "gif":
        Image.fromarray(values).save(path, "GIF")
    elif how == "jpeg":
        Image.fromarray(values).save(path, "JPEG")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "float":
        Image.fromarray(values.astype(np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("value", "values that stand for no class: 77 (2 pixels); 1..3 are classes"),
        ("size", "6 x 8 pixels where its image has 6 x 9"),
        ("turned", "9 x 6 pixels where its image has 6 x 9"),
        ("colours", "mode RGB where one number to a pixel is expected, as if it showed classes by colours"),
        ("alpha", "mode RGBA with transparent pixels where one number"),
        ("16-bit colours", "mode RGB"),
        ("gif", "GIF, which does not keep numbers"),
        ("jpeg", "JPEG, which does not keep numbers"),
        ("truncated", "truncated"),
        ("empty", "empty file"),
        ("float", "mode F"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_told_before_training(tmp_path: Path, how: str, words: str) -> None:
    pairs = open_pairs(str(ade(tmp_path)))
    spoil(tmp_path, how)
    text = refusal(lambda: check_pairs(pairs))
    first, second = text.splitlines()[:2]
    assert "1 of 6 annotations cannot be used" in first
    assert second.startswith("annotations/training/1.png: ")
    assert words in second
    assert ("to convert an annotation from colours to numbers" in text) == ("RGB" in second or "mode F" in second)
    with pytest.raises(BadImage, match=r"annotations/training/1\.png"):
        pairs.train.read(1)


def test_the_advice_for_colours_works(tmp_path: Path) -> None:
    """The lines that the error prints, run as they stand."""
    pairs = open_pairs(str(ade(tmp_path)))
    path = tmp_path / "annotations" / "training" / "1.png"
    wanted = RNG.integers(0, 3, SIZE_HW)
    colours = {(128, 64, 128): 1, (70, 70, 70): 2}
    palette = np.array([(9, 9, 9), *colours], np.uint8)
    Image.fromarray(palette[wanted]).save(path)
    lines = [line.strip() for line in refusal(lambda: check_pairs(pairs)).splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join(lines), {"numpy": np, "Image": Image, "colours": colours, "file": path, "new_file": path})
    assert np.array_equal(read_values(str(path)), wanted)


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    pairs = open_pairs(str(ade(tmp_path, ("training",), count=30, classes=2)))
    lines = refusal(lambda: check_pairs(pairs)).splitlines()
    assert "30 of 30" in lines[0]
    assert lines[-1] == "... and 18 more"
    assert len(lines) == 14


def test_images_that_cannot_be_read_are_named_but_stop_nothing(tmp_path: Path) -> None:
    pairs = open_pairs(str(ade(tmp_path)))
    (tmp_path / "images" / "training" / "2.jpg").write_bytes(b"no image")
    found = check_pairs(pairs)["train"]
    assert found.bad_images == [(2, "not an image")]
    assert found.checked == 2
    with pytest.raises(BadImage):
        pairs.train.read(2)
    for index in range(3):
        (tmp_path / "images" / "training" / f"{index}.jpg").write_bytes(b"")
    assert "no image of the train part can be read" in refusal(lambda: check_pairs(pairs))


def test_only_void_is_nothing_to_train_on(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    annotation(tmp_path / "annotations" / "a.png", np.zeros(SIZE_HW))
    assert "every annotated pixel is void" in refusal(lambda: open_pairs(str(tmp_path)))
    (tmp_path / "classes.txt").write_text("a\nb")
    assert "every pixel of the train part is void" in refusal(lambda: check_pairs(open_pairs(str(tmp_path))))


# ---- what cannot be opened ----


def rename(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            lambda r: (r / "annotations/training/1.png").unlink(),
            {},
            "1 of 3 images have no annotation in annotations/t",
        ),
        (lambda r: (r / "annotations/training/1.png").unlink(), {}, "such as images/training/1.jpg"),
        (
            lambda r: [p.rename(p.with_stem(f"x{p.stem}y")) for p in [*(r / "annotations/training").iterdir()]],
            {},
            "no common names: images/training has images/training/0.jpg, annotations/training has annotat",
        ),
        (lambda r: rename(r, "annotations/training", "annotations/other"), {}, "no annotations for images/training"),
        (lambda r: rename(r, "images/training", "images/test"), {}, "no training/"),
        (lambda r: rename(r, "images/validation", "images/train"), {}, "both the train part"),
        (
            lambda r: rename(r, "annotations", "truth"),
            {},
            "neither images/ and masks/ (or annotations/, labels/), also below",
        ),
        (lambda r: picture(r / "images/training/1.png"), {}, "have one name"),
        (lambda r: (r / "classes.txt").write_text("a\n\nb"), {}, "line 2 is blank"),
        (lambda r: (r / "classes.txt").write_text("\n"), {}, "no class names in it"),
        (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe\xfa"), {}, "not UTF-8"),
        (lambda r: None, {"classes": "nowhere.txt"}, "--classes nowhere.txt: the class names cannot be read"),
        (lambda r: None, {"void": 2}, "--void 2: lies among the 3 classes"),
        (lambda r: None, {"void": 70_000}, "--void 70000: must lie between"),
        (lambda r: None, {"image_column": "image"}, "--image-column: only for Parquet"),
        (lambda r: None, {"image_pattern": "{}.jpg"}, "only one of them is given"),
        (lambda r: None, {"image_pattern": "a.jpg", "annotation_pattern": "{}.png"}, "needs one {}"),
        (lambda r: None, {"image_pattern": "no/{}.jpg", "annotation_pattern": "{}.png"}, "no folder no in"),
        (
            lambda r: None,
            {"image_pattern": "images/{}.tga", "annotation_pattern": "annotations/{}.png"},
            "no file below",
        ),
    ],
)
def test_data_that_cannot_be_opened(tmp_path: Path, change: Any, options: dict[str, Any], words: str) -> None:
    change(ade(tmp_path))
    assert words in refusal(lambda: open_pairs(str(tmp_path), **options))


def test_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(lambda: open_pairs(str(tmp_path / "none")))
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    assert "no image among 0 files in images" in refusal(lambda: open_pairs(str(tmp_path)))
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "annotations" / "a.jpg")
    assert "no annotation among 1 files in annotations" in refusal(lambda: open_pairs(str(tmp_path)))
