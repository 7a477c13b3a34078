"""What every image decoder shares: the error, the limits, and the arithmetic on decoded pixels.

Legend: H height, W width, C channels. Arrays are uint8 in 0..255 or float32, which for 16-bit images is value / 65535.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[Any]


class Window(NamedTuple):
    """The box of an image that is wanted, in pixels of the whole upright image.

    `shrink` is 1, 2, 4 or 8: by how much the image may be decoded smaller, sides rounded up. Only JPEG does so.
    """

    top: int
    left: int
    height: int
    width: int
    shrink: int = 1

    def shrunken(self) -> Window:
        """The smallest box that holds this one in the image decoded `shrink` times smaller, in its pixels."""
        top, left = self.top // self.shrink, self.left // self.shrink
        bottom, right = -(-(self.top + self.height) // self.shrink), -(-(self.left + self.width) // self.shrink)
        return Window(top, left, bottom - top, right - left)

    def cut(self, values_HWC: Pixels) -> Pixels:
        """The box's pixels, a view."""
        return values_HWC[self.top : self.top + self.height, self.left : self.left + self.width]


Look: TypeAlias = Callable[[int, int], Window]
"""Told height and width of the whole upright image, decides what of it is decoded."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before their pixels are decoded: a small file can claim any size (a decompression bomb)."""


LARGEST = 1e18
"""Of floats, either sign: squares of larger ones overflow, and a deviation needs squares."""


class BadImage(Exception):
    """An image that cannot be read; the message is a one-line reason, such as 'empty file' or 'truncated JPEG'."""


def check_size(height: int, width: int) -> None:
    """Refuse a size, in pixels, that a header claims.

    Raises:
        BadImage: no pixels, or more than MAX_PIXELS.
    """
    if height < 1 or width < 1:
        raise BadImage(f"no pixels ({height} x {width})")
    if height * width > MAX_PIXELS:
        raise BadImage(f"{height} x {width} pixels are more than {MAX_PIXELS:,} (a decompression bomb?)")


def wrong_channels(found: int, in_chans: int) -> BadImage:
    """The error for data whose number of channels is not the model's."""
    return BadImage(f"{found} channels where --in-chans is {in_chans}")


def to_pixels(values: npt.NDArray[Any]) -> Pixels:
    """Decoded numbers of any type as uint8, or float32: 16-bit ones divided by 65535, floats as they are.

    Raises:
        BadImage: another integer type, or a value that is not finite in float32.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return np.where(values, np.uint8(255), np.uint8(0))
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        unit: Pixels = values.astype(np.float32) / np.float32(65535)
        return unit
    if values.dtype.kind != "f":
        raise BadImage(f"{values.dtype.name} values; uint8, uint16 and float are read")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused on the next line
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadImage("values that are not finite")
    if values.size and max(values.max(), -values.min()) > LARGEST:
        raise BadImage(f"a value beyond {LARGEST:g}, as mark pixels without data: fill them first")
    return values


def over_white(colour_HWC: Pixels, alpha_HW1: Pixels, premultiplied: bool = False) -> Pixels:
    """Colours laid over a white ground: c x a + white x (1 - a), where white is 255 for uint8 and 1 for float32.

    Where colours are premultiplied, c x a is what the file holds already. uint8 results are rounded to nearest.
    """
    if colour_HWC.dtype == np.uint8:
        alpha = alpha_HW1.astype(np.uint16)  # the largest product, 255 x 255 + 127, fits 16 bits
        if premultiplied:
            lit: Pixels = np.minimum(colour_HWC + (255 - alpha), 255)
            return lit.astype(np.uint8)
        total: Pixels = (colour_HWC * alpha + np.uint16(255) * (255 - alpha) + np.uint16(127)) // np.uint16(255)
        return total.astype(np.uint8)
    light = colour_HWC if premultiplied else colour_HWC * alpha_HW1
    whitened: Pixels = (light + (np.float32(1) - alpha_HW1)).astype(np.float32)
    return whitened


def luminance(colour_HWC: Pixels) -> Pixels:
    """Luma H W 1 of red, green, blue H W 3 (ITU-R BT.601; for uint8 in the fixed point that Pillow uses)."""
    if colour_HWC.dtype == np.uint8:
        weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114 in 1/65536; they sum to 65536
        fixed: Pixels = (colour_HWC @ weights + np.uint32(32768)) >> np.uint32(16)
        return fixed.astype(np.uint8)[..., None]
    luma: Pixels = colour_HWC @ np.array([0.299, 0.587, 0.114], np.float32)
    return luma.astype(np.float32)[..., None]


def fit_channels(values_HWC: Pixels, in_chans: int) -> Pixels:
    """The channels that the model takes: one channel is replicated, colour becomes luminance where one is wanted.

    Raises:
        BadImage: any other difference.
    """
    found = values_HWC.shape[2]
    if found == in_chans:
        return values_HWC
    if found == 1:
        return np.repeat(values_HWC, in_chans, axis=2)
    if found == 3 and in_chans == 1:
        return luminance(values_HWC)
    raise wrong_channels(found, in_chans)


def upright(values_HWC: Pixels, orientation: int) -> Pixels:
    """The image as it is meant to be seen, from its EXIF orientation 1..8 (CIPA DC-008, tag 0x0112)."""
    swapped_WHC = values_HWC.transpose(1, 0, 2)
    if orientation == 2:  # mirrored left to right
        return values_HWC[:, ::-1]
    if orientation == 3:  # rotated by half a turn
        return values_HWC[::-1, ::-1]
    if orientation == 4:  # mirrored top to bottom
        return values_HWC[::-1]
    if orientation == 5:  # mirrored along the main diagonal
        return swapped_WHC
    if orientation == 6:  # needs a quarter turn clockwise
        return swapped_WHC[:, ::-1]
    if orientation == 7:  # mirrored along the other diagonal
        return swapped_WHC[::-1, ::-1]
    if orientation == 8:  # needs a quarter turn counter-clockwise
        return swapped_WHC[::-1]
    return values_HWC
