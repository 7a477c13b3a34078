"""Images decoded, cropped and flipped by worker processes, in order, a few batches ahead.

Shapes: B batch, C channels, H x W pixels in, S x T pixels out, N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maekit.config import PretrainConfig, UserError
from maekit.data.augment import Augment
from maekit.data.images import BadImage
from maekit.data.order import Batch, Ids, sides
from maekit.data.parts import Part
from maekit.data.pixels import Window
from maekit.data.transforms import Crops, Draws, apply_to_window, centre_crops, draw_crops, place_crop, wanted
from maekit.data.workers import worker_options
from maekit.runtime import to_device
from maekit.seeding import own_generators

PREFETCHED_BYTES = 8 << 30
"""What batches that are ready ahead may take: four for each of 16 workers are 40 GB of 4,096 images of 224 px."""
_REPLACEMENTS = 100
"""How many following images are tried at least in the place of one that cannot be read."""


class StreamPool:
    """Images decoded, cropped and flipped by worker processes, in order, a few batches ahead."""

    def __init__(
        self,
        part: Part,
        config: PretrainConfig,
        device: torch.device,
        workers: int,
        augment: Augment | None = None,
    ) -> None:
        """augment: what is done to the training images after crop and flip."""
        self.part, self.config, self.device, self.workers, self.augment = part, config, device, workers, augment
        self.heldout_N = sides(part, config)
        self.bad: dict[int, str] = {}

    @property
    def unreadable(self) -> dict[int, str]:
        return self.bad

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        told = 0  # what evaluation met is told here too: nobody else listens
        largest = self.config.batch_size // self.config.accum  # of one process
        for batch in self._batches(([(epoch, int(i)) for i in ids] for epoch, ids in shares), largest):
            yield batch._replace(bad=list(self.bad.items())[told:]) if len(self.bad) > told else batch
            told = len(self.bad)

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        starts = range(0, len(ids), batch_size)
        yield from self._batches(
            ([(None, int(i)) for i in ids[start : start + batch_size]] for start in starts), batch_size
        )

    def _prefetched(self, images: int) -> int:
        """Batches of so many 8-bit images that each worker holds ready: 4, and fewer where that takes much memory."""
        size = images * self.config.in_chans * math.prod(self.config.size_hw)
        return max(1, min(4, PREFETCHED_BYTES // max(1, size * self.workers)))

    def _batches(self, keys: Iterable[list[tuple[int | None, int]]], images: int) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            Decoder(self.part, self.config, self.heldout_N, self.augment),
            batch_sampler=_Once(keys),
            collate_fn=collate,
            # its own: a loader draws a seed when it starts, and a resumed run has started more of them
            generator=torch.Generator(),
            **worker_options(self.workers),
            pin_memory=self.device.type == "cuda",
            prefetch_factor=self._prefetched(images) if self.workers else None,
        )
        for found, ids, bad in loader:
            if found is None:  # raised here, since an exception loses its words on the way out of a worker
                chans = f" --in-chans {self.config.in_chans}" if self.config.in_chans != 3 else ""  # else it finds none
                raise UserError(
                    f"{len(bad)} images in a row cannot be read, such as {self.part.name(bad[-1][0])}: {bad[-1][1]} "
                    f"(--max-bad-share {self.config.max_bad_share:g} of {len(self.part)} images); maekit check-data "
                    f"--data {self.config.data}{chans} names them: mend or remove them"
                )
            for index, reason in bad:
                self.bad.setdefault(index, reason)
            # Rows of pixels travel as they lie; the axes are named anew on the device, where nothing is copied for it.
            images_BCST = to_device(found, self.device).permute(0, 3, 1, 2)
            yield Batch(images_BCST, ids.numpy(), bad)


class _Once:
    """A batch sampler over an iterable that is consumed once, lazily."""

    def __init__(self, keys: Iterable[list[tuple[int | None, int]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        return iter(self.keys)


Decoded = tuple[Tensor | None, int, list[tuple[int, str]]]


class Decoder(Dataset[Decoded]):
    """(epoch or None for evaluation, sample id) -> image [C, S, T], its slot's id, and what could not be read."""

    def __init__(
        self, part: Part, config: PretrainConfig, heldout_N: npt.NDArray[np.bool_], augment: Augment | None = None
    ) -> None:
        self.part, self.config, self.heldout_N, self.augment = part, config, heldout_N, augment
        # More than the allowed share in a row is too much whatever the others are.
        self.attempts = max(_REPLACEMENTS, int(config.max_bad_share * len(part)) + 1)

    def __getitems__(self, keys: list[tuple[int | None, int]]) -> list[Decoded]:
        """A batch, of one epoch: the random numbers are drawn for all its samples at once."""
        epoch = keys[0][0]
        slots = [slot for _, slot in keys]
        draws = None if epoch is None else draw_crops(self.config, slots, epoch=epoch)
        decoded = [self._decode(slot, draws, row) for row, slot in enumerate(slots)]
        if self.augment is None or epoch is None:
            return decoded
        keys_B3 = self.augment.keys(slots, epoch)
        with own_generators():
            return [
                (None if image is None else self.augment(image, key), slot, bad)
                for (image, slot, bad), key in zip(decoded, keys_B3, strict=True)
            ]

    def _decode(self, slot: int, draws: Draws | None, row: int) -> Decoded:
        bad: list[tuple[int, str]] = []
        for step in range(len(self.part)):
            index = (slot + step) % len(self.part)
            if self.heldout_N[index] != self.heldout_N[slot]:
                continue
            if len(bad) == self.attempts:
                return None, slot, bad
            framing = _Framing(self.config, draws, row)
            try:
                box = self.part.read(index, framing)
            except BadImage as error:
                bad.append((index, str(error)))
                continue
            return apply_to_window(box, framing.window, framing.crops, 0, self.config.size_hw), slot, bad
        return None, slot, bad


class _Framing:
    """Decides a slot's crop when the size of its image is known: the whole image's, whatever part of it is decoded.

    Evaluation sees images decoded in full, as other tools decode them.
    """

    crops: Crops
    window: Window

    def __init__(self, config: PretrainConfig, draws: Draws | None, row: int) -> None:
        self.config, self.draws, self.row = config, draws, row

    def __call__(self, height: int, width: int) -> Window:
        if self.draws is None:
            config, size = self.config, np.array([[height, width]])
            self.crops = centre_crops(size, config.size_hw, config.interpolation, config.crop_pct)
        else:
            self.crops = place_crop(self.config, height, width, self.draws, self.row)
        self.window = wanted(self.crops, 0, self.config.size_hw, shrink=self.draws is not None)
        return self.window


def collate(samples: list[Decoded]) -> tuple[Tensor | None, Tensor, list[tuple[int, str]]]:
    """Images [B, S, T, C], sample ids [B], and what could not be read."""
    images = [image.permute(1, 2, 0) for image, _, _ in samples if image is not None]
    if len(images) < len(samples):
        return None, torch.tensor([]), next(bad for image, _, bad in samples if image is None)
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    ids = torch.tensor([slot for _, slot, _ in samples])
    return torch.stack(images), ids, [item for _, _, bad in samples for item in bad]
