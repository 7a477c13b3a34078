"""Read every image of a part once and count what is there: sizes, depths, gray ones, and those that cannot be read.

Memory is constant: one image for each process, and counters. Legend: H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maekit.config import UserError
from maekit.data.images import BadImage
from maekit.data.parts import Part
from maekit.data.pixels import Pixels

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

    def add(self, other: Survey) -> None:
        """Count another chunk's images too."""
        self.readable += other.readable
        self.heights += other.heights
        self.widths += other.widths
        self.eight_bit += other.eight_bit
        self.gray += other.gray
        self.bad += other.bad

    def count(self, image_HWC: Pixels) -> None:
        """Count one image."""
        self.readable += 1
        self.heights[image_HWC.shape[0]] += 1
        self.widths[image_HWC.shape[1]] += 1
        self.eight_bit += image_HWC.dtype == np.uint8
        self.gray += all(np.array_equal(image_HWC[..., 0], image_HWC[..., c]) for c in range(1, image_HWC.shape[2]))


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
    for done, (found, bad) in _results(part, workers, ranges):
        total.add(found)
        on_bad(bad)
        on_progress(done.stop, len(part))
    return total


def _results(part: Part, workers: int, ranges: Iterator[range]) -> Iterator[tuple[range, tuple[Survey, Bad]]]:
    if workers == 0:
        yield from ((chunk, _read(part, chunk)) for chunk in ranges)
        return
    waiting: deque[tuple[range, Future[tuple[Survey, Bad]]]] = deque()
    context = multiprocessing.get_context()
    with ProcessPoolExecutor(workers, context, _start_worker, (part,)) as pool:
        try:
            for chunk in ranges:
                waiting.append((chunk, pool.submit(_read_here, chunk)))
                if len(waiting) > 4 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a process that reads images died near {part.name(done.start)}, perhaps for want of memory: "
                "--workers 0 shows where"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_part: list[Part] = []
"""In a worker process: the part that it reads."""


def _start_worker(part: Part) -> None:
    _part[:] = [part]
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def _read_here(chunk: range) -> tuple[Survey, Bad]:
    return _read(_part[0], chunk)


def _read(part: Part, chunk: range) -> tuple[Survey, Bad]:
    found, bad = Survey(), []
    for index in chunk:
        image: Any = None  # the one before is given back first
        try:
            image = part.read(index)
        except BadImage as error:
            bad.append((index, str(error)))
        else:
            found.count(image)
    found.bad = len(bad)
    return found, bad
