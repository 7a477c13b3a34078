"""Crops, flips and colours of images with annotations, and the loader that makes batches of them.

Annotations are moved by nearest neighbour only: between two class ids there is no third. All random numbers come from
torch's generator, which the loader seeds for each sample. The operations are torchvision's (transforms.v2).
Legend: B batch, C channels, H x W pixels; image values are uint8 in 0..255, or floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from maekit.config import UserError
from maekit.data.annotations import VOID
from maekit.data.order import Ids
from maekit.data.pair_parts import PairPart
from maekit.data.pixels import BadImage, Pixels
from maekit.data.workers import worker_options
from maekit.seeding import sample_generators

_REPLACEMENTS = 100
"""How many following images are tried in the place of one that cannot be read."""
_DRAWS = 10
"""How often a crop is drawn at most in search of one that no class fills."""
_MOVE = 32 / 255
"""Largest change of brightness, as a share of the values' range."""
_LONGEST = 4
"""Where the shorter side is given, the longer one is at most so many times as long (2048 for 512, as is usual)."""


@dataclass(frozen=True)
class AugmentPlan:
    """What training does to an image and its annotation, in this order: scale, crop, flip, colours, padding."""

    crop_hw: tuple[int, int]
    """Height and width in pixels of what the model sees."""
    scale: tuple[float, float] = (0.5, 2.0)
    """The image is resized by a factor drawn uniformly from this range."""
    short_side: int | None = None
    """Pixels of the shorter side at scale 1, as in the ADE20K recipe (512). None: the image's own."""
    max_class_share: float = 0.75
    """A crop is drawn again, ten times in all at most, while one class fills more than this share of its labelled
    pixels or none is labelled; the last one stands. 1: the first stands."""
    flip: float = 0.5
    """Share of the samples that are mirrored left to right."""
    photometric: bool = True
    """Brightness (by a sum and by a factor), saturation and hue are changed, each in half of the samples: 3-channel
    images only."""
    fill: tuple[float, ...] = (0.485, 0.456, 0.406)
    """What is laid around an image smaller than the crop, in 0..1 and for each channel: the mean that the model's
    normalisation subtracts, so that it is 0 afterwards. One value stands for all channels."""


def augment(image_HWC: Pixels, labels_HW: npt.NDArray[Any], plan: AugmentPlan) -> tuple[Tensor, Tensor]:
    """One training sample [C, *crop_hw] of the image's type, and its class ids [*crop_hw], int64, VOID in the padding.

    Draws from torch's global generator.
    """
    assert image_HWC.shape[:2] == labels_HW.shape, (image_HWC.shape, labels_HW.shape)
    image = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)
    labels = torch.from_numpy(labels_HW.astype(np.int16))[None]  # Mask [1, H, W]
    box, size_hw = _draw_window(labels, plan)
    image = tvf.resized_crop(image, *box, list(size_hw), InterpolationMode.BILINEAR, antialias=True)
    labels = tvf.resized_crop(labels, *box, list(size_hw), InterpolationMode.NEAREST_EXACT)
    pair = v2.RandomHorizontalFlip(plan.flip)(tv_tensors.Image(image), tv_tensors.Mask(labels))
    image, labels = pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)
    if plan.photometric and image.shape[0] == 3 and _has_colours(image):
        image = _colours()(image)
    return _padded(image, plan), _filled(labels, plan.crop_hw)[0].long()


