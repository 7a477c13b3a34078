"""The centre of every image of a part, in order, for tasks that say something of each; nothing stands in for bad ones.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maekit.config import ModelConfig, UserError
from maekit.data.images import BadImage, decode
from maekit.data.parts import Part
from maekit.data.transforms import apply_to_image, centre_crops

Centre = tuple[Tensor | None, str]


class Centres(Dataset[Centre]):
    """Sample id -> the image's centre at the model's size [C, H, W], or None and why it cannot be read."""

    def __init__(self, part: Part, size_hw: tuple[int, int], interpolation: str, crop_pct: float) -> None:
        self.part, self.size_hw, self.interpolation, self.crop_pct = part, size_hw, interpolation, crop_pct

    def __getitem__(self, index: int) -> Centre:
        try:
            image = self.part.read(index)
        except BadImage as error:
            return None, str(error)
        crops = centre_crops(np.array([image.shape[:2]], np.int64), self.size_hw, self.interpolation, self.crop_pct)
        return apply_to_image(image, crops, 0, self.size_hw), ""


def read_centres(names: Sequence[str], model: ModelConfig, interpolation: str, crop_pct: float) -> Tensor:
    """The centres of image files at the model's size, floats in 0..1 [B, C, H, W].

    Raises:
        UserError: files that cannot be read; all of them are named.
    """
    size_hw = model.size_hw
    found, problems = [], []
    for name in names:
        try:
            image = decode(Path(name).expanduser(), model.in_chans)
        except BadImage as error:
            problems.append(f"--image {name}: {error}")
            continue
        crops = centre_crops(np.array([image.shape[:2]], np.int64), size_hw, interpolation, crop_pct)
        pixels = apply_to_image(image, crops, 0, size_hw)
        found.append(pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels)
    if problems:
        raise UserError(*problems)
    return torch.stack(found)


def collate_centres(samples: list[Centre]) -> tuple[Tensor | None, list[str]]:
    """Images [B, C, H, W], zeros for those that cannot be read (None where all are), and the reasons."""
    images = [image for image, _ in samples if image is not None]
    if any(image.dtype != torch.uint8 for image in images):
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    reasons = [reason for _, reason in samples]
    if not images:
        return None, reasons
    readable = iter(images)
    blank = torch.zeros_like(images[0])
    return torch.stack([blank if image is None else next(readable) for image, _ in samples]), reasons
