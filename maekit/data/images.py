"""Decode anything into an array: photographs, scans, 16-bit and n-channel data; whatever cannot be read is `BadImage`.

Rules (DESIGN.md, "Any image"): grayscale is replicated, CMYK converted, alpha laid over white, 16-bit divided by
65535, EXIF orientation applied, the first frame taken; n-channel data come as TIFF or .npy; for DICOM see `dicom`.
Pillow reads 16-bit colour in PPM, JPEG 2000 and AVIF at 8 bits; PNG and TIFF keep all 16. Colour profiles are not
applied.
Legend: H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from maekit.data import dicom, jpeg, npy, tiff
from maekit.data.pixels import (
    MAX_PIXELS,
    BadImage,
    Look,
    Pixels,
    check_size,
    fit_channels,
    over_white,
    to_pixels,
    upright,
)

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "BadImage", "decode", "frames_left_out", "probe_size"]

# Pillow's format -> suffixes. Only formats with a signature and without an outside program: Pillow's EPS reader starts
# Ghostscript, and its TGA reader accepts noise.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif",),
    "QOI": (".qoi",),
}
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
_FORMATS = [name for name in _SUFFIXES if name not in _OPTIONAL or features.check(_OPTIONAL[name])]

IMAGE_SUFFIXES: frozenset[str] = frozenset(s for name in _FORMATS for s in _SUFFIXES[name]) | {".npy", *dicom.SUFFIXES}
"""Lower-case suffixes of the files that a folder is searched for: what this Pillow can open, .npy, and DICOM's."""

_SIGNATURES = {
    b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", npy.MAGIC: ".npy",
    b"qoif": "QOI", b"P4": "PPM", b"P5": "PPM", b"P6": "PPM",
    b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", **dict.fromkeys(tiff.MAGICS, "TIFF"),
}  # fmt: skip

# 16-bit colour: Pillow's raw mode -> the raw modes that yield its high and its low bytes.
_NATIVE_LOW = "B" if sys.byteorder == "little" else "L"
_SIXTEEN = {
    f"{mode};16{order}": (f"{mode};16{order}", f"{mode};16{low}")
    for mode in ("RGB", "RGBA", "RGBX", "RGBa")
    for order, low in (("B", "L"), ("L", "B"), ("N", _NATIVE_LOW))
}


def decode(data: bytes | str | Path, in_chans: int, look: Look | None = None) -> Pixels:
    """An encoded image, or the file at a path, as a C-contiguous array H W C with C = in_chans.

    uint8 for 8-bit images, float32 in 0..1 for 16-bit ones, float32 as they are for float TIFF and .npy and for DICOM
    in a unit. With `look`, only the window that it chooses: a JPEG may be decoded smaller then, by its `shrink`.

    Raises:
        BadImage: whatever is wrong with the file, on one line.
    """
    with reading(data) as file, quiet:
        head = _head(file)
        values_HWC: Pixels | None = None
        if head.startswith(npy.MAGIC):
            values_HWC = npy.decode(file, in_chans)
        elif dicom.is_dicom(head):
            values_HWC = dicom.decode(file)
        elif head[:4] in tiff.MAGICS:
            values_HWC = _decode_tiff(file, in_chans)
        if values_HWC is None:
            values_HWC = _decode_pillow(file, look)
        elif look is not None:
            values_HWC = look(*values_HWC.shape[:2]).cut(values_HWC)
        return np.ascontiguousarray(fit_channels(values_HWC, in_chans))


def probe_size(data: bytes | str | Path) -> tuple[int, int]:
    """Height and width in pixels as `decode` would return them, from the header only.

    Raises:
        BadImage: no image, or a size that `decode` refuses; damage behind the header is not seen.
    """
    with reading(data) as file, quiet:
        head = _head(file)
        if head.startswith(npy.MAGIC):
            return npy.size(file)
        if dicom.is_dicom(head):
            return dicom.size(file)
        if head[:4] in tiff.MAGICS:
            return tiff.size(file)
        image = open_pillow(file)
        height, width = image.height, image.width
        return (width, height) if orientation_of(image) >= 5 else (height, width)


