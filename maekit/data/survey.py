"""Read every image of a part once and count what is there: sizes, depths, gray ones, and those that cannot be read.

Memory is constant: one image for each process, and counters. Legend: H height, W width, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maekit.data.images import BadImage
from maekit.data.parts import Part
from maekit.data.pixels import Pixels
from maekit.data.workers import in_order

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

    def count(self, image_HWC: Pixels, frames_left: int) -> None:
        """Count one image, behind which so many frames of its file are left."""
        self.readable += 1
        self.heights[image_HWC.shape[0]] += 1
        self.widths[image_HWC.shape[1]] += 1
        self.eight_bit += image_HWC.dtype == np.uint8
        self.gray += all(np.array_equal(image_HWC[..., 0], image_HWC[..., c]) for c in range(1, image_HWC.shape[2]))
        self.with_frames_left += frames_left > 0
        self.frames_left += frames_left


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
            found.count(image, frames_left)
    found.bad = len(bad)
    return found, bad
