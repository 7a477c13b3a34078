"""Images with annotations: every layout, every form of numbers, both numberings."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shared_data
from image_files import png_chunk
from pair_files import RNG, SIZE_HW, ade, annotation, picture, refusal
from PIL import Image

from maekit.data.annotations import Numbering, read_values
from maekit.data.pairs import VOID, check_pairs, open_pairs
from maekit.data.pixels import BadImage, upright

# ---- numbers ----


def test_numberings_by_hand() -> None:
    values = np.array([[0, 1, 2, 3]], np.uint8)
    assert Numbering(0, 3).ids(values).tolist() == [[VOID, 0, 1, 2]]
    assert Numbering(None, 4).ids(values).tolist() == [[0, 1, 2, 3]]
    assert Numbering(255, 4).ids(np.array([[0, 3, 255]], np.uint8)).tolist() == [[0, 3, VOID]]
    assert Numbering(3, 3).ids(values).tolist() == [[0, 1, 2, VOID]]
    assert Numbering(0, 400).ids(np.array([[0, 400]], np.uint16)).tolist() == [[VOID, 399]]


@pytest.mark.parametrize(
    ("numbering", "values", "words"),
    [
        (Numbering(0, 3), [0, 1, 4, 4], "4 (2 pixels); 1..3 are classes, 0 is void (--void 0)"),
        (Numbering(None, 3), [0, 3, 9], "3 (1 pixels), 9 (1 pixels); 0..2 are classes, no value is void"),
        (Numbering(255, 3), [2, 3, 255], "3 (1 pixels); 0..2 are classes, 255 is void (--void 255)"),
        (Numbering(0, 3), [0, 255], "if 255 is void: --void 255"),
    ],
)
def test_values_of_no_class_are_named_and_counted(numbering: Numbering, values: list[int], words: str) -> None:
    with pytest.raises(BadImage) as caught:
        numbering.ids(np.array([values], np.uint8))
    assert words in str(caught.value)


def gray_png(values: np.ndarray[Any, Any], bits: int) -> bytes:
    """A grayscale PNG of 1, 2, 4, 8 or 16 bits, byte by byte."""
    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_numbers_are_read_as_they_are_stored(bits: int) -> None:
    values = RNG.integers(0, 2**bits, (5, 7))
    assert np.array_equal(read_values(gray_png(values, bits)), values)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_palette_is_ignored(kind: str) -> None:
    values = RNG.integers(0, 12, (5, 7)).astype(np.uint8)
    image = Image.fromarray(values)
    image.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, kind)
    assert np.array_equal(read_values(buffer.getvalue()), values)


def test_sixteen_bits_in_tiff() -> None:
    values = RNG.integers(0, 2000, (5, 7)).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    assert np.array_equal(read_values(buffer.getvalue()), values)


# ---- layouts ----


@pytest.mark.parametrize(
    ("names", "annotated"),
    [(("training", "validation"), "annotations"), (("train", "val"), "masks"), (("Train",), "labels"), ((), "masks")],
)
def test_ade20k_layout(tmp_path: Path, names: tuple[str, ...], annotated: str) -> None:
    values = {}
    for part in names or ("",):
        for name in ("b", "a/c.d"):
            picture(tmp_path / "images" / part / f"{name}.jpg")
            values[part, name] = annotation(tmp_path / annotated / part / f"{name}.png", kind="P")
    (tmp_path / "classes.txt").write_text("void\nsky\nroad\ncar\n")
    pairs = open_pairs(str(tmp_path))
    assert pairs.class_names == ["sky", "road", "car"]
    assert len(pairs.notes) == (not names)  # images/a names no part
    assert (pairs.val is not None) == (len(names) == 2)
    for part, pair_part in zip(names or ("",), pairs.parts.values(), strict=True):
        assert [pair_part.name(i).removeprefix(f"images/{part}").strip("/") for i in (0, 1)] == ["a/c.d.jpg", "b.jpg"]
        for index, name in enumerate(("a/c.d", "b")):
            image, labels = pair_part.read(index)
            assert image.shape == (*SIZE_HW, 3)
            assert image.dtype == np.uint8
            assert labels.dtype == np.int16
            assert np.array_equal(labels, values[part, name].astype(int) - 1)
            assert pair_part.size(index) == SIZE_HW


def test_patterns_with_parts_and_folders(tmp_path: Path) -> None:
    values = {}
    for name in ("train/aachen/x_01", "train/ulm/y_02", "val/bonn/z"):
        picture(tmp_path / f"left/{name}_leftImg.png")
        values[name] = annotation(tmp_path / f"gt/{name}_ids.png", RNG.integers(0, 3, SIZE_HW))
        annotation(tmp_path / f"gt/{name}_color.png")
    pairs = open_pairs(str(tmp_path), void=255, image_pattern="left/{}_leftImg.*", annotation_pattern="gt/{}_ids.png")
    assert pairs.class_names == ["class 0", "class 1", "class 2"]
    assert "counted from the annotations" in pairs.notes[0]
    assert [pairs.train.name(i) for i in range(2)] == [
        "left/train/aachen/x_01_leftImg.png",
        "left/train/ulm/y_02_leftImg.png",
    ]
    assert pairs.val is not None
    assert np.array_equal(pairs.val.read(0)[1], values["val/bonn/z"])


def test_what_belongs_to_no_part_is_said(tmp_path: Path) -> None:
    """Words of parts as tables have them; a pattern that reaches beyond the parts is refused, folders are noted."""
    root = ade(tmp_path / "a", ("train", "valid", "extra"))
    pairs = open_pairs(str(root))
    assert set(pairs.parts) == {"train", "val"} and len(pairs.train) == 3
    assert any("images/ has extra: left out" in note for note in pairs.notes)
    patterns: dict[str, Any] = {"image_pattern": "images/{}.jpg", "annotation_pattern": "annotations/{}.png"}
    words = refusal(lambda: open_pairs(str(root), **patterns))
    assert "images/train/" in words and "images/extra/" in words and "of no part" in words
    shutil.rmtree(root / "images" / "extra")
    assert set(open_pairs(str(root), **patterns).parts) == {"train", "val"}

    flat = ade(tmp_path / "b", ("first", "second"))
    pairs = open_pairs(str(flat))
    assert len(pairs.train) == 6 and any("no part is called so" in note for note in pairs.notes)
    years = open_pairs(str(ade(tmp_path / "d", ("train2017", "val2017"))))
    assert {part: len(pairs) for part, pairs in years.parts.items()} == {"train": 3, "val": 3}
    picture(tmp_path / "c" / "train.jpg")  # a file, not a folder, of a part's name
    picture(tmp_path / "c" / "other.jpg")
    for name in ("train", "other"):
        annotation(tmp_path / "c" / f"{name}.png")
    assert len(open_pairs(str(tmp_path / "c"), image_pattern="{}.jpg", annotation_pattern="{}.png").train) == 2


@pytest.mark.parametrize("exact", ["annotation", "image"])
def test_patterns_in_one_folder(tmp_path: Path, exact: str) -> None:
    """{}.png matches a_mask.png too, which is the other pattern's."""
    ends = {"image": "", "annotation": "_mask"} if exact == "annotation" else {"image": "_rgb", "annotation": ""}
    for name in ("a", "b"):
        picture(tmp_path / f"{name}{ends['image']}.png")
        annotation(tmp_path / f"{name}{ends['annotation']}.png", np.full(SIZE_HW, 2))
    kinds = {kind: "{}" + end + ".png" for kind, end in ends.items()}
    pairs = open_pairs(str(tmp_path), image_pattern=kinds["image"], annotation_pattern=kinds["annotation"])
    assert len(pairs.train) == 2
    assert (pairs.train.read(1)[1] == 1).all()


