"""From an image of any size to a class for each of its pixels: the whole image at once, or windows that slide over it.

Whole: the image is padded to a multiple of the patch, and the scores are cropped back before anything is counted.
Windows: scores are averaged where windows overlap; the last row and column of windows end at the image's edge. A window
is never larger than the padded image, so a window that covers the image is the same as the whole image.

Views (scales and the mirrored image) are averaged as probabilities, as scores of different views have different
sharpness; a single view needs no such step. Scores are resized to the size that is asked for before the class with the
highest one is taken: classes are never interpolated.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maekit.data.pair_transforms import factor_to
from maekit.models.dense_heads import resized
from maekit.models.segmentation import Segmenter

WINDOW_BATCH = 8
"""Windows in a forward pass; it has no say in the scores but for the last bits."""


@dataclass(frozen=True)
class View:
    """How an image is looked at."""

    window: tuple[int, int] | None = None
    """Height and width of a window in pixels, rounded up to multiples of the patch; None: the whole image."""
    stride: int | None = None
    """Pixels from window to window, at most its side; None: two thirds of the side."""
    short_side: int | None = None
    """Resize the image to this shorter side first; None: as it is."""
    scales: tuple[float, ...] = (1.0,)
    """Relative sizes at which the image is seen."""
    flip: bool = False
    """Also see its mirror image."""


def describe_view(view: View) -> str:
    """A view in words."""
    if view.window is None:
        seen = "whole images"
    else:
        seen = f"windows of {view.window[0]} x {view.window[1]} px every {view.stride or 'two thirds'}"
    scales = "" if view.scales == (1.0,) else f", at scales {' '.join(f'{scale:g}' for scale in view.scales)}"
    short = f", shorter side {view.short_side} px" if view.short_side else ""
    return seen + short + scales + (", mirrored too" if view.flip else "")


@torch.no_grad()
def predict_classes(model: Segmenter, image_CHW: Tensor, view: View) -> Tensor:
    """The class [H, W] (int64) of each pixel of an image.

    image_CHW: uint8 pixels, or floats in 0..1, on the model's device.
    """
    normal = model.normalize(image_CHW[None])
    views = [(scale, mirrored) for scale in view.scales for mirrored in ((False, True) if view.flip else (False,))]
    total = None
    for scale, mirrored in views:
        seen = _scaled(normal, view.short_side, scale, model.patch_size)
        scores = image_scores(model, seen.flip(3) if mirrored else seen, view)
        scores = resized((scores.flip(3) if mirrored else scores).float(), image_CHW.shape[1:])
        if len(views) > 1:
            scores = scores.softmax(dim=1)
        total = scores if total is None else total + scores
    assert total is not None
    return total[0].argmax(dim=0)


def image_scores(model: Segmenter, normal_1CHW: Tensor, view: View) -> Tensor:
    """Scores [1, K, H, W] of one normalised image, whole or by windows."""
    height, width = normal_1CHW.shape[2:]
    padded = pad_to(normal_1CHW, model.patch_size)
    if view.window is None:
        whole: Tensor = model(padded).main[:, :, :height, :width]
        return whole
    patch = model.patch_size
    sides, starts = [], []
    for length, wanted in zip(padded.shape[2:], view.window, strict=True):
        window = math.ceil(wanted / patch) * patch
        sides.append(min(window, length))
        starts.append(window_starts(length, sides[-1], min(view.stride or max(1, window * 2 // 3), window)))
    corners = list(itertools.product(*starts))
    total = count = None
    for start in range(0, len(corners), WINDOW_BATCH):
        some = corners[start : start + WINDOW_BATCH]
        crops = torch.cat([padded[:, :, top : top + sides[0], left : left + sides[1]] for top, left in some])
        for (top, left), scores in zip(some, model(crops).main.float(), strict=True):
            if total is None or count is None:
                total = scores.new_zeros(1, len(scores), *padded.shape[2:])
                count = scores.new_zeros(padded.shape[2:])
            total[0, :, top : top + sides[0], left : left + sides[1]] += scores
            count[top : top + sides[0], left : left + sides[1]] += 1
    assert total is not None and count is not None
    averaged: Tensor = (total / count)[:, :, :height, :width]
    return averaged


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the end."""
    last = length - window
    return [*range(0, last, stride), last] if last > 0 else [0]


def pad_to(normal_BCHW: Tensor, multiple: int) -> Tensor:
    """Normalised images padded at the bottom and the right with zeros, the mean colour, to a multiple."""
    height, width = normal_BCHW.shape[2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(normal_BCHW, (0, right, 0, below)) if below or right else normal_BCHW


def _scaled(normal_1CHW: Tensor, short_side: int | None, scale: float, patch: int) -> Tensor:
    """The image at the wanted shorter side times a scale, at least a patch; with antialiasing where it shrinks."""
    height, width = normal_1CHW.shape[2:]
    factor = scale * (factor_to(short_side, height, width) if short_side else 1.0)
    if factor == 1.0:
        return normal_1CHW
    new = (max(patch, round(height * factor)), max(patch, round(width * factor)))
    return F.interpolate(normal_1CHW, size=new, mode="bilinear", align_corners=False, antialias=True)
