"""From a part of the data to batches on the device: in memory and augmented in batch, or decoded by worker processes.

Both ways see the same samples with the same crops: the order, the crops and the flips of a sample depend on
(seed, epoch, sample id) alone. Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from maekit.config import PretrainConfig, UserError
from maekit.data.images import BadImage
from maekit.data.memory import MemoryPool, SizesDiffer
from maekit.data.order import Batch, Ids, Pool, Progress, SampleOrder, choose_training, lowest_hash, split_heldout
from maekit.data.parts import Part
from maekit.data.quarantine import Quarantine
from maekit.data.stream import StreamPool
from maekit.rng import Purpose
from maekit.runtime import Choice

__all__ = [
    "Batch",
    "Ids",
    "MemoryPool",
    "Pool",
    "Progress",
    "Quarantine",
    "SampleOrder",
    "StreamPool",
    "channel_statistics",
    "choose_training",
    "lowest_hash",
    "open_pool",
    "split_heldout",
]

MOST_SHRINKING = 8
"""Images in memory whose sides are over so many times the input's cost more to scale in every epoch than to decode."""
MEMORY_BUDGET = 2 * 1024**3
"""Bytes of uint8 pixels that are kept on the device: all of CIFAR or 60,000 tiles of 105 px."""


def open_pool(
    part: Part, config: PretrainConfig, device: torch.device, workers: Choice[int], on_progress: Progress | None = None
) -> tuple[Pool, Choice[bool]]:
    """The images in memory where that is possible and wanted, else decoded by workers; and which, with the reason."""
    size, reason = common_size(part)
    if config.in_memory == "no":
        return StreamPool(part, config, device, workers.value), Choice(False, "as asked for")
    if size is not None and config.in_memory == "auto":
        volume = len(part) * part.in_chans * math.prod(size) * value_bytes(part)
        if volume > MEMORY_BUDGET:
            size, reason = None, f"{volume / 1024**3:.1f} GiB of pixels is over {MEMORY_BUDGET // 1024**3} GiB"
        elif max(size) > MOST_SHRINKING * max(config.size_hw):
            reason = f"images of {size[0]} x {size[1]} are read quicker at a size nearer to the input's"
            size = None
    if size is not None:
        try:
            return MemoryPool(part, config, device, size, on_progress, workers.value), Choice(True, reason)
        except SizesDiffer as error:
            reason = str(error)
    if config.in_memory == "yes":
        raise UserError(f"--in-memory yes: not possible, {reason}")
    return StreamPool(part, config, device, workers.value), Choice(False, f"{reason}; {workers.value} workers")


def value_bytes(part: Part) -> int:
    """Bytes that a value of the images takes in memory, by the first image that can be read: 1, or 4 of floats."""
    for index in range(len(part)):
        try:
            return int(part.read(index).dtype.itemsize)
        except BadImage:
            continue
    return 1


def common_size(part: Part) -> tuple[tuple[int, int] | None, str]:
    """The size shared by up to 64 evenly spaced images, or None with the reason.

    Raises:
        UserError: not one of them can be read.
    """
    sizes: set[tuple[int, int]] = set()
    reasons = []
    for index in np.linspace(0, len(part) - 1, min(64, len(part))).astype(int):
        try:
            sizes.add(part.size(int(index)))
        except BadImage as error:
            reasons.append(f"{part.name(int(index))}: {error}")
    if not sizes:
        raise UserError(f"--data: none of {len(reasons)} sampled images can be read, such as {reasons[0]}")
    if len(sizes) > 1:
        return None, "the images differ in size"
    height, width = size = sizes.pop()
    return size, f"all images are {height} x {width}"


def channel_statistics(pool: Pool, train_ids: Ids, on_progress: Progress | None = None) -> tuple[list[float], ...]:
    """Mean and deviation of each channel, pixels in 0..1, over centre crops of up to 10,000 training images."""
    ids = lowest_hash(train_ids, 10_000, Purpose.SUBSET)
    total = square = None
    count = 0
    for batch in pool.eval_batches(ids, 256):
        pixels = batch.images.to(torch.float32)
        if batch.images.dtype == torch.uint8:
            pixels = pixels / 255
        per_image = pixels.flatten(2).mean(dim=2).cpu().double().sum(dim=0)
        per_square = pixels.flatten(2).square().mean(dim=2).cpu().double().sum(dim=0)
        total = per_image if total is None else total + per_image
        square = per_square if square is None else square + per_square
        count += len(batch.sample_ids)
        if on_progress is not None:
            on_progress(count, len(ids))
    assert total is not None and square is not None
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), deviation.tolist()