def test_extra_annotations_are_a_note(tmp_path: Path) -> None:
    ade(tmp_path)
    annotation(tmp_path / "annotations" / "training" / "more.png")
    assert "1 annotations have no image" in open_pairs(str(tmp_path)).notes[0]


def encoded(array: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def table(path: Path, rows: int, first: str = "image", second: str = "annotation") -> list[np.ndarray[Any, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    masks = [RNG.integers(0, 4, SIZE_HW, np.uint8) for _ in range(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": encoded(RNG.integers(0, 256, (*SIZE_HW, 3), np.uint8)), "path": None} for _ in masks]
    others = [{"bytes": encoded(mask), "path": None} for mask in masks]
    pq.write_table(pa.table({first: pa.array(images, kind), second: pa.array(others, kind)}), path)
    return masks


@pytest.mark.parametrize("columns", [("image", "annotation"), ("label", "pixels"), ("one", "two")])
def test_parquet(tmp_path: Path, columns: tuple[str, str]) -> None:
    masks = table(tmp_path / "data" / "train-00000-of-00002.parquet", 2, *columns)
    masks += table(tmp_path / "data" / "train-00001-of-00002.parquet", 1, *columns)
    held = table(tmp_path / "data" / "validation-00000-of-00001.parquet", 2, *columns)
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    asked: dict[str, Any] = {"image_column": "label", "annotation_column": "pixels"} if columns[0] == "label" else {}
    pairs = open_pairs(str(tmp_path), **asked)
    assert (len(pairs.train), len(pairs.val or [])) == (3, 2)
    for index, mask in enumerate(masks):
        assert np.array_equal(pairs.train.read(index)[1], mask.astype(int) - 1)
    assert pairs.val is not None
    assert np.array_equal(pairs.val.read(1)[1], held[1].astype(int) - 1)
    assert pairs.train.annotation_name(2) == f"row 2, column {columns[1]}"
    check_pairs(pairs)
    again = pickle.loads(pickle.dumps(pairs.train))
    assert np.array_equal(again.read(2)[1], pairs.train.read(2)[1])


def test_an_annotation_column_before_the_images_is_known_by_its_name(tmp_path: Path) -> None:
    masks = table(tmp_path / "x.parquet", 1, "photo", "mask")
    stored = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(stored.select(["mask", "photo"]), tmp_path / "x.parquet")
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    assert np.array_equal(open_pairs(str(tmp_path / "x.parquet")).train.read(0)[1], masks[0].astype(int) - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "imagge"}, "--image-column imagge: not in"),
        ({"image_column": "image", "annotation_column": "image"}, "are both image"),
        ({"annotation_column": "number"}, "not encoded images"),
    ],
)
def test_parquet_columns_that_do_not_fit(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    table(tmp_path / "x.parquet", 1)
    stored = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(stored.append_column("number", pa.array([1])), tmp_path / "x.parquet")
    assert words in refusal(lambda: open_pairs(str(tmp_path / "x.parquet"), **options))
    pq.write_table(stored.select(["image"]), tmp_path / "x.parquet")
    assert "two image columns are needed" in refusal(lambda: open_pairs(str(tmp_path / "x.parquet")))


# ---- EXIF ----


@pytest.mark.parametrize(
    ("orientation", "drawn_on"),  # of 2, 3 and 4 the sizes do not tell: they are taken as drawn upright
    [*((number, "upright") for number in range(1, 9)), *((number, "stored") for number in (1, 5, 6, 7, 8))],
)
def test_exif_does_not_part_a_pair(tmp_path: Path, orientation: int, drawn_on: str) -> None:
    """The image shows its own class ids, so that a pixel and its class must agree however they were stored."""
    stored = RNG.integers(1, 6, SIZE_HW, np.uint8)
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored * 40).save(tmp_path / "images" / "a.png", exif=exif)
    turned = upright(stored[:, :, None], orientation)[:, :, 0]
    annotation(tmp_path / "annotations" / "a.png", turned if drawn_on == "upright" else stored)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne")
    pairs = open_pairs(str(tmp_path))
    image, labels = pairs.train.read(0)
    assert np.array_equal(image[:, :, 0] // 40, labels + 1)
    assert check_pairs(pairs)["train"].turned == (orientation > 1)


@pytest.mark.parametrize(
    ("text", "void", "names"),
    [
        ("void\na\nb\nc\n", 0, ["a", "b", "c"]),
        ("a\nb\nc", 0, ["a", "b", "c"]),
        ("a\nb\nc\nVoid", 3, ["a", "b", "c"]),
        ("void\na\nb\nc", None, ["void", "a", "b", "c"]),
        ("Idx\tRatio\tVal\tName\n1\t0.1\t4\twall\n2\t0.2\t4\ttower, belfry\n", 0, ["wall", "tower, belfry"]),
    ],
)  # fmt: skip
def test_class_files(tmp_path: Path, text: str, void: int | None, names: list[str]) -> None:
    (ade(tmp_path) / "other.txt").write_text(text)
    assert open_pairs(str(tmp_path), void=void, classes=str(tmp_path / "other.txt")).class_names == names


def test_classes_are_counted_where_no_file_names_them(tmp_path: Path) -> None:
    (ade(tmp_path) / "classes.txt").unlink()
    assert open_pairs(str(tmp_path)).class_names == ["class 1", "class 2", "class 3"]
    assert open_pairs(str(tmp_path), void=None).class_names == ["class 0", "class 1", "class 2", "class 3"]
    values = np.ones(SIZE_HW, np.uint8)
    values[0, 0] = 255
    annotation(tmp_path / "annotations" / "training" / "0.png", values)
    text = refusal(lambda: open_pairs(str(tmp_path)))
    assert "the value 255 (1 pixels) occurs" in text
    assert "--void 255" in text
    assert open_pairs(str(tmp_path), void=255).num_classes == 4


def test_fingerprints_and_pickles(tmp_path: Path) -> None:
    pairs = open_pairs(str(ade(tmp_path)))
    same, other = open_pairs(str(tmp_path)), open_pairs(str(tmp_path), void=None, classes=str(tmp_path / "classes.txt"))
    assert pairs.train.fingerprint == same.train.fingerprint != other.train.fingerprint
    assert pairs.val is not None
    assert pairs.train.fingerprint != pairs.val.fingerprint
    again = pickle.loads(pickle.dumps(pairs.train))
    assert np.array_equal(again.read(0)[1], pairs.train.read(0)[1])
    annotation(tmp_path / "annotations" / "training" / "0.png", RNG.integers(0, 4, (60, 90)))
    assert open_pairs(str(tmp_path)).train.fingerprint != pairs.train.fingerprint


def test_camvid() -> None:
    pairs = open_pairs(str(shared_data("camvid")))
    assert (len(pairs.train), len(pairs.val or [])) == (367, 101)
    assert pairs.num_classes == 11
    assert pairs.class_names[0] == "sky"
    image, labels = pairs.train.read(200)
    assert image.shape == (360, 480, 3)
    with Image.open(pairs.train.annotations.path(200)) as file:  # type: ignore[arg-type]
        assert np.array_equal(np.array(file).astype(int) - 1, labels)
