"""How images of any kind become what a screen shows: three channels, in levels that can be seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]

DARK = 0.07
"""An image with less than a thousandth of its pixels above this is black on a screen: 12 of 16 bits end at 0.0625."""
SLACK = 1e-3
"""So far beyond 0 and 1 lie values that were normalised and brought back, and no range of another kind."""
CUT = 0.1
"""Percent of the pixels at either end that a stretch may leave black or white."""
STRETCHED = "images of other levels than a screen's: each is shown from its darkest to its brightest 0.1 %"


def levels(image_HWC: FloatArray) -> tuple[float, float]:
    """The values that are shown as black and as white: 0 and 1, or for an image that this would hide, its own range.

    Of its shown channels alone: near infrared, which nobody sees, would leave red, green and blue black.
    """
    image_HWC = image_HWC[:, :, :3]
    finite = image_HWC[np.isfinite(image_HWC)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(level) for level in np.percentile(finite, (CUT, 100 - CUT)))
    if high <= low or (finite.min() >= -SLACK and finite.max() <= 1 + SLACK and high >= DARK):
        return 0.0, 1.0
    return low, high


def stretched(values: FloatArray, black_white: tuple[float, float]) -> FloatArray:
    """Values as shares of the way from black to white, not clipped."""
    low, high = black_white
    return values if (low, high) == (0.0, 1.0) else (values - low) / (high - low)


def three_channels(image_HWC: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Red, green and blue [H, W, 3], of any type: one channel replicated, two padded by zeros, three of more."""
    chans = image_HWC.shape[2]
    if chans < 3:
        fill = image_HWC if chans == 1 else np.zeros_like(image_HWC)
        image_HWC = np.concatenate([image_HWC, fill, fill], axis=2)
    return image_HWC[:, :, :3]


def channels_note(image_HWC: npt.NDArray[Any]) -> str:
    """Which channels `three_channels` shows, where that is not plain: of two, and of more than three."""
    chans = image_HWC.shape[2]
    if chans == 2:
        return "images of 2 channels, shown as red and green"
    return f"images of {chans} channels: 1, 2 and 3 are shown, as red, green and blue" if chans > 3 else ""


def clipped(image_HWC: FloatArray) -> FloatArray:
    """Three channels in 0..1; what is no number is black."""
    found: FloatArray = np.clip(np.nan_to_num(three_channels(image_HWC)), 0.0, 1.0)
    return found


def as_uint8(image_HWC: FloatArray) -> npt.NDArray[np.uint8]:
    """The same as uint8 [H, W, 3]."""
    return np.round(clipped(image_HWC) * 255.0).astype(np.uint8)
