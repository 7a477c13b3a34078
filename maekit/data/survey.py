"""Read every image of a part once and count what is there: sizes, depths, gray ones, and those that cannot be read.

Memory hardly grows: one image for each process, counters, and 16 bytes an image, by which copies are found.
Legend: H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maekit.data.images import BadImage
from maekit.data.parts import Part
from maekit.data.pixels import Pixels
from maekit.data.workers import in_order

NAMED = 3
"""Copies that are named."""
CHUNK = 32
"""Images that a process reads between two reports."""


@dataclass
class Survey:
    """What was found; those of two chunks add up."""

    readable: int = 0
    heights: Counter[int] = field(default_factory=Counter)
    """Height in pixels -> images."""
    widths: Counter[int] = field(default_factory=Counter)
    """Width in pixels -> images."""
    eight_bit: int = 0
    """Images that are read as uint8; the others have 16 bits or are floats."""
    gray: int = 0
    """Images whose channels are equal."""
    bad: int = 0
    with_frames_left: int = 0
    """Images that are the first page or frame of several."""
    frames_left: int = 0
    """The others of these pages and frames, which nothing reads."""
    digests: array[int] = field(default_factory=lambda: array("Q"))
    """64 bits of a digest of each readable image's pixels: equal ones are the same image."""
    ids: array[int] = field(default_factory=lambda: array("Q"))
    """The sample id of each."""

    def add(self, other: Survey) -> None:
        """Count another chunk's images too."""
        self.readable += other.readable
        self.heights += other.heights
        self.widths += other.widths
        self.eight_bit += other.eight_bit
        self.gray += other.gray
        self.bad += other.bad
        self.with_frames_left += other.with_frames_left
        self.frames_left += other.frames_left
        self.digests += other.digests
        self.ids += other.ids

    def count(self, index: int, image_HWC: Pixels, frames_left: int) -> None:
        """Count one image, behind which so many frames of its file are left."""
        digest = hashlib.blake2b(repr((image_HWC.shape, image_HWC.dtype.str)).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(image_HWC).data)
        self.digests.append(int.from_bytes(digest.digest(), "little"))
        self.ids.append(index)
        self.readable += 1
        self.heights[image_HWC.shape[0]] += 1
        self.widths[image_HWC.shape[1]] += 1
        self.eight_bit += image_HWC.dtype == np.uint8
        self.gray += all(np.array_equal(image_HWC[..., 0], image_HWC[..., c]) for c in range(1, image_HWC.shape[2]))
        self.with_frames_left += frames_left > 0
        self.frames_left += frames_left


@dataclass(frozen=True)
class Copies:
    """Images whose pixels are those of an image that came before, in the order of parts and ids."""

    within: int
    """In the same part as the first of them."""
    across: int
    """In another part."""
    examples: tuple[tuple[tuple[str, int], tuple[str, int]], ...]
    """A few of them, beside the first: part and sample id; first those in another part, then those of another class."""
    contrary: int
    """Of all of them, those that have another label than the first."""


def copies(surveys: Mapping[str, Survey], parts: Mapping[str, Part]) -> Copies:
    """The images that are there more than once."""
    names = list(surveys)
    digests = np.concatenate([np.array(one.digests, np.uint64) for one in surveys.values()])
    ids = np.concatenate([np.array(one.ids, np.int64) for one in surveys.values()])
    of_part = np.repeat(np.arange(len(names)), [len(one.digests) for one in surveys.values()])
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    first = first[which]  # of each image, the first one that is the same
    again = np.flatnonzero(first != np.arange(len(first)))
    origin = first[again]

    def label(place: int) -> int:
        labels = parts[names[of_part[place]]].labels
        return -1 if labels is None else int(labels[ids[place]])

    contrary = np.array(
        [-1 < label(a) != label(b) > -1 for a, b in zip(again.tolist(), origin.tolist(), strict=True)], np.bool_
    )
    across = of_part[again] != of_part[origin]
    order = np.lexsort((again, ~contrary, ~across))[:NAMED]
    shown = [tuple((names[of_part[place]], int(ids[place])) for place in (again[k], origin[k])) for k in order.tolist()]
    return Copies(int((~across).sum()), int(across.sum()), tuple(shown), int(contrary.sum()))  # type: ignore[arg-type]


Bad = list[tuple[int, str]]
"""Sample ids and reasons."""


def summary(sides: Counter[int]) -> dict[str, int]:
    """Smallest, median (the lower one of two) and largest; empty where nothing was counted."""
    if not sides:
        return {}
    half, seen = (sides.total() + 1) // 2, 0
    ordered = sorted(sides)
    for side in ordered:
        seen += sides[side]
        if seen >= half:
            return {"min": ordered[0], "median": side, "max": ordered[-1]}
    raise AssertionError("a median lies within its counts")


def survey(part: Part, workers: int, on_progress: Callable[[int, int], None], on_bad: Callable[[Bad], None]) -> Survey:
    """Read every image of a part, by so many processes (0: this one); bad ones are handed over in the order of ids.

    Raises:
        UserError: a process died, as the system kills one that takes too much memory.
    """
    total = Survey()
    ranges = (range(start, min(start + CHUNK, len(part))) for start in range(0, len(part), CHUNK))
    for done, (found, bad) in in_order(part, _read, ranges, workers):
        total.add(found)
        on_bad(bad)
        on_progress(done.stop, len(part))
    return total


def _read(part: Part, chunk: range) -> tuple[Survey, Bad]:
    found, bad = Survey(), []
    for index in chunk:
        image: Any = None  # the one before is given back first
        try:
            image = part.read(index)
            frames_left = part.frames_left_out(index)
        except BadImage as error:
            bad.append((index, str(error)))
        else:
            found.count(index, image, frames_left)
    found.bad = len(bad)
    return found, bad
