"""Annotation images: one class to a pixel, read as numbers and never interpolated, recoloured or rescaled.

Legend: H height, W width, K classes. Two numberings meet here. On disk: the pixel values of the files. In memory: class
ids 0..K-1 and VOID for pixels that belong to no class, which neither a loss nor a metric counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maekit.config import UserError
from maekit.data import dicom
from maekit.data.images import open_pillow, orientation_of, quiet, raw_mode_of, reading
from maekit.data.parts import part_of, printable
from maekit.data.pixels import BadImage, upright

VOID = -1
"""Class id in memory of a pixel that belongs to no class."""
MAX_CLASSES = 32_767
"""Class ids are held in 16 bits."""
SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp"))
"""Formats that keep a number as it is. JPEG and WebP invent values, GIF renumbers its palette, and
PGM is rescaled as it is read."""

SMOOTHED = 16
"""So many values, of which black and white hold nine tenths of the pixels, are no classes."""
MOST_LISTED = 8
"""Values that a message lists."""

Labels2D = npt.NDArray[np.int16]
Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
TABLES = ("class_dict.csv", "_classes.csv")
"""What a table of classes beside the data is called; also in the folder of the training part (class_tables.py)."""
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
_DIVISORS = {"L;2": 85, "L;4": 17}
"""Raw modes whose numbers Pillow stretches to 0..255 -> the factor by which it does so."""
_EXACT = ("1", "L", "P", "P;1", "P;2", "P;4", "I;16", "I;16B", "I;16N", "I;16L")
_NUMBERS = " where one number to a pixel is expected, as if it showed classes by colours"


class ColourCoded(BadImage):
    """An annotation with colours where numbers are expected; annotation_colours.py helps."""


@dataclass(frozen=True)
class Numbering:
    """How the values on disk stand for class ids: `void` 0: value v is class v - 1; otherwise value v is class v.

    With `values`, these stand for the classes, in their order. With `colours`, annotations are pictures of these
    colours, and the value of a pixel is the place of its colour.
    """

    void: int | None
    num_classes: int
    values: tuple[int, ...] | None = field(default=None, repr=False)
    colours: tuple[Colour, ...] | None = field(default=None, repr=False)

    def ids(self, values_HW: npt.NDArray[Any]) -> Labels2D:
        """Class ids [H, W].

        Raises:
            BadImage: a value that stands for no class; the values and their pixels are named.
        """
        table = self._table()
        found_HW: Labels2D = table[values_HW] if values_HW.dtype == np.uint8 else table[values_HW.astype(np.uint16)]
        if (found_HW == _WRONG).any():
            wrong = np.bincount(values_HW[found_HW == _WRONG])
            listed = ", ".join(f"{value} ({wrong[value]:,} pixels)" for value in np.flatnonzero(wrong)[:6])
            hint = "; if 255 is void: --void 255" if wrong.size == 256 and self.void != 255 else ""
            raise BadImage(f"values that stand for no class: {listed}; {self.rule()}{hint}")
        return found_HW

    def _table(self) -> Labels2D:
        table = np.full(65_536, _WRONG, np.int16)
        table[[self.value(class_id) for class_id in range(self.num_classes)]] = np.arange(self.num_classes)
        if self.void is not None:
            table[self.void] = VOID
        return table

    def value(self, class_id: int) -> int:
        """The value on disk of a class id."""
        return class_id + (self.void == 0) if self.values is None else self.values[class_id]

    def rule(self) -> str:
        """Such as '1..11 are classes, 0 is void (--void 0)'."""
        if self.colours is not None:
            return f"{self.num_classes} colours of the table are classes{'' if self.void is None else ', one is void'}"
        void = "no value is void (--void none)" if self.void is None else f"{self.void} is void (--void {self.void})"
        if self.values is not None:
            return f"{listed(self.values)} are classes (--class-values), {void}"
        return f"{self.value(0)}..{self.value(self.num_classes - 1)} are classes, {void}"


_WRONG = -2


def read_values(data: bytes | str) -> npt.NDArray[Any]:
    """The numbers of an encoded annotation, or of the file at a path: uint8 or uint16 [H, W], as they are stored.

    Of a picture with a palette, the indices; the colours do not matter. One bit: 0 and 1. Of a picture of colours that
    are all gray, such as black and white, its gray levels.

    Raises:
        ColourCoded: more than one number to a pixel, or transparency.
        BadImage: not readable, a lossy format, or numbers that Pillow would rescale.
    """
    with reading(data) as file, quiet:
        file.seek(0)
        image = open_pillow(file)
        if image.format not in ("PNG", "TIFF", "BMP"):
            raise BadImage(f"an annotation as {image.format}, which does not keep numbers as they are; save it as PNG")
        raw_mode = raw_mode_of(image)
        image.info.pop("xmp", None)
        if image.mode in ("RGB", "RGBA", "LA") and ";16" not in raw_mode:
            return _gray_levels(image)
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
            raise ColourCoded(f"mode {image.mode}{_NUMBERS}")
        image.load()
        values = np.array(image)
    if raw_mode in _DIVISORS:
        return values // np.uint8(_DIVISORS[raw_mode])
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "i" and values.size and 0 <= values.min() <= values.max() <= 65_535:
        return values.astype(np.uint16)
    if raw_mode not in _EXACT or values.dtype.kind != "u":
        raise BadImage(f"numbers stored as {raw_mode or image.mode}; save the annotation as an 8- or 16-bit PNG")
    return values.astype(np.uint16) if values.dtype.itemsize > 1 else values


def _gray_levels(image: Any) -> npt.NDArray[np.uint8]:
    """The one number to a pixel of a picture whose colours are all gray and opaque, uint8 [H, W].

    Raises:
        ColourCoded: other colours, or transparency.
    """
    image.load()
    bands = [np.asarray(band) for band in image.split()]
    if image.mode in ("RGBA", "LA") and (bands.pop() != 255).any():
        raise ColourCoded(f"mode {image.mode} with transparent pixels{_NUMBERS}")
    if not all(np.array_equal(bands[0], band) for band in bands[1:]):
        raise ColourCoded(f"mode {image.mode}{_NUMBERS}")
    return bands[0].copy()


def turn_as(image: bytes | str, values_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers that were drawn on the stored pixels of an image, turned upright with it by its EXIF orientation.

    Raises:
        BadImage: the image cannot be read.
    """
    return np.ascontiguousarray(upright(values_HW[:, :, None], orientation(image))[:, :, 0])


