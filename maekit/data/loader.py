"""From a part of the data to batches on the device: in memory and augmented in batch, or decoded by worker processes.

Both ways see the same samples with the same crops: the order, the crops and the flips of a sample depend on
(seed, epoch, sample id) alone. Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maekit.config import PretrainConfig, UserError
from maekit.data.images import BadImage
from maekit.data.parts import Part
from maekit.data.quarantine import Quarantine as Quarantine
from maekit.data.transforms import apply_to_batch, apply_to_image, centre_crops, random_crops
from maekit.data.workers import WorkerStart
from maekit.rng import Purpose, random_bits, shuffled
from maekit.runtime import Choice

Ids = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

MIN_HELDOUT = 8
"""Held-out images at least: as many as a panel has rows."""
MEMORY_BUDGET = 2 * 1024**3
"""Bytes of uint8 pixels that are kept on the device: all of CIFAR or 60,000 tiles of 105 px."""
_REPLACEMENTS = 100
"""How many following images are tried at least in the place of one that cannot be read."""


class Batch(NamedTuple):
    """Images [B, C, H, W] on the device (uint8, or floats in 0..1), their sample ids, and what was unreadable."""

    images: Tensor
    sample_ids: Ids
    bad: list[tuple[int, str]]


def split_heldout(num: int, share: float) -> tuple[Ids, Ids]:
    """Training and held-out sample ids, both ascending: held out are those with the lowest hash of their id.

    The hash ignores the run's seed, so every run on the same data holds out the same images.

    Raises:
        UserError: too few images to hold any out.
    """
    held = max(MIN_HELDOUT, round(share * num))
    if num <= held:
        raise UserError(
            f"{num} images are too few: {held} are held out of training (--heldout-share), and some must be left"
        )
    ids = np.arange(num, dtype=np.int64)
    chosen = lowest_hash(ids, held, Purpose.HELDOUT_SPLIT)
    return np.setdiff1d(ids, chosen, assume_unique=True), chosen


def _sides(num: int, config: PretrainConfig) -> npt.NDArray[np.bool_]:
    """[N] True for held-out samples: the stand-in of an unreadable one must not cross over to training, or back."""
    heldout_N = np.zeros(num, np.bool_)
    with contextlib.suppress(UserError):  # too few to hold any out: then all are on one side
        heldout_N[split_heldout(num, config.heldout_share)[1]] = True
    return heldout_N


def lowest_hash(ids: Ids, count: int, purpose: Purpose) -> Ids:
    """The `count` ids with the lowest hash, ascending: a fixed random subset that grows with `count`."""
    keys = random_bits(ids, 1, seed=0, purpose=purpose)[:, 0]
    return np.sort(ids[np.lexsort((ids, keys))[:count]])


class SampleOrder:
    """Which samples each optimiser step sees: a permutation an epoch, cut into global batches, the rest dropped."""

    def __init__(self, train_ids: Ids, batch_size: int, seed: int) -> None:
        if batch_size > len(train_ids):
            raise UserError(
                f"--batch-size {batch_size} is larger than the {len(train_ids)} training images: lower it to at most "
                f"{len(train_ids)}"
            )
        self.train_ids, self.batch_size, self.seed = train_ids, batch_size, seed
        self.steps_per_epoch = len(train_ids) // batch_size
        self._epoch, self._permutation = -1, train_ids

    def step_ids(self, step: int) -> tuple[int, Ids]:
        """Epoch (0-based) and the sample ids [batch_size] of a global step (0-based)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = shuffled(self.train_ids, seed=self.seed, purpose=Purpose.ORDER, epoch=epoch)
        return epoch, self._permutation[within * self.batch_size : (within + 1) * self.batch_size]

    def micro_batches(self, steps: Iterable[int], rank: int, world: int, accum: int) -> Iterator[tuple[int, Ids]]:
        """One process's share: for every step its `accum` parts, as (epoch, sample ids [batch / world / accum])."""
        for step in steps:
            epoch, ids = self.step_ids(step)
            for part in ids.reshape(accum, world, -1)[:, rank]:
                yield epoch, part