def frames_left_out(data: bytes | str | Path, in_chans: int) -> int:
    """How many frames `decode` leaves unread: TIFF's pages, frames of an animation or of DICOM; by the headers.

    Raises:
        BadImage: no image; damage behind the headers is not seen.
    """
    with reading(data) as file, quiet:
        head = _head(file)
        if dicom.is_dicom(head):
            return dicom.frames_left_out(file)
        if head[:4] in tiff.MAGICS:
            return tiff.frames_left_out(file, in_chans)
        image = None if head.startswith(npy.MAGIC) else open_pillow(file)
        # A JPEG with a second frame (MPO) is a camera's preview or the other eye's view of the same picture.
        return 0 if image is None or image.format == "MPO" else int(getattr(image, "n_frames", 1)) - 1


@contextlib.contextmanager
def reading(data: bytes | str | Path) -> Iterator[IO[bytes]]:
    """The data as an open file; whatever a decoder raises inside becomes BadImage."""
    kind: str | None = None
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else _open_regular(data) as file:
            head = file.read(dicom.HEAD_BYTES)
            if not head:
                raise BadImage("empty file")
            kind = next((name for magic, name in _SIGNATURES.items() if head.startswith(magic)), None)
            if head[4:8] == b"ftyp":
                kind = "AVIF"
            if dicom.is_dicom(head):
                kind = "DICOM"
            yield file
    except BadImage:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, KeyError, MemoryError...
        raise BadImage(_reason(error, kind)) from error


def _open_regular(path: str | Path) -> IO[bytes]:
    """A regular file, opened; never blocks, as opening a FIFO would."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise BadImage("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise BadImage("not a regular file")
    # O_NONBLOCK: a FIFO may take the file's place between the two calls.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def _reason(error: Exception, kind: str | None) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return f"broken or truncated {kind} header" if kind else "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels (a decompression bomb?)"
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or message).lower()
    if any(words in message.lower() for words in ("truncat", "unexpected end", "not enough image data")):
        return f"truncated {kind or 'image'}"
    if any(words in message.lower() for words in ("broken data stream", "could not create decoder", "bmff")):
        return f"broken or truncated {kind or 'image'}"
    if kind == "DICOM":  # pydicom may repeat words of the header, which names a patient
        return "broken or truncated DICOM"
    return f"broken {kind or 'image'}: {message[:120] or type(error).__name__}"


class _Quiet:
    """Without the decoders' warnings: what they warn of is either harmless or raised as BadImage.

    Python's filters belong to the process, and threads that each save and restore them would leave them changed; so
    the first to enter saves them and the last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


quiet = _Quiet()


def _head(file: IO[bytes]) -> bytes:
    file.seek(0)
    head = file.read(dicom.HEAD_BYTES)
    file.seek(0)
    return head


# ---- Pillow ----


def open_pillow(file: IO[bytes]) -> Any:
    """The image with its header read and its size checked; the pixels are not decoded yet."""
    image = Image.open(file, formats=_FORMATS)
    check_size(image.height, image.width)
    image.info["white_is_zero"] = isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0
    return image