def orientation(image: bytes | str) -> int:
    """EXIF orientation 1..8 of an encoded image or the file at a path, 1 where it has none; raises BadImage."""
    with reading(image) as file, quiet:
        file.seek(0)
        head = file.read(dicom.HEAD_BYTES)
        file.seek(0)
        if head.startswith((b"\x93NUMPY", b"II", b"MM")) or dicom.is_dicom(head):
            return 1  # arrays, DICOM, and TIFF, which is upright when it is read
        return orientation_of(open_pillow(file))


# ---- names of classes ----


def read_class_names(path: Path, void: int | None, told: str) -> list[str]:
    """Class names from a text file, one a line; `told` names the flag or the data in messages.

    A line at the void's own place (the first for void 0, else the last, where `void` is its number) that reads void,
    ignore or unlabelled is the void's name, not a class's. ADE20K's own table, objectInfo150.txt, is read too.

    Raises:
        UserError: cannot be read, no name in it, or a blank line between names, which would shift the numbers.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{told} {printable(str(path))}: the class names cannot be read ({reason})") from None
    while lines and not lines[-1]:
        lines.pop()
    if lines and "\t" in lines[0] and lines[0].lower().endswith("\tname"):  # a heading over columns
        lines = [line.rpartition("\t")[2] for line in lines[1:]]
    if "" in lines:
        raise UserError(
            f"{told} {printable(str(path))}: line {lines.index('') + 1} is blank; a line's place is its class's number"
        )
    if lines and void == 0 and lines[0].lower() in VOID_NAMES:
        lines = lines[1:]
    elif lines and void == len(lines) - 1 and lines[-1].lower() in VOID_NAMES:
        lines = lines[:-1]
    if not lines:
        raise UserError(f"{told} {printable(str(path))}: no class names in it; write one to a line")
    if len(lines) > MAX_CLASSES:
        raise UserError(f"{told} {printable(str(path))}: {len(lines):,} lines; at most {MAX_CLASSES:,} classes")
    return [printable(re.sub(r"\s+", " ", line)) for line in lines]


def two_values(values: npt.NDArray[np.int64], void: int | None) -> tuple[int, int] | None:
    """The values of a mask that is black and white: 0 and 1, 0 and 255, or 0 and 65535, where nothing else but void
    occurs; `values` [65536] counts the pixels of each value."""
    occurring = [int(value) for value in np.flatnonzero(values) if value != void]
    if len(occurring) == 2 and occurring[0] == 0 and occurring[1] in (1, 255, 65_535):
        return (0, occurring[1])
    return None


def counted_class_names(values: npt.NDArray[np.int64], void: int | None, told: str) -> list[str]:
    """Names 'class 1', 'class 2', ... up to the highest value; `values` [65536] counts the pixels of each value.

    Raises:
        UserError: only void, too many classes, or a highest value that looks like another void or like a gray level.
    """
    occurring = [int(value) for value in np.flatnonzero(values) if value != void]
    if not occurring and values.any():
        raise UserError(f"{told}: every annotated pixel is void (value {void}); is --void {void} right?")
    assert occurring, "annotations of which none can be read"
    first = 1 if void == 0 else 0
    highest, below = occurring[-1], occurring[-2] if len(occurring) > 1 else -1
    everything = [int(value) for value in np.flatnonzero(values)]
    white = highest if highest in (255, 65_535) else None
    if white and len(everything) >= SMOOTHED and values[0] + values[white] >= 0.9 * values.sum():
        raise UserError(
            f"{told}: 0 and {white} hold {(values[0] + values[white]) / values.sum():.1%} of the pixels, and "
            f"{len(everything) - 2} values between them the rest, as at edges that were smoothed: make "
            f"masks of two values of them, such as by numpy.where(mask > {white // 2}, {white}, 0)"
        )
    if white and below < highest - 1:
        is_class = f"number the classes from {first} on"
        if len(everything) <= MOST_LISTED:
            is_class = f"give --class-values with all that are classes, such as {' '.join(map(str, everything))}"
        between = [value for value in everything if value not in (0, white)]
        if 0 in everything and len(between) == 1:
            is_class += f", or --void {between[0]} where 0 and {white} are two classes and {between[0]} is void"
        raise UserError(
            f"{told}: the value {highest} ({values[highest]:,} pixels) occurs, but none between {max(below, 0)} and "
            f"it: if it is void, give --void {highest}; if it is a class, {is_class}"
        )
    if 1 < len(occurring) <= (highest - first + 1) / 4:
        few = " ".join(map(str, occurring[:32])) + (" ..." if len(occurring) > 32 else "")
        rest = f" --void {void}" if void is not None and values[void] else ""
        raise UserError(
            f"{told}: {len(occurring):,} values between {occurring[0]} and {highest} occur ({few}), so they do not "
            f"count the classes: give --class-values {few}{rest} where they stand for classes, or --classes FILE with "
            f"a line for each number from {first} to {highest} where these few images lack classes; numbers of single "
            "objects are no classes"
        )
    if highest - first >= MAX_CLASSES:
        raise UserError(f"{told}: the value {highest} occurs; at most {MAX_CLASSES:,} classes")
    return [f"class {value}" for value in range(first, highest + 1)]


def listed(values: Sequence[int]) -> str:
    """Such as '0, 128 and 255'."""
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}" if len(values) > 1 else str(values[0])


def find_class_file(root: str, classes: str | None) -> tuple[Path, str] | None:
    """The file of class names and how to speak of it: the one given, or classes.txt or a table beside the data."""
    if classes is not None:
        return Path(os.path.expanduser(classes)), "--classes"
    folder = Path(root)
    trained = sorted(place for place in folder.iterdir() if part_of(place.name) == "train") if folder.is_dir() else []
    beside = [folder / "classes.txt", *(place / name for place in (folder, *trained) for name in TABLES)]
    return next(((file, "--data: the file") for file in beside if file.is_file()), None)


def check_numbering(void: int | None, class_names: Iterable[str], values: tuple[int, ...] | None = None) -> Numbering:
    """The numbering of so many classes, which have these values on disk, if any are given.

    Raises:
        UserError: a void value that is negative, too large, or one of the classes'; another number of values.
    """
    num = len(list(class_names))
    if void is not None and not 0 <= void <= 65_535:
        raise UserError(f"--void {void}: must lie between 0 and 65535, or be none")
    if values is not None and len(values) != num:
        raise UserError(f"--class-values {' '.join(map(str, values))}: {len(values)} values for {num} class names")
    if values is not None and void in values:
        raise UserError(f"--void {void}: is one of --class-values {' '.join(map(str, values))}; give --void none")
    if values is None and void is not None and 0 < void < num:
        raise UserError(
            f"--void {void}: lies among the {num} classes, whose values are 0..{num - 1} where void is not 0; "
            f"give another value, or --void none"
        )
    return Numbering(void, num, values)