class Pool(Protocol):
    """Images that can be drawn by sample id."""

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        """A batch for each (epoch, sample ids), with the training crops and flips."""
        ...

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Batches of centre crops, in order, the last one smaller."""
        ...


def open_pool(
    part: Part, config: PretrainConfig, device: torch.device, workers: Choice[int], on_progress: Progress | None = None
) -> tuple[Pool, Choice[bool]]:
    """The images in memory where that is possible and wanted, else decoded by workers; and which, with the reason."""
    size, reason = _common_size(part)
    if config.in_memory == "no":
        return StreamPool(part, config, device, workers.value), Choice(False, "as asked for")
    if size is not None:
        volume = len(part) * part.in_chans * math.prod(size)
        if volume > MEMORY_BUDGET and config.in_memory == "auto":
            size, reason = None, f"{volume / 1024**3:.1f} GiB of pixels is over {MEMORY_BUDGET // 1024**3} GiB"
    if size is not None:
        try:
            return MemoryPool(part, config, device, size, on_progress), Choice(True, reason)
        except _SizesDiffer as error:
            reason = str(error)
    if config.in_memory == "yes":
        raise UserError(f"--in-memory yes: not possible, {reason}")
    return StreamPool(part, config, device, workers.value), Choice(False, f"{reason}; {workers.value} workers")


class _SizesDiffer(Exception):
    pass


def _common_size(part: Part) -> tuple[tuple[int, int] | None, str]:
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


class MemoryPool:
    """All images as one uint8 tensor on the device (float32 for 16-bit and float data), augmented there in batch."""

    def __init__(
        self,
        part: Part,
        config: PretrainConfig,
        device: torch.device,
        size_hw: tuple[int, int],
        on_progress: Progress | None = None,
    ) -> None:
        self.config, self.device, self.size_hw = config, device, size_hw
        pixels, self.bad = _read_all(part, size_hw, _sides(len(part), config), on_progress)
        self.images_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        bad = self.bad
        for epoch, ids in shares:
            crops = random_crops(self.config, self._sizes(ids), ids, epoch=epoch)
            yield Batch(apply_to_batch(self._take(ids), crops, self.config.size_hw), ids, bad)
            bad = []

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            crops = centre_crops(self._sizes(some), self.config.size_hw)
            yield Batch(apply_to_batch(self._take(some), crops, self.config.size_hw), some, [])

    def _take(self, ids: Ids) -> Tensor:
        return self.images_NCHW[torch.from_numpy(ids).to(self.device, non_blocking=True)]

    def _sizes(self, ids: Ids) -> npt.NDArray[np.int64]:
        return np.tile(np.array(self.size_hw, np.int64), (len(ids), 1))


def _read_all(
    part: Part, size_hw: tuple[int, int], heldout_N: npt.NDArray[np.bool_], on_progress: Progress | None
) -> tuple[npt.NDArray[Any], list[tuple[int, str]]]:
    """All images of a part [N, H, W, C]; an unreadable one is replaced by the next readable one of its own side."""
    pixels: npt.NDArray[Any] = np.zeros((len(part), *size_hw, part.in_chans), np.uint8)
    bad: dict[int, str] = {}
    different: list[str] = []

    def read(index: int) -> npt.NDArray[Any] | None:
        if different:  # the others of this chunk need not be decoded, and may be huge
            return None
        try:
            image = part.read(index)
        except BadImage as error:
            bad[index] = str(error)
            return None
        if image.shape[:2] != size_hw:
            different.append(f"{part.name(index)} is {image.shape[0]} x {image.shape[1]}, others are not")
            return None
        return image

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        chunk = 256
        for start in range(0, len(part), chunk):
            indices = range(start, min(start + chunk, len(part)))
            for index, image in zip(indices, threads.map(read, indices), strict=True):
                if image is None:
                    continue
                if image.dtype != pixels.dtype and pixels.dtype == np.uint8:
                    pixels = pixels.astype(np.float32) / 255  # 8-bit so far, and now 16-bit or float data
                if pixels.dtype == np.float32 and image.dtype == np.uint8:
                    image = image.astype(np.float32) / 255
                pixels[index] = image
            if different:
                raise _SizesDiffer(different[0])
            if on_progress is not None:
                on_progress(indices.stop, len(part))
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
    return pixels, sorted(bad.items())


class StreamPool:
    """Images decoded, cropped and flipped by worker processes, in order, a few batches ahead."""

    def __init__(self, part: Part, config: PretrainConfig, device: torch.device, workers: int) -> None:
        self.part, self.config, self.device, self.workers = part, config, device, workers
        self.heldout_N = _sides(len(part), config)
        self.bad: dict[int, str] = {}

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        told = 0  # what evaluation met is told here too: nobody else listens
        for batch in self._batches([(epoch, int(i)) for i in ids] for epoch, ids in shares):
            yield batch._replace(bad=list(self.bad.items())[told:]) if len(self.bad) > told else batch
            told = len(self.bad)

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        starts = range(0, len(ids), batch_size)
        yield from self._batches([(None, int(i)) for i in ids[start : start + batch_size]] for start in starts)

    def _batches(self, keys: Iterable[list[tuple[int | None, int]]]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.part, self.config, self.heldout_N),
            batch_sampler=_Once(keys),
            num_workers=self.workers,
            collate_fn=_collate,
            # its own: a loader draws a seed when it starts, and a resumed run has started more of them
            generator=torch.Generator(),
            worker_init_fn=WorkerStart(os.getpid()),
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
        )
        for images, ids, bad in loader:
            if images is None:  # raised here, since an exception loses its words on the way out of a worker
                raise UserError(
                    f"{len(bad)} images in a row cannot be read, such as {self.part.name(bad[-1][0])}: {bad[-1][1]} "
                    f"(--max-bad-share {self.config.max_bad_share:g} of {len(self.part)} images)"
                )
            for index, reason in bad:
                self.bad.setdefault(index, reason)
            yield Batch(images.to(self.device, non_blocking=True), ids.numpy(), bad)


class _Once:
    """A batch sampler over an iterable that is consumed once, lazily."""

    def __init__(self, keys: Iterable[list[tuple[int | None, int]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        return iter(self.keys)


Decoded = tuple[Tensor | None, int, list[tuple[int, str]]]


class _Decoder(Dataset[Decoded]):
    """(epoch or None for evaluation, sample id) -> image [C, H, W], its slot's id, and what could not be read."""

    def __init__(self, part: Part, config: PretrainConfig, heldout_N: npt.NDArray[np.bool_]) -> None:
        self.part, self.config, self.heldout_N = part, config, heldout_N
        # More than the allowed share in a row is too much whatever the others are.
        self.attempts = max(_REPLACEMENTS, int(config.max_bad_share * len(part)) + 1)

    def __getitem__(self, key: tuple[int | None, int]) -> Decoded:
        epoch, slot = key
        bad: list[tuple[int, str]] = []
        for step in range(len(self.part)):
            index = (slot + step) % len(self.part)
            if self.heldout_N[index] != self.heldout_N[slot]:
                continue
            if len(bad) == self.attempts:
                return None, slot, bad
            try:
                image = self.part.read(index)
                break
            except BadImage as error:
                bad.append((index, str(error)))
        else:
            return None, slot, bad
        sizes = np.array([image.shape[:2]], np.int64)
        size_hw = self.config.size_hw
        crops = centre_crops(sizes, size_hw) if epoch is None else random_crops(self.config, sizes, [slot], epoch=epoch)
        return apply_to_image(image, crops, 0, size_hw), slot, bad


def _collate(samples: list[Decoded]) -> tuple[Tensor | None, Tensor, list[tuple[int, str]]]:
    images = [image for image, _, _ in samples if image is not None]
    if len(images) < len(samples):
        return None, torch.tensor([]), next(bad for image, _, bad in samples if image is None)
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    ids = torch.tensor([slot for _, slot, _ in samples])
    return torch.stack(images), ids, [item for _, _, bad in samples for item in bad]


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
