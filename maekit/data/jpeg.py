"""JPEG's pixels by libjpeg-turbo through simplejpeg, which hands over an array at once; Pillow is asked where it can't.

Both decode by the same library, so the numbers are the same bits (a test compares them). Pillow keeps colour in four
bytes a pixel and copies it into an array afterwards: a third of its time. Legend: H height, W width, C channels.
"""

from __future__ import annotations

from typing import IO, Any

from PIL.JpegImagePlugin import JpegImageFile
from simplejpeg import decode_jpeg

from maekit.data.pixels import Pixels, Window, upright

_COLOURS = {"RGB": "RGB", "L": "GRAY"}
"""Pillow's mode -> the colours to ask for. Four channels are left to Pillow, which knows Adobe's inverted ones."""


def decode(image: Any, file: IO[bytes], orientation: int, window: Window | None) -> Pixels | None:
    """The window (or all) of a JPEG whose header Pillow has read from this file: upright pixels H W C, C 1 or 3.

    It is decoded smaller as `shrink_of` says. None where Pillow is to decode: no JPEG, another number of channels, or
    whatever is wrong with the file, so that what counts as damaged is for Pillow alone to say.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in _COLOURS:
        return None
    shrink = 1 if window is None else shrink_of(image, orientation, window)
    height, width = -(-image.height // shrink), -(-image.width // shrink)
    file.seek(0)
    try:  # strict: what libjpeg only warns of is an error, too
        values_HWC: Pixels = decode_jpeg(
            file.read(), _COLOURS[image.mode], min_height=height, min_width=width, min_factor=shrink
        )
    except ValueError:
        return None
    if values_HWC.shape[:2] != (height, width):
        return None
    values_HWC = upright(values_HWC, orientation)
    if window is None:
        return values_HWC
    return (window.shrunken() if shrink > 1 else window).cut(values_HWC)


def shrink_of(image: Any, orientation: int, window: Window) -> int:
    """By how much the image is decoded smaller for the window: 1, 2, 4 or 8; 1 for all but JPEG."""
    if not isinstance(image, JpegImageFile):
        return 1
    # Turned or mirrored, the larger pixels begin at the other edge: then only sides without a rest keep their place.
    exact = orientation == 1 or (image.width % window.shrink == 0 and image.height % window.shrink == 0)
    return window.shrink if exact else 1
