"""The centre of every image of a part, in order, for tasks that say something of each; nothing stands in for bad ones.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maekit.config import ModelConfig, UserError
from maekit.data.images import BadImage, decode, probe_size
from maekit.data.parts import Part
from maekit.data.transforms import apply_to_image, centre_crops
from maekit.models.masking import Masks, masks_from_bool

Centre = tuple[Tensor | None, str]
_READING: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0}
"""How images are resized and cut where no passport says it: a passport's own defaults."""


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


def read_images(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], model: Any) -> Tensor:
    """Image files as a model takes them, seen as every command that augments nothing sees them.

    paths: one file, or several; of any kind that `--data` reads. model: what `maekit.load` gives, or a
    `MaskedAutoencoder`. Returns the images' centres, resized to the model's size as in its training and normalised,
    [B, C, H, W] on the model's device.

    Raises:
        UserError: files that cannot be read; all of them are named.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise UserError("paths: no image is named")
    how = {} if model.passport is None else {name: getattr(model.passport, name) for name in _READING}
    pixels = read_centres([os.fspath(name) for name in names], model.config, **{**_READING, **how}, said="")
    normal: Tensor = model.normalize(pixels.to(model.mean))
    return normal


def read_centres(
    names: Sequence[str], model: ModelConfig, interpolation: str, crop_pct: float, said: str = "--image "
) -> Tensor:
    """The centres of image files at the model's size, floats in 0..1 [B, C, H, W].

    said: what stands before a file's name in a message.

    Raises:
        UserError: files that cannot be read; all of them are named.
    """
    size_hw = model.size_hw
    found, problems = [], []
    for name in names:
        try:
            image = decode(Path(name).expanduser(), model.in_chans)
        except BadImage as error:
            problems.append(f"{said}{name}: {error}")
            continue
        crops = centre_crops(np.array([image.shape[:2]], np.int64), size_hw, interpolation, crop_pct)
        pixels = apply_to_image(image, crops, 0, size_hw)
        found.append(pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels)
    if problems:
        raise UserError(*problems)
    return torch.stack(found)


def read_hidden(names: Sequence[str], images: Sequence[str], model: ModelConfig, crop_pct: float) -> list[Masks]:
    """What black and white pictures hide of each image, framed as `read_centres` frames it: masks of one image each.

    names: one picture for all images, or one for each. A patch is hidden where one of its pixels, at the model's size,
    is white.

    Raises:
        UserError: another number of pictures, one that cannot be read or has other proportions than its image, or one
            that hides nothing or everything; all of them are named.
    """
    if len(names) not in (1, len(images)):
        raise UserError(f"--hide: {len(names)} pictures for {len(images)} images; give one for all, or one for each")
    (height, width), patch = model.size_hw, model.patch_size
    assert patch is not None
    found, problems = [], []
    for name, image in zip(list(names) * (len(images) // len(names)), images, strict=True):
        try:
            picture_HW1 = decode(Path(name).expanduser(), 1)
            (tall, wide), (rows, columns) = picture_HW1.shape[:2], probe_size(Path(image).expanduser())
            if abs(tall * columns - wide * rows) > 0.02 * wide * rows:
                raise BadImage(f"{wide} x {tall} pixels have other proportions than {image}, {columns} x {rows}")
            crops = centre_crops(np.array([[tall, wide]], np.int64), model.size_hw, "bilinear", crop_pct)
            pixels_1HW = apply_to_image(picture_HW1, crops, 0, model.size_hw)
            white_1HW = pixels_1HW >= (128 if pixels_1HW.dtype == torch.uint8 else 0.5)
            patches = white_1HW.reshape(height // patch, patch, width // patch, patch)
            found.append(masks_from_bool(patches.transpose(1, 2).flatten(2).any(dim=2).flatten().unsqueeze(0)))
        except (BadImage, UserError) as error:
            problems.append(f"--hide {name}: {error}")
    if problems:
        raise UserError(*problems)
    return found


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
