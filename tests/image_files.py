"""Encoded images for the tests: made here, byte by byte where no library writes them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from maekit.config import UserError
from maekit.data.images import BadImage, decode
from maekit.data.sources import open_source

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
STACK = RNG.integers(0, 256, (9, 11, 5), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(array: Any, key: bytes | None = None) -> bytes:
    """A 16-bit PNG, which Pillow cannot write; 1 gray, 2 gray and alpha, 3 colour, 4 colour and alpha."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    transparent = png_chunk(b"tRNS", key) if key else b""
    body = png_chunk(b"IHDR", header) + transparent + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def reason(data: Any, in_chans: int = 3) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, in_chans)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unit(values: Any) -> Any:
    return values.astype(np.float32) / np.float32(65535)


# ---- sources ----

SHARED = Path(__file__).parents[1].parent / "shared"


def png(value: int = 0, size: tuple[int, int] = (4, 3)) -> bytes:
    """A gray PNG of one value; size is (width, height)."""
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def listed(part: Any) -> list[str]:
    return [part.name(index) for index in range(len(part))]


def problem(spec: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(spec), **options)
    return str(caught.value)


def make_tree(root: Path, *names: str | bytes) -> Path:
    """Files below a folder: images whose gray value is their place among the names."""
    for value, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(value))
    return root
