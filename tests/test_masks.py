"""Masks that are black and white are two classes, whatever they are stored as; every message about void leads out of
the matter and not to the next message; and nobody trains on one class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pairs
from pair_files import SIZE_HW, picture, refusal
from PIL import Image

from maekit import cli
from maekit.config.segmentation import SegmentScoreConfig
from maekit.data.annotations import VOID, counted_class_names, read_values
from maekit.data.images import BadImage
from maekit.data.pairs import check_pairs, open_pairs, refuse_one_class

RNG = np.random.default_rng(11)


def write(root: Path, values: Any, form: str = "L", names: str = "", count: int = 3) -> Path:
    """Images whose annotations hold exactly these values, each mask all of them."""
    for index in range(count):
        picture(root / "images" / f"{index}.png")
        flat = np.resize(np.asarray(values), SIZE_HW[0] * SIZE_HW[1])
        mask = RNG.permutation(flat).reshape(SIZE_HW)
        path = root / "annotations" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        if form == "1":
            Image.fromarray(mask > 0).save(path)
        elif form == "16":
            Image.fromarray(mask.astype(np.uint16)).save(path)
        else:
            Image.fromarray(mask.astype(np.uint8)).convert(form).save(path)
    if names:
        (root / "classes.txt").write_text(names)
    return root


@pytest.mark.parametrize(
    ("values", "form", "names"),
    [
        ([0, 255], "L", ["class 0", "class 255"]),
        ([0, 255], "RGB", ["class 0", "class 255"]),
        ([0, 255], "RGBA", ["class 0", "class 255"]),
        ([0, 65_535], "16", ["class 0", "class 65535"]),
        ([0, 1], "L", ["class 0", "class 1"]),
        ([0, 1], "1", ["class 0", "class 1"]),
    ],
)
def test_black_and_white_are_two_classes(tmp_path: Path, values: list[int], form: str, names: list[str]) -> None:
    pairs = open_pairs(str(write(tmp_path, values, form)))
    assert pairs.class_names == names
    white = values[1]
    assert f"the annotations hold 0 and {white}: two classes, {names[0]} and {names[1]}, and none" in pairs.notes[0]
    check = check_pairs(pairs)["train"]
    assert check.class_pixels.tolist() == [81, 81] and check.void_pixels == 0
    labels = pairs.train.read(0)[1]
    assert np.array_equal(labels, read_values(pairs.train.annotations.path(0)) // white)  # type: ignore[arg-type]
    refuse_one_class(pairs, check, "-")


@pytest.mark.parametrize("white", [1, 255])
def test_names_of_two_classes(tmp_path: Path, white: int) -> None:
    """The first one is black's; by void 0 the first would be all there is, in silence."""
    pairs = open_pairs(str(write(tmp_path, [0, white], names="ground\ncell")))
    assert [pairs.numbering.value(number) for number in range(2)] == [0, white]
    assert pairs.class_names == ["ground", "cell"]
    (tmp_path / "classes.txt").write_text("cell")
    assert f"names one class, 'cell', and the annotations have two, 0 and {white}" in refusal(
        lambda: open_pairs(str(tmp_path))
    )
    (tmp_path / "classes.txt").write_text("void\ncell")
    assert "one class only" in refusal(lambda: open_pairs(str(tmp_path)))


def test_void_that_was_said_stays_void(tmp_path: Path) -> None:
    """And each refusal names a flag that is none."""
    write(tmp_path, [0, 255])
    told = refusal(lambda: open_pairs(str(tmp_path), void=255))
    assert "one class only, 'class 0'" in told and "--void none" in told
    assert open_pairs(str(tmp_path), void=None).class_names == ["class 0", "class 255"]
    told = refusal(lambda: open_pairs(str(tmp_path), void=0, void_is_asked=True))
    assert "--class-values with all that are classes, such as 0 255" in told
    assert open_pairs(str(tmp_path), class_values=(0, 255)).class_names == ["class 0", "class 255"]


def test_a_third_gray_level(tmp_path: Path) -> None:
    """Void between two classes, or a class: the message names both ways, and both are ways."""
    told = refusal(lambda: open_pairs(str(write(tmp_path, [0, 128, 255]))))
    assert "--void 255" in told and "--class-values with all that are classes, such as 0 128 255" in told
    assert "--void 128 where 0 and 255 are two classes" in told
    three = open_pairs(str(tmp_path), class_values=(0, 128, 255))
    assert check_pairs(three)["train"].class_pixels.tolist() == [54, 54, 54]
    two = open_pairs(str(tmp_path), void=128, void_is_asked=True)
    check = check_pairs(two)["train"]
    assert (two.class_names, check.class_pixels.tolist(), check.void_pixels) == (["class 0", "class 255"], [54, 54], 54)
    lacking = open_pairs(str(tmp_path), class_values=(0, 255))
    assert "values that stand for no class: 128" in refusal(lambda: check_pairs(lacking))
    assert "0 and 255 are classes (--class-values), no value is void" in refusal(lambda: check_pairs(lacking))


