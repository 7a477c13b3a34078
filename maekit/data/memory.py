"""All images of a small data set as one tensor on the device, augmented there in batch.

Shapes: N images, B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import PretrainConfig, UserError
from maekit.data.images import BadImage
from maekit.data.order import Batch, Ids, Progress, sides, together
from maekit.data.parts import Part
from maekit.data.pixels import Pixels
from maekit.data.transforms import Crops, apply_to_batch, apply_to_image, centre_crops, random_crops
from maekit.data.workers import in_order
from maekit.runtime import to_device

MANY = 4096
"""From so many images on, worker processes read them: of a small image, half the time is Python's, one thread's."""
_CHUNK = 256
LARGE = 96
"""On a CPU, images with a longer side from here on are scaled one by one, without the zeros of the dense products:
equally quick at 96 px, 12 times as quick at 480 x 360. A GPU would wait for such a loop."""

AHEAD, AHEAD_VALUES = 2048, 2**25
"""On a GPU, the batches of several steps are augmented at once, up to so many images, and values of them before and
after: a hundred small kernels take as long to launch for one batch as for all. A CPU has nothing to launch."""

Read = list[Pixels | str]
"""Of each image of a chunk, its pixels or the reason why there are none; it ends early where a size differs."""


class SizesDiffer(Exception):
    """An image is not of the others' size; the message says which."""


class MemoryPool:
    """All images as one uint8 tensor on the device (float32 for 16-bit and float data), augmented there in batch."""

    def __init__(
        self,
        part: Part,
        config: PretrainConfig,
        device: torch.device,
        size_hw: tuple[int, int],
        on_progress: Progress | None = None,
        workers: int = 0,
    ) -> None:
        self.config, self.device, self.size_hw = config, device, size_hw
        pixels, self.bad = _read_all(
            part, size_hw, sides(part, config), on_progress, workers if len(part) >= MANY else 0
        )
        self.images_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)

    @property
    def unreadable(self) -> dict[int, str]:
        return dict(self.bad)

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        bad = self.bad
        for epoch, group in together(shares, self._ahead):
            ids = np.concatenate(group)
            crops = random_crops(self.config, self._sizes(ids), ids, epoch=epoch)
            for images, some in zip(self._apply(ids, crops).split([len(one) for one in group]), group, strict=True):
                yield Batch(images, some, bad)
                bad = []

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            crops = centre_crops(
                self._sizes(some), self.config.size_hw, self.config.interpolation, self.config.crop_pct
            )
            yield Batch(self._apply(some, crops), some, [])

    def _apply(self, ids: Ids, crops: Crops) -> Tensor:
        if self.device.type != "cpu" or max(self.size_hw) < LARGE:
            return apply_to_batch(self._take(ids), crops, self.config.size_hw)
        images_NHWC = self.images_NCHW.permute(0, 2, 3, 1).numpy()
        size_hw = self.config.size_hw
        return torch.stack([apply_to_image(images_NHWC[i], crops, row, size_hw) for row, i in enumerate(ids)])

    @property
    def _ahead(self) -> int:
        """Images of training that are augmented together."""
        if self.device.type == "cpu":
            return 1
        values = self.images_NCHW.shape[1] * max(math.prod(self.size_hw), math.prod(self.config.size_hw))
        return min(AHEAD, AHEAD_VALUES // values)

    def _take(self, ids: Ids) -> Tensor:
        return self.images_NCHW[to_device(torch.from_numpy(ids), self.device)]

    def _sizes(self, ids: Ids) -> npt.NDArray[np.int64]:
        return np.tile(np.array(self.size_hw, np.int64), (len(ids), 1))


def _read_chunk(size_hw: tuple[int, int], part: Part, chunk: range) -> Read:
    found: Read = []
    for index in chunk:
        try:
            image = part.read(index)
        except BadImage as error:
            found.append(str(error))
            continue
        found.append(image)
        if image.shape[:2] != size_hw:  # the others of this chunk need not be decoded, and may be huge
            break
    return found


def _read_in_threads(part: Part, size_hw: tuple[int, int], chunks: Iterable[range]) -> Iterator[tuple[range, Read]]:
    """As worker processes would, but without their start-up time."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for chunk in chunks:
            pieces = [chunk[start : start + 16] for start in range(0, len(chunk), 16)]
            found: Read = []
            for some, read in zip(pieces, threads.map(partial(_read_chunk, size_hw, part), pieces), strict=True):
                found += read
                if len(read) < len(some):
                    break
            yield chunk, found


def _read_all(
    part: Part,
    size_hw: tuple[int, int],
    heldout_N: npt.NDArray[np.bool_],
    on_progress: Progress | None,
    workers: int,
) -> tuple[npt.NDArray[Any], list[tuple[int, str]]]:
    """All images of a part [N, H, W, C]; an unreadable one is replaced by the next readable one of its own side."""
    pixels: npt.NDArray[Any] = np.zeros((len(part), *size_hw, part.in_chans), np.uint8)
    bad: dict[int, str] = {}
    chunks = (range(start, min(start + _CHUNK, len(part))) for start in range(0, len(part), _CHUNK))
    if workers > 1:
        results = in_order(part, partial(_read_chunk, size_hw), chunks, workers)
    else:
        results = _read_in_threads(part, size_hw, chunks)
    for chunk, found in results:
        for index, image in zip(chunk, found, strict=False):
            if isinstance(image, str):
                bad[index] = image
                continue
            if image.shape[:2] != size_hw:
                raise SizesDiffer(f"{part.name(index)} is {image.shape[0]} x {image.shape[1]}, others are not")
            if image.dtype != pixels.dtype and pixels.dtype == np.uint8:
                pixels = np.divide(pixels, 255, dtype=np.float32)  # 8-bit so far, and now 16-bit or float data
            if pixels.dtype == np.float32 and image.dtype == np.uint8:
                image = np.divide(image, 255, dtype=np.float32)
            pixels[index] = image
        if on_progress is not None:
            on_progress(chunk.stop, len(part))
    _stand_in(part, pixels, bad, heldout_N)
    return pixels, sorted(bad.items())


def _stand_in(part: Part, pixels: npt.NDArray[Any], bad: dict[int, str], heldout_N: npt.NDArray[np.bool_]) -> None:
    """Fill the place of each unreadable image with the next readable one of its own side."""
    readable = np.setdiff1d(np.arange(len(part)), list(bad))
    if not len(readable):
        raise UserError(f"none of the {len(part)} images can be read; the first: {next(iter(bad.values()), 'none')}")
    for index in bad:
        same = readable[heldout_N[readable] == heldout_N[index]]
        if not len(same):
            raise UserError(
                f"none of the {int((heldout_N == heldout_N[index]).sum())} images can be read that are "
                f"{'held out' if heldout_N[index] else 'trained on'}; {part.name(index)}: {bad[index]}"
            )
        pixels[index] = pixels[same[np.searchsorted(same, index) % len(same)]]
