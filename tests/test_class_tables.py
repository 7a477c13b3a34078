"""What stands for a class on disk: tables of values and of colours, and what 0 means where nobody says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pair_files import RNG, SIZE_HW, annotation, picture, refusal
from PIL import Image

from maekit.config.segmentation import PairsConfig
from maekit.data.pairs import Pairs, check_pairs, open_checked, open_pairs

COLOURS = {"sky": (128, 128, 128), "road": (128, 64, 128), "Void": (0, 0, 0), "car": (64, 0, 128)}


def coloured(root: Path, kind: str = "RGB", table: str = "class_dict.csv") -> np.ndarray:
    """Masks of the four colours; returns the places of the last one's colours."""
    colours = np.array(list(COLOURS.values()), np.uint8)
    for name in "ab":
        picture(root / f"images/{name}.png")
        places = RNG.integers(0, 4, SIZE_HW)
        image = Image.fromarray(colours[places])
        (root / "masks").mkdir(exist_ok=True)
        (image.quantize(16) if kind == "P" else image.convert(kind)).save(root / f"masks/{name}.png")
    lines = [f"{name},{','.join(map(str, colour))}" for name, colour in COLOURS.items()]
    (root / table).write_text("\n".join(["name, r, g, b", *lines]) + "\n")
    return places


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_a_table_of_colours(tmp_path: Path, kind: str) -> None:
    """Also of a palette, whose order is the program's that wrote it."""
    places = coloured(tmp_path, kind)
    pairs = open_pairs(str(tmp_path))
    assert pairs.class_names == ["sky", "road", "car"]
    assert np.array_equal(pairs.train.read(1)[1], np.array([0, 1, -1, 2])[places])
    check = check_pairs(pairs)["train"]
    assert check.void_pixels > 0 and check.class_pixels.sum() + check.void_pixels == 2 * places.size
    again = open_pairs(str(tmp_path), void=3, void_is_asked=True)  # as a run's config says it
    assert again.train.fingerprint == pairs.train.fingerprint
    table = tmp_path / "class_dict.csv"
    heading, sky, road, *rest = table.read_text().splitlines()
    table.write_text("\n".join([heading, road, sky, *rest]))
    assert open_pairs(str(tmp_path)).train.fingerprint != pairs.train.fingerprint, "other classes are other data"
    assert "--void and --class-values are for numbers" in refusal(
        lambda: open_pairs(str(tmp_path), void=0, void_is_asked=True)
    )


def test_colours_that_the_table_lacks(tmp_path: Path) -> None:
    coloured(tmp_path, table="mine.csv")
    words = refusal(lambda: open_pairs(str(tmp_path)))
    assert "masks/a.png: mode RGB where one number" in words and "with the columns name, r, g, b" in words
    assert "(128, 64, 128): 3" in words, "the colours that are there"
    text = (tmp_path / "mine.csv").read_text()
    (tmp_path / "mine.csv").write_text("\n".join(line for line in text.splitlines() if "road" not in line))
    pairs = open_pairs(str(tmp_path), classes=str(tmp_path / "mine.csv"))
    words = refusal(lambda: check_pairs(pairs))
    assert "1 colours that the table does not have: (128, 64, 128)" in words
    (tmp_path / "mine.csv").write_text(text + "sea,128,64,128\n")
    words = refusal(lambda: open_pairs(str(tmp_path), classes=str(tmp_path / "mine.csv")))
    assert "line 6 (sea, 128, 64, 128) repeats" in words


def test_photographs_are_not_taken_for_colours_of_classes(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        picture(tmp_path / kind / "a.png", (20, 20))
    assert "so they are pictures" in refusal(lambda: open_pairs(str(tmp_path)))


def test_a_table_of_values(tmp_path: Path) -> None:
    """Roboflow's, in the folder of the training part; 0 is a class because it says so."""
    for part in ("train", "valid"):
        picture(tmp_path / part / "a.jpg")
        annotation(tmp_path / part / "a_mask.png", RNG.integers(0, 3, SIZE_HW))
    table = tmp_path / "train" / "_classes.csv"
    table.write_text("Pixel Value, Class\n0, background\n1, cell\n2, nucleus\n")
    pairs = open_pairs(str(tmp_path))
    assert pairs.class_names == ["background", "cell", "nucleus"]
    assert (pairs.numbering.void, pairs.numbering.values) == (None, None)
    table.write_text("Pixel Value, Class\n0, void\n2, nucleus\n1, cell\n")
    pairs = open_pairs(str(tmp_path))
    assert (pairs.class_names, pairs.numbering.void, pairs.numbering.values) == (["nucleus", "cell"], 0, (2, 1))
    assert np.array_equal(pairs.train.read(0)[1], np.array([-1, 1, 0])[pairs.train.values(0)])
    table.write_text("Pixel Value, Class\nzero, void\n")
    assert "line 2 is not a name with its numbers: zero, void" in refusal(lambda: open_pairs(str(tmp_path)))


def counted(root: Path, values: list[int], names: str = "") -> Pairs:
    picture(root / "images" / "a.png")
    annotation(root / "masks" / "a.png", np.resize(values, SIZE_HW))
    (root / "classes.txt").unlink(missing_ok=True)
    if names:
        (root / "classes.txt").write_text(names)
    return open_checked(str(root), PairsConfig(), in_chans=3, workers=0)[0]


def test_a_first_line_called_background_is_zero(tmp_path: Path) -> None:
    """By void 0 it would stand for value 1, each class for its neighbour's pixels, and the last for none."""
    pairs = counted(tmp_path, [0, 1, 2], "Background\ncell\nnucleus")
    assert [pairs.numbering.value(number) for number in range(3)] == [0, 1, 2] and pairs.numbering.void is None
    assert "value 0 is 'Background'" in pairs.notes[0]
    above = counted(tmp_path, [0, 1, 2, 3], "Background\ncell\nnucleus")
    assert [above.numbering.value(number) for number in range(3)] == [1, 2, 3], "0 has no line of its own"
    never = counted(tmp_path, [1, 2], "Background\ncell\nnucleus")
    assert never.numbering.void == 0, "0 does not occur"


def test_what_the_default_for_void_leaves_out_is_said(tmp_path: Path) -> None:
    (note,) = [note for note in counted(tmp_path, [0, 0, 1, 2]).notes if "void" in note]
    assert note.startswith("value 0 (51.9% of the pixels) is void, of no class, and 'class 1' is value 1")
    assert "--void none" in note
    shifted = counted(tmp_path, [0, 1, 2], "grass\ncell\nnucleus").notes[-1]
    assert "no pixel has value 3, 'nucleus', so check that" in shifted
    assert not any("void" in note for note in counted(tmp_path, [0, 1, 2], "void\ncell\nnucleus").notes)
    assert not any("void" in note for note in counted(tmp_path, [1, 2], "cell\nnucleus").notes)


@pytest.mark.parametrize(("values", "advice"), [([0, 50, 100, 150], "50 100 150 --void 0"), ([7, 240], "7 240")])
def test_values_that_do_not_count_the_classes(tmp_path: Path, values: list[int], advice: str) -> None:
    """150 classes, 147 of them in no pixel."""
    words = refusal(lambda: counted(tmp_path, values))
    assert f"give --class-values {advice} where they stand for classes, or --classes FILE" in words
    first, *rest = advice.split(" --void ")
    asked = PairsConfig(class_values=tuple(map(int, first.split())), void=rest[0] if rest else None)
    assert open_checked(str(tmp_path), asked, in_chans=3, workers=0)[0].num_classes == len(first.split())