def orientation_of(image: Any) -> int:
    """EXIF orientation 1..8 from the header; 1 for TIFF, which Pillow turns by itself; 1 where EXIF is damaged.

    The base class's reader is called because PNG's own would decode all pixels to look for a late EXIF chunk; then
    `probe_size` and `decode` could not agree at the cost of a header.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_pillow(file: IO[bytes], look: Look | None = None) -> Pixels:
    file.seek(0)
    image = open_pillow(file)
    orientation = orientation_of(image)
    image.info.pop("xmp", None)  # TIFF: Pillow would turn by XMP too, after having announced the unturned size
    size_hw = (image.height, image.width) if orientation < 5 else (image.width, image.height)
    window = look(*size_hw) if look is not None else None
    raw_mode = raw_mode_of(image)
    if raw_mode in _SIXTEEN or raw_mode == "LA;16B":
        values_HWC = upright(_sixteen_bit_colour(file, image, raw_mode), orientation)
        return values_HWC if window is None else window.cut(values_HWC)
    if (direct_HWC := jpeg.decode(image, file, orientation, window)) is not None:
        return direct_HWC
    if window is None:
        image.load()
        return upright(_values(image), orientation)
    if (shrink := jpeg.shrink_of(image, orientation, window)) > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
        window = window.shrunken()
    image.load()
    if orientation > 1:
        return window.cut(upright(_values(image), orientation))
    box = (window.left, window.top, window.left + window.width, window.top + window.height)
    return _values(image.crop(box))  # cut before the conversion to an array, which costs as much as half of decoding


def raw_mode_of(image: Any) -> str:
    """How the samples lie in the file: 'RGB;16B' is 16-bit colour, high byte first."""
    arguments = image.tile[0].args if image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _sixteen_bit_colour(file: IO[bytes], image: Any, raw_mode: str) -> Pixels:
    """16-bit colour in full: Pillow keeps one byte of each sample, so the pixels are decoded once for each byte."""
    if raw_mode == "LA;16B":  # 4 bytes to a pixel, which fit RGBA: high and low byte of gray, then of alpha
        image = _reopened(file, "RGBA")
        bytes_HW4 = np.asarray(image).astype(np.uint16)
        values = bytes_HW4[..., 0::2] * np.uint16(256) + bytes_HW4[..., 1::2]
    else:
        high, low = (np.asarray(_reopened(file, name)).astype(np.uint16) for name in _SIXTEEN[raw_mode])
        values = high * np.uint16(256) + low
    if raw_mode.startswith("RGBX"):
        values = values[..., :3]
    colours = values.shape[2] - (values.shape[2] in (2, 4))
    colour_HWC, alpha_HW1 = to_pixels(values[..., :colours]), to_pixels(values[..., colours:])
    key = image.info.get("transparency")  # PNG: one colour that is transparent
    if colours == values.shape[2] == 3 and isinstance(key, tuple):
        colour_HWC[(values == np.array(key)).all(axis=2)] = 1
    if colours == values.shape[2]:
        return colour_HWC
    return over_white(colour_HWC, alpha_HW1, premultiplied=raw_mode.startswith("RGBa"))


def _reopened(file: IO[bytes], raw_mode: str) -> Any:
    """The same image, to be unpacked by another raw mode."""
    file.seek(0)
    image = open_pillow(file)
    image.info.pop("xmp", None)
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()
    return image


def _values(image: Any) -> Pixels:
    """The pixels H W C of a loaded Pillow image of any mode: C is 1 for gray and 3 for colour, alpha over white."""
    mode = image.mode
    if mode.startswith("I;16"):
        values = np.array(image).astype(np.uint16)
        # Pillow has turned inverted TIFFs of 8 bits around, not those of 16.
        gray = to_pixels(np.uint16(65535) - values if image.info.get("white_is_zero") else values)
        if isinstance(image.info.get("transparency"), int):  # PNG: one gray that is transparent
            gray[values == image.info["transparency"]] = 1
        return gray[..., None]
    if mode == "I":
        if (wide := np.array(image)).min() < 0 or wide.max() > 65535:
            raise BadImage("32-bit integers beyond 0..65535")
        return to_pixels(wide.astype(np.uint16))[..., None]
    if mode == "F":
        return to_pixels(np.array(image))[..., None]
    if mode == "LAB":
        raise BadImage("LAB colours, which are not read")
    if image.has_transparency_data:
        image = image.convert("LA" if mode in ("1", "L", "LA", "La") else "RGBA")
        values = np.asarray(image)
        return over_white(values[..., :-1], values[..., -1:])
    if mode in ("1", "L"):
        return np.array(image.convert("L"))[..., None]
    return np.array(image if mode == "RGB" else image.convert("RGB"))


# ---- n-channel data ----


def _decode_tiff(file: IO[bytes], in_chans: int) -> Pixels | None:
    """What tifffile should read, or pages that Pillow must decompress for it; None for an ordinary picture."""
    try:
        return tiff.decode(file, in_chans)
    except tiff.NeedsPillow as error:
        file.seek(0)
        try:
            image = open_pillow(file)
            pages = getattr(image, "n_frames", 1)
        except UnidentifiedImageError:  # more than 4 compressed channels to a pixel
            raise BadImage(f"{' '.join(str(error).split())[:80]}: pip install imagecodecs") from error
        if not error.all_pages or pages != in_chans:
            return None
    channels = []
    for page in range(pages):
        image.seek(page)
        check_size(image.height, image.width)
        image.load()
        channels.append(_values(image))
    if {channel.shape for channel in channels} != {(*channels[0].shape[:2], 1)}:
        raise BadImage("pages of different sizes or with colours cannot be channels")
    return np.concatenate(channels, axis=2)
