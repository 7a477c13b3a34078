"""Images with annotations: reading them together, and checking all of them before any training.

An annotation lies pixel on pixel on its image. Where EXIF turns an image by a quarter and the annotation has the stored
pixels' size, it was drawn on those and is turned along; in any other case it was drawn on the upright image.
Legend: H height, W width, C channels, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from maekit.config import UserError
from maekit.data.annotation_colours import how_to_convert, read_colours, unpacked, values_of_colours
from maekit.data.annotations import (
    VOID,
    Colour,
    ColourCoded,
    Labels2D,
    Numbering,
    orientation,
    read_values,
    turn_as,
)
from maekit.data.parquet import TablePart
from maekit.data.parts import FilePart, evenly_spaced
from maekit.data.pixels import BadImage, Pixels
from maekit.data.workers import in_order

Counts = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

CHUNK = 16
"""Annotations that a process reads between two reports."""
SHOWN = 12
"""Problems that are told one by one."""
_RESIZE = "to resize an annotation to its image: annotation.resize(image.size, Image.Resampling.NEAREST).save(new_file)"


class OtherSize(BadImage):
    """An annotation of another size than its image."""


class PairPart:
    """One split: the annotation with an image's index belongs to that image."""

    def __init__(
        self, images: FilePart | TablePart, annotations: FilePart | TablePart, numbering: Numbering | None = None
    ) -> None:
        """Without a numbering only the values on disk can be read."""
        assert len(images) == len(annotations), (len(images), len(annotations))
        self.images, self.annotations, self.numbering = images, annotations, numbering

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_chans(self) -> int:
        """Channels of every image that `read` returns."""
        return self.images.in_chans

    def read(self, index: int) -> tuple[Pixels, Labels2D]:
        """The image H W C (uint8 or float32, as `images.decode`) and its class ids H W (int16; VOID: none).

        Raises:
            BadImage: one of the two cannot be read, their sizes differ, or a value stands for no class.
        """
        image_HWC = self.images.read(index)
        try:
            labels_HW = self.labels(index, image_HWC.shape[:2])
        except BadImage as error:
            raise BadImage(f"its annotation {self.annotation_name(index)}: {error}") from error
        return image_HWC, labels_HW

    def labels(self, index: int, size_hw: tuple[int, ...]) -> Labels2D:
        """The class ids of an image of this height and width; raises BadImage."""
        assert self.numbering is not None, "class ids need a numbering"
        return self.numbering.ids(self._fitting(index, size_hw))

    def class_pixels(self, ids: Iterable[int]) -> Counts:
        """[K] Pixels of each class in the annotations of these images, without what cannot be read."""
        total = np.zeros(_classes(self) + 1, np.int64)
        for index in map(int, ids):
            with contextlib.suppress(BadImage):
                total += count_ids(self.labels(index, self.size(index)), _classes(self))
        return total[1:]

    def values(self, index: int) -> npt.NDArray[Any]:
        """The annotation's numbers as they are stored, uint8 or uint16 H W; raises BadImage."""
        colours = None if self.numbering is None else self.numbering.colours
        encoded = _encoded(self.annotations, index)
        return read_values(encoded) if colours is None else values_of_colours(encoded, colours)

    def _fitting(self, index: int, size_hw: tuple[int, ...]) -> npt.NDArray[Any]:
        values_HW = self.values(index)
        if values_HW.shape != size_hw and values_HW.shape == size_hw[::-1]:
            values_HW = turn_as(_encoded(self.images, index), values_HW)
        if values_HW.shape != size_hw:
            (height, width), (its_height, its_width) = values_HW.shape, size_hw
            raise OtherSize(f"{height} x {width} pixels where its image has {its_height} x {its_width}")
        return values_HW

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the upright image in pixels, from the header only; raises BadImage."""
        return self.images.size(index)

    def name(self, index: int) -> str:
        """What to call the pair in a message: the image's path relative to the data, or 'row 17'."""
        return self.images.name(index)

    def annotation_name(self, index: int) -> str:
        """What to call the annotation: its path relative to the data, or the row and the column."""
        of = self.annotations
        return of.name(index) if isinstance(of, FilePart) else f"{of.name(index)}, column {of.column}"

    def is_turned(self, index: int) -> bool:
        """Whether EXIF turns or mirrors the image, so that an annotation may have been drawn on other pixels."""
        return orientation(_encoded(self.images, index)) > 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over those of the images and of the annotations, and over their numbering."""
        words = f"{self.images.fingerprint} {self.annotations.fingerprint} {self.numbering}"
        if self.numbering is not None and self.numbering.values is not None:
            words += f" {self.numbering.values}"
        if self.numbering is not None and self.numbering.colours is not None:
            words += f" {self.numbering.colours}"
        return hashlib.sha256(words.encode()).hexdigest()


def _encoded(part: FilePart | TablePart, index: int) -> bytes | str:
    """The encoded image or the path of its file; raises BadImage."""
    return part.data(index) if isinstance(part, TablePart) else part.path(index)


def count_values(parts: list[PairPart], shown: str, workers: int, on_progress: Progress) -> Counts:
    """Pixels of each value on disk [65536] over all annotations that can be read, by so many processes.

    Raises:
        UserError: none can be read, with the reasons; a process died.
    """
    counts = np.zeros(65_536, np.int64)
    for _, found in _over_all(parts, _count, workers, on_progress):
        counts[: len(found)] += found
    if not counts.any():
        raise UserError(f"--data {shown}: no annotation can be used:", *_none_readable(parts))
    return counts


def _none_readable(parts: list[PairPart]) -> list[str]:
    """Why the first annotations cannot be read, and what to do."""
    lines, coloured = [], False
    for index in range(min(3, len(parts[0]))):
        try:
            parts[0].values(index)
        except BadImage as error:
            lines.append(f"{parts[0].annotation_name(index)}: {error}")
            coloured |= isinstance(error, ColourCoded)
    return [*lines, "..."] + (list(how_to_convert(_some_colours(parts))) if coloured else [])


def _some_colours(parts: list[PairPart]) -> list[Colour]:
    """The colours of some annotations."""
    found: set[int] = set()
    for part in parts:
        for index in evenly_spaced(len(part), CHUNK).tolist():
            with contextlib.suppress(BadImage):
                found |= {*np.unique(read_colours(_encoded(part.annotations, index))).tolist()}
    return list(map(unpacked, found))


def are_coloured(part: PairPart) -> bool:
    """Whether the first annotation that can be read is a picture of colours, be it by a palette."""
    for index in range(len(part)):
        with contextlib.suppress(BadImage):
            encoded = _encoded(part.annotations, index)
            try:
                read_colours(encoded)
            except BadImage:
                read_values(encoded)
                return False
            return True
    return False


def _over_all(parts: list[PairPart], work: Any, workers: int, on_progress: Progress) -> Iterator[tuple[PairPart, Any]]:
    total, before = sum(map(len, parts)), 0
    for part in parts:
        chunks = (range(start, min(start + CHUNK, len(part))) for start in range(0, len(part), CHUNK))
        # the images stand for the pairs where a process that died is to be named
        for done, found in in_order(part.images, partial(work, part), chunks, workers):
            yield part, found
            on_progress(before + done.stop, total)
        before += len(part)


def _count(part: PairPart, _images: Any, chunk: range) -> Counts:
    counts = np.zeros(0, np.int64)
    for index in chunk:
        try:
            found = np.bincount(part.values(index).ravel(), minlength=len(counts))
        except BadImage:  # the check will name it
            continue
        found[: len(counts)] += counts
        counts = found
    return counts


# ---- the check ----


@dataclass
class PartCheck:
    """What the annotations of one part hold; those of two chunks add up."""

    class_pixels: Counts
    """[K] Pixels of each class."""
    void_pixels: int = 0
    checked: int = 0
    """Pairs that can be used."""
    turned: int = 0
    """Images that EXIF turns or mirrors: their annotations are taken as drawn upright where the size does not tell."""
    bad_images: list[tuple[int, str]] = field(default_factory=list)
    """Indices of the images whose header cannot be read, with the reason; their annotations are not counted."""
    problems: list[str] = field(default_factory=list)
    """One line for each annotation that cannot be used."""
    colour_coded: bool = False
    other_size: bool = False

    @staticmethod
    def nothing(num_classes: int) -> PartCheck:
        """The start of a sum."""
        return PartCheck(np.zeros(num_classes, np.int64))

    def add(self, other: PartCheck) -> None:
        """Count another chunk's pairs too."""
        self.class_pixels += other.class_pixels
        self.void_pixels += other.void_pixels
        self.checked += other.checked
        self.turned += other.turned
        self.bad_images += other.bad_images
        self.problems += other.problems
        self.colour_coded |= other.colour_coded
        self.other_size |= other.other_size