def _draw_window(labels_1HW: Tensor, plan: AugmentPlan) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box (top, left, height, width) of the image that is cut out, and height and width to which it is resized.

    Cut before it is resized, as only the crop is ever needed: whole pixels make its scale inexact by half of one.
    """
    shape_hw = labels_1HW.shape[1:]
    factor = float(torch.empty(1).uniform_(*plan.scale))
    if plan.short_side is not None:
        factor *= factor_to(plan.short_side, *shape_hw)
    size_hw, window_hw = [], []
    for side, crop in zip(shape_hw, plan.crop_hw, strict=True):
        scaled = max(1, round(side * factor))
        size_hw.append(min(scaled, crop))
        window_hw.append(side if scaled <= crop else min(side, max(1, round(crop / factor))))
    top, left = _draw_corner(labels_1HW[0], window_hw, plan.max_class_share)
    return (top, left, window_hw[0], window_hw[1]), (size_hw[0], size_hw[1])


def factor_to(short_side: int, height: int, width: int) -> float:
    """What brings an image to a shorter side of so many pixels, and its longer one to four times that at most."""
    short, long = min(height, width), max(height, width)
    return min(short_side / short, _LONGEST * short_side / long)


def _draw_corner(labels_HW: Tensor, window_hw: list[int], max_class_share: float) -> tuple[int, int]:
    """Top and left of a window, such that if possible no class fills too much of it."""
    room_hw = [side - window for side, window in zip(labels_HW.shape, window_hw, strict=True)]
    top = left = 0
    for _ in range(_DRAWS):
        top, left = (int(torch.randint(room + 1, ())) for room in room_hw)
        if max_class_share >= 1 or room_hw == [0, 0]:
            break
        inside = labels_HW[top : top + window_hw[0], left : left + window_hw[1]]
        counts = torch.bincount(inside.flatten().long() - VOID)[1:]  # the first counts void
        if counts.any() and int(counts.max()) <= max_class_share * int(counts.sum()):
            break
    return top, left


def _has_colours(image_CHW: Tensor) -> bool:
    """Whether values are colours: floats beyond 0..1 are measurements, to which brightness and hue mean nothing."""
    return image_CHW.dtype == torch.uint8 or bool(image_CHW.amin() >= 0 and image_CHW.amax() <= 1)


def _colours() -> Any:
    """Photometric distortion: each of four changes in half of the samples, in a random order.

    As is usual for segmentation since SSD (arXiv 1512.02325, section 2.2): all values moved by up to 32 of 255, all
    multiplied by 0.5 to 1.5 (which SSD calls contrast; zero stays zero), saturation by half, hue by 18 degrees. SSD's
    swapped channels are left out: an encoder knows its colours.
    """
    changes = (
        v2.Lambda(_move_values),
        v2.ColorJitter(brightness=0.5),
        v2.ColorJitter(saturation=0.5),
        v2.ColorJitter(hue=0.05),
    )
    return v2.RandomOrder([v2.RandomApply([change], p=0.5) for change in changes])


def _move_values(image_CHW: Tensor) -> Tensor:
    """All values moved by one random amount, up to 32 of 255, within their range."""
    span = 255 if image_CHW.dtype == torch.uint8 else 1.0
    moved = image_CHW + torch.empty(()).uniform_(-_MOVE, _MOVE) * span
    return moved.clamp(0, span).to(image_CHW.dtype)


def _padded(image_CHW: Tensor, plan: AugmentPlan) -> Tensor:
    height, width = image_CHW.shape[1:]
    if (height, width) == plan.crop_hw:
        return image_CHW.contiguous()
    fill = plan.fill if len(plan.fill) > 1 else plan.fill * image_CHW.shape[0]
    assert len(fill) == image_CHW.shape[0], f"{len(fill)} values to fill {image_CHW.shape[0]} channels"
    fill_C = torch.tensor(fill)
    if image_CHW.dtype == torch.uint8:
        fill_C = (fill_C * 255).round()
    whole = fill_C.to(image_CHW.dtype)[:, None, None].repeat(1, *plan.crop_hw)
    whole[:, :height, :width] = image_CHW
    return whole


def _filled(labels_1HW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    height, width = labels_1HW.shape[1:]
    return nnf.pad(labels_1HW, (0, size_hw[1] - width, 0, size_hw[0] - height), value=VOID)


# ---- the loader ----


class PairBatch(NamedTuple):
    """Images [B, C, H, W] (uint8, or floats), class ids [B, H, W] int64, sample ids, and what was unreadable."""

    images: Tensor
    labels: Tensor
    sample_ids: Ids
    bad: list[tuple[int, str]]


class WholePair(NamedTuple):
    """A whole image H W C as it was decoded with its class ids H W, or None and the reason why it cannot be read."""

    sample_id: int
    image: Pixels | None
    labels: npt.NDArray[np.int16] | None
    reason: str = ""


def train_batches(
    part: PairPart,
    plan: AugmentPlan,
    shares: Iterable[tuple[int, Ids]],
    *,
    seed: int,
    workers: int,
    allowed: Ids | None = None,
    pin: bool = False,
) -> Iterator[PairBatch]:
    """A batch on the CPU for each (epoch, sample ids), augmented; the same ones whatever the number of workers.

    In the slot of an image that cannot be read stands the next readable one, augmented as the slot's; `allowed` names
    the ids that may stand in (all by default: give the training ids where some are held out). `shares` is read a few
    batches ahead.

    Raises:
        UserError: too many images in a row cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Augmented(part, plan, seed, allowed),
        batch_sampler=_Once(shares),
        collate_fn=_collate,
        # its own: a loader draws a seed when it starts, and a resumed run has started more of them
        generator=torch.Generator(),
        **worker_options(workers),
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    for images, labels, ids, bad in loader:
        if images is None:  # raised here, since an exception loses its words on the way out of a worker
            index, reason = bad[-1]
            raise UserError(f"{len(bad)} images in a row cannot be read, such as {part.name(index)}: {reason}")
        yield PairBatch(images, labels, ids.numpy(), bad)


