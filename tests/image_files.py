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


def qoi(image_HWC: Any) -> bytes:
    """An RGB image as QOI, each pixel by itself; Pillow writes it from release 12 on only."""
    height, width, _ = image_HWC.shape
    pixels = b"".join(b"\xfe" + pixel.tobytes() for pixel in image_HWC.reshape(-1, 3))
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + pixels + bytes(7) + b"\x01"


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


# ---- everything that may lie in a folder of images ----

PLAIN = 31


def photograph(seed: int, height: int = 40, width: int = 30) -> Image.Image:
    """A picture with structure, so that what is cut off is missed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
    return Image.fromarray(np.kron(coarse, np.ones((5, 5, 1), np.uint8))[:height, :width])


def good_files() -> dict[bytes, bytes]:
    """Name -> content of images that are unusual and must be read."""
    pixels = np.asarray(photograph(99))
    palette = photograph(98).quantize(16)
    wide = (pixels.astype(np.uint16) * 257)[:, :, :3]
    files = {
        b"cmyk.jpg": encoded(photograph(97).convert("CMYK"), "JPEG"),
        b"gray16.png": png16(wide[..., :1]),
        b"colour16.png": png16(wide),
        b"palette.png": encoded(palette, transparency=bytes([0, 128, 255])),
        b"animated.gif": encoded(palette, "GIF", save_all=True, append_images=[photograph(96).quantize(16)]),
        b"wrong-suffix.jpg": encoded(photograph(95), "PNG"),
        b"one.png": encoded(Image.new("RGB", (1, 1), (9, 8, 7))),
        b"thin.png": encoded(photograph(94, 20_000, 1)),
        b"flat.png": encoded(photograph(93, 1, 20_000)),
        b"two\nlines-\xff.png": encoded(photograph(92)),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[b"exif%d.jpg" % orientation] = encoded(photograph(80 + orientation), "JPEG", exif=exif)
    return files


def bad_files() -> dict[bytes, tuple[bytes, str]]:
    """Name -> content that cannot be read, and words of its reason."""
    random = np.random.default_rng(7)
    whole = {b"jpg": encoded(photograph(70, 80, 60), "JPEG"), b"png": encoded(photograph(71, 80, 60))}
    huge = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    files: dict[bytes, tuple[bytes, str]] = {
        b"zero.png": (b"", "empty file"),
        b"noise.jpg": (b"\x01" + random.bytes(3000), "not an image"),
        b"text.png": (b"these are words", "not an image"),
        b"bomb.png": (b"\x89PNG\r\n\x1a\n" + huge + png_chunk(b"IDAT", b""), "decompression bomb"),
        b"bad\nline-\xfe.png": (b"", "empty file"),
    }
    for suffix, content in whole.items():
        for tenth in range(1, 10):
            cut = content[: len(content) * tenth // 10]
            files[b"cut%d." % tenth + suffix] = (cut, "truncated")
    return files


SPECIAL = {
    b"loop.png": "too many levels of symbolic links",
    b"nowhere.png": "no such file",
    b"pipe.png": "not a regular file",
    b"deleted.png": "no such file",
    b"denied.png": "permission denied",
}
"""Bad for what they are, not for what they hold. `deleted` and `denied` are made so by the test."""


def make_corpus(root: Path, *, whole: bool = False) -> dict[str, str]:
    """A folder with all of them among plain photographs; returns the printable names of the bad ones, with words of
    their reasons. `whole`: the same names, but every bad file is a good image.
    """
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "up").symlink_to("..")
    for index in range(PLAIN):
        photograph(index, 24 + index, 50 - index).save(root / ("sub" if index % 3 else "") / f"{index:02d}.png")
    bad = bad_files()
    contents = good_files() | {name: content for name, (content, _) in bad.items()}
    if whole:
        contents |= {name: encoded(photograph(200 + i)) for i, name in enumerate([*bad, *SPECIAL])}
    else:
        (root / "loop.png").symlink_to("loop.png")
        (root / "nowhere.png").symlink_to("nothing-here.png")
        os.mkfifo(root / "pipe.png")
        contents |= {name: encoded(photograph(300)) for name in (b"deleted.png", b"denied.png")}
    for name, content in contents.items():
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(content)
    from maekit.data.parts import printable

    return {printable(name): words for name, words in {**{n: w for n, (_, w) in bad.items()}, **SPECIAL}.items()}
