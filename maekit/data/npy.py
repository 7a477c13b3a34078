"""NumPy's .npy files as images: H W or H W C of uint8, uint16 or float.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

from typing import IO

import numpy as np
import numpy.typing as npt

from maekit.data.pixels import BadImage, Pixels, check_size, to_pixels, wrong_channels

MAGIC = b"\x93NUMPY"
"""The first bytes of a file."""


def size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels, from the header; raises BadImage as `decode` does."""
    height, width = _header(file)[0][:2]
    return height, width


def decode(file: IO[bytes], in_chans: int) -> Pixels:
    """The image H W C; C may still differ from `in_chans` where `fit_channels` can mend it.

    Raises:
        BadImage: another number of channels; not H W or H W C, a type that is not read, a bomb, a truncated file.
    """
    shape, fortran, dtype = _header(file)
    if shape[2] not in (1, in_chans) and (shape[2], in_chans) != (3, 1):
        raise wrong_channels(shape[2], in_chans)
    dtype = np.dtype(dtype)
    count = shape[0] * shape[1] * shape[2]
    # bytearray: the array may be returned as it is and should be writable, as torch expects.
    flat = np.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype, count)
    return to_pixels(flat.reshape(shape, order="F" if fortran else "C"))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, npt.DTypeLike]:
    """Shape (H, W, C), Fortran order and type of a .npy array, without reading it.

    Raises:
        BadImage: not H W or H W C, a type that is not uint8, uint16 or float, a bomb, or less data than claimed.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f".npy version {version[0]}.{version[1]}; 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or dtype.kind not in "uf" or (dtype.kind == "u" and dtype.itemsize > 2) or dtype.itemsize > 8:
        raise BadImage(f".npy of {dtype}; uint8, uint16 and float are read")
    if len(shape) not in (2, 3):
        raise BadImage(f".npy of shape {shape}; H W or H W C is read")
    check_size(shape[0], shape[1])
    shape = shape if len(shape) == 3 else (*shape, 1)
    start = file.tell()
    found = file.seek(0, 2) - start
    file.seek(start)
    if shape[2] < 1 or shape[0] * shape[1] * shape[2] * dtype.itemsize > found:
        raise BadImage("truncated .npy")
    return shape, fortran, dtype