def whole_pairs(part: PairPart, ids: Sequence[int] | Ids, *, workers: int) -> Iterator[WholePair]:
    """Whole images with their annotations, in the order of `ids`, read a few ahead by worker processes."""
    loader: DataLoader[Any] = DataLoader(
        _Whole(part),
        batch_size=None,
        sampler=[int(i) for i in ids],
        collate_fn=_as_it_is,
        generator=torch.Generator(),
        **worker_options(workers),
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def _as_it_is(pair: Any) -> Any:
    return pair


class _Whole(Dataset[WholePair]):
    def __init__(self, part: PairPart) -> None:
        self.part = part

    def __getitem__(self, index: int) -> WholePair:
        try:
            return WholePair(index, *self.part.read(index))
        except BadImage as error:
            return WholePair(index, None, None, str(error))


class _Once:
    """A batch sampler over shares that are consumed once, lazily."""

    def __init__(self, shares: Iterable[tuple[int, Ids]]) -> None:
        self.shares = shares

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(epoch, int(i)) for i in ids] for epoch, ids in self.shares)


_Sample = tuple[Tensor | None, Tensor | None, int, list[tuple[int, str]]]


class _Augmented(Dataset[_Sample]):
    """(epoch, sample id) -> image, class ids, the slot's id, and what could not be read."""

    def __init__(self, part: PairPart, plan: AugmentPlan, seed: int, allowed: Ids | None) -> None:
        self.part, self.plan, self.seed = part, plan, seed
        self.allowed_N = np.ones(len(part), np.bool_)
        if allowed is not None:
            self.allowed_N[:] = False
            self.allowed_N[allowed] = True

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, slot = key
        bad: list[tuple[int, str]] = []
        for step in range(len(self.part)):
            index = (slot + step) % len(self.part)
            if len(bad) == _REPLACEMENTS:
                break
            if index != slot and not self.allowed_N[index]:
                continue
            try:
                image_HWC, labels_HW = self.part.read(index)
            except BadImage as error:
                bad.append((index, str(error)))
                continue
            # Without workers this is the process that trains: its generators must not notice.
            with sample_generators(self.seed, epoch, slot):
                image_CHW, labels_HW64 = augment(image_HWC, labels_HW, self.plan)
            return image_CHW, labels_HW64, slot, bad
        return None, None, slot, bad


def _collate(samples: list[_Sample]) -> tuple[Tensor | None, Tensor | None, Tensor, list[tuple[int, str]]]:
    images = [image for image, _, _, _ in samples if image is not None]
    labels = [label for _, label, _, _ in samples if label is not None]
    if len(images) < len(samples):
        return None, None, torch.tensor([]), next(bad for image, _, _, bad in samples if image is None)
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    ids = torch.tensor([slot for _, _, slot, _ in samples])
    return torch.stack(images), torch.stack(labels), ids, [item for _, _, _, bad in samples for item in bad]