@pytest.mark.parametrize(
    ("values", "void", "names"),
    [
        ([0, 1, 2, 3], 0, ["class 1", "class 2", "class 3"]),  # ADE20K, CamVid
        ([0, 1, 2, 255], 255, ["class 0", "class 1", "class 2"]),  # PASCAL VOC, Cityscapes
        ([0, 1, 255], 255, ["class 0", "class 1"]),
        ([1, 2], 0, ["class 1", "class 2"]),
        ([0, 2], None, ["class 0", "class 1", "class 2"]),
    ],
)
def test_the_numbering_of_known_data_sets_stays(
    tmp_path: Path, values: list[int], void: int | None, names: list[str]
) -> None:
    pairs = open_pairs(str(write(tmp_path, values)), void=void)
    assert (pairs.class_names, pairs.numbering.void, pairs.numbering.values) == (names, void, None)
    assert repr(pairs.numbering) == f"Numbering(void={void}, num_classes={len(names)})", "part of a run's fingerprint"


def test_smoothed_edges_are_no_classes() -> None:
    values = np.zeros(65_536, np.int64)
    values[[0, 255]] = 6000, 3000
    values[1:255] = 2
    assert "numpy.where(mask > 127, 255, 0)" in refusal(lambda: counted_class_names(values, 0, "-"))
    values[1:255] = 200
    assert len(counted_class_names(values, 0, "-")) == 255


@pytest.mark.parametrize(("values", "names"), [([0, 200], ""), ([1], "ground\ncell"), ([0, 1], "void\nground\ncell")])
def test_nobody_trains_on_one_class(tmp_path: Path, values: list[int], names: str) -> None:
    pairs = open_pairs(str(write(tmp_path, values, names=names)))
    told = refusal(lambda: refuse_one_class(pairs, check_pairs(pairs)["train"], "x"))
    assert f"(value {values[-1]}), so there is nothing to tell apart" in told


def test_flags_that_cannot_be() -> None:
    for values in ((0,), (1, 1), (0, 70_000), (-1, 3)):
        (problem,) = SegmentScoreConfig(class_values=values).problems()
        assert problem.startswith("--class-values")


def test_a_run_on_black_and_white_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """check-data, training, its resumption, score and prediction speak of the same two classes."""
    tiny_pairs.leave_pictures_out(monkeypatch)
    place = tiny_pairs.make_place(tmp_path)
    for path in (place / "data" / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 2, np.uint8(255), np.uint8(0))).save(path)
    (place / "data" / "classes.txt").unlink()
    capsys.readouterr()
    assert cli.main(["check-data", "--data", str(place / "data"), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "annotations of train" in said and "class 255 (value 255)" in said
    run = tmp_path / "mine"
    assert tiny_pairs.train(place, run) == 0
    assert "the annotations hold 0 and 255: two classes, class 0 and class 255" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert (config["void"], config["class_values"]) == ("none", [0, 255])
    assert cli.main(["resume", str(run)]) == 0
    assert cli.main(["segment", str(run), "--eval", "--workers", "0", "--device", "cpu"]) == 0
    assert list(tiny_pairs.card(run)["score"]["classes"]) == list(
        tiny_pairs.card(run, "score.json")["score"]["classes"]
    )
    images = place / "data" / "images" / "validation"
    words = ["segment", str(run), "--predict", str(images), "--out", str(tmp_path / "masks"), "--device", "cpu"]
    capsys.readouterr()
    assert cli.main([*words, "--no-overlays"]) == 0
    assert "0 class 0, 255 class 255" in capsys.readouterr().out
    masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "masks").iterdir())]
    assert masks and set(np.unique(masks)) <= {0, 255}
    assert VOID not in masks[0]


def test_a_mask_with_one_transparent_pixel_has_no_gray_levels(tmp_path: Path) -> None:
    """What lies under it is nobody's class."""
    values = np.zeros((4, 5, 4), np.uint8)
    values[..., 3] = 255
    Image.fromarray(values).save(tmp_path / "opaque.png")
    assert not read_values(str(tmp_path / "opaque.png")).any()
    values[2, 3, 3] = 254
    Image.fromarray(values).save(tmp_path / "hole.png")
    with pytest.raises(BadImage, match="mode RGBA with transparent pixels"):
        read_values(str(tmp_path / "hole.png"))


def test_other_values_for_the_classes_are_other_data(tmp_path: Path) -> None:
    """A run must not go on with its classes the other way round."""
    root = str(write(tmp_path, [0, 128, 255]))
    one, other = (open_pairs(root, class_values=values) for values in ((0, 128, 255), (255, 128, 0)))
    assert one.train.fingerprint != other.train.fingerprint