def check_parts(parts: dict[str, PairPart], workers: int, on_progress: Progress) -> dict[str, PartCheck]:
    """Read every annotation of some parts, and the images' headers; problems are collected, not raised."""
    total = {name: PartCheck.nothing(_classes(part)) for name, part in parts.items()}
    names = {id(part): name for name, part in parts.items()}
    for part, found in _over_all(list(parts.values()), _check, workers, on_progress):
        total[names[id(part)]].add(found)
    return total


def count_ids(labels_HW: Labels2D, num_classes: int) -> Counts:
    """[1 + K] Pixels of void, then of each class."""
    assert VOID == -1
    return np.bincount(labels_HW.ravel().astype(np.int64) + 1, minlength=num_classes + 1)


def _classes(part: PairPart) -> int:
    assert part.numbering is not None, "class ids need a numbering"
    return part.numbering.num_classes


def _check(part: PairPart, _images: Any, chunk: range) -> PartCheck:
    num = _classes(part)
    found = PartCheck.nothing(num)
    for index in chunk:
        try:
            size_hw = part.size(index)
            turned = part.is_turned(index)
        except BadImage as error:
            found.bad_images.append((index, str(error)))
            continue
        try:
            labels_HW = part.labels(index, size_hw)
        except BadImage as error:
            found.problems.append(f"{part.annotation_name(index)}: {error}")
            found.colour_coded |= isinstance(error, ColourCoded)
            found.other_size |= isinstance(error, OtherSize)
            continue
        counts = count_ids(labels_HW, num)
        found.void_pixels += int(counts[0])
        found.class_pixels += counts[1:]
        found.checked += 1
        found.turned += turned
    return found


def complain(found: dict[str, PartCheck], parts: dict[str, PairPart], name: str) -> None:
    """Stop where an annotation cannot be used, or where nothing is left to train on.

    Raises:
        UserError: the problems, one a line.
    """
    problems = [problem for one in found.values() for problem in one.problems]
    if problems:
        total = len(problems) + sum(one.checked + len(one.bad_images) for one in found.values())
        first = f"--data {name}: {len(problems):,} of {total:,} annotations cannot be used:"
        more = [f"... and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        help_lines = [_RESIZE] if any(one.other_size for one in found.values()) else []
        if any(one.colour_coded for one in found.values()):
            help_lines += how_to_convert(_some_colours(list(parts.values())))
        raise UserError(first, *problems[:SHOWN], *more, *help_lines)
    for part, one in found.items():
        if not one.checked:
            index, reason = one.bad_images[0]
            raise UserError(f"--data {name}: no image of the {part} part can be read; the first: {reason}")
        if not one.class_pixels.any():
            raise UserError(f"--data {name}: every pixel of the {part} part is void; see --void")
