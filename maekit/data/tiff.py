"""The TIFFs that Pillow cannot read or reads wrongly: n channels, pages as channels, 16-bit colour, floats.

Pillow drops the low byte of 16-bit colour and the second channel of a two-channel image; `decode` takes over there and
leaves ordinary pictures to Pillow. Legend: H height, W width, C channels, S samples per pixel.
"""

from __future__ import annotations

import logging
from typing import IO, Any, Literal

import numpy as np
import tifffile

from maekit.data.pixels import (
    MAX_PIXELS,
    BadImage,
    Pixels,
    check_size,
    over_white,
    to_pixels,
    upright,
    wrong_channels,
)

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First four bytes of a TIFF or BigTIFF, little or big endian."""

MANY_PAGES = 256
"""Pages from which on tifffile's own notes about them are not asked: it needs 16 s to order 5,000 by these."""

_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _SEPARATED = 0, 1, 2, 5
_PLAIN = (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _SEPARATED)  # palettes, YCbCr, fax are Pillow's or nobody's
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2
_ORIENTATION = 274

# Both report damage to their loggers and go on; what matters is raised as BadImage instead, with the file's name.
for _library in ("tifffile", "PIL"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)


class NeedsPillow(Exception):
    """tifffile lacks a decompressor for this file; Pillow's libtiff may have it."""

    def __init__(self, message: str, all_pages: bool) -> None:
        """all_pages: whether every page was wanted, as a channel, or only the first."""
        super().__init__(message)
        self.all_pages = all_pages


def size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels after the orientation tag, from the first page's header.

    Raises:
        BadImage: a damaged header, or a size that is refused.
    """
    page = _first_page(_opened(file))
    height, width = page.imagelength, page.imagewidth
    check_size(height, width)
    return (width, height) if _orientation(page) >= 5 else (height, width)


def decode(file: IO[bytes], in_chans: int) -> Pixels | None:
    """The image H W C, or None where Pillow should read it; C may still differ from `in_chans`.

    All pages together are the channels where their number is `in_chans` and the pages are not colour pictures;
    otherwise a model of 1 or 3 channels sees the first page.

    Raises:
        BadImage: another number of channels, a bomb, a truncated file.
        NeedsPillow: a compression that tifffile cannot undo.
    """
    opened = _opened(file)
    page = _first_page(opened)
    height, width = page.imagelength, page.imagewidth
    check_size(height, width)
    _check_chain(file)
    series = _first_series(opened, page, file)
    if _pages_are_channels(page, series, in_chans):
        _check_bytes(series.nbytes, page)
        _check_whole(series, file)
        return upright(_stack(series, page), _orientation(page))
    channels = series.size // (height * width)
    if in_chans not in (1, 3) and channels != 1:
        raise wrong_channels(channels, in_chans)
    _check_bytes(page.nbytes, page)
    _check_whole(page, file)  # for Pillow's sake too: its libtiff would complain on the terminal
    if _ordinary(page):
        return None
    return upright(_picture(page), _orientation(page))


def frames_left_out(file: IO[bytes], in_chans: int) -> int:
    """Pages of the first one's size (or ImageJ's images under one header) that `decode` does not read, by the headers.

    Smaller copies (pyramids, thumbnails) are no images of their own.

    Raises:
        BadImage: a damaged header.
    """
    opened = _opened(file)
    page = _first_page(opened)
    series = _first_series(opened, page, file)
    if _pages_are_channels(page, series, in_chans):
        return 0
    return max(1, series.size // (page.imagelength * page.imagewidth * page.samplesperpixel)) - 1


def _pages_are_channels(page: tifffile.TiffPage, series: tifffile.TiffPageSeries, in_chans: int) -> bool:
    """Whether all pages and samples together are the channels of one image."""
    channels = series.size // (page.imagelength * page.imagewidth)
    wanted = in_chans not in (1, 3) or (page.samplesperpixel == 1 and in_chans == 3)
    return channels == in_chans and wanted and page.photometric in _PLAIN


def _opened(file: IO[bytes], **kinds: Any) -> tifffile.TiffFile:
    """kinds: is_shaped=False and the like, a kind of TIFF that it shall not be read as."""
    try:
        # One file is one image: OME's and Micro-Manager's metadata name other files, whose pixels tifffile would give.
        return tifffile.TiffFile(file, _multifile=False, is_mmstack=False, is_ndtiff=False, **kinds)
    except Exception as error:  # damaged headers raise about everything
        raise BadImage("broken or truncated TIFF header") from error


def _first_series(opened: tifffile.TiffFile, page: tifffile.TiffPage, file: IO[bytes]) -> tifffile.TiffPageSeries:
    """The first page and those that belong to it; pages that tifffile itself wrote one by one count as one series."""
    if opened.is_shaped and (len(opened.pages) > MANY_PAGES or _is_loose(opened.series, page)):
        file.seek(0)
        opened = _opened(file, is_shaped=False)
    return opened.series[0]


def _is_loose(series: list[tifffile.TiffPageSeries], page: tifffile.TiffPage) -> bool:
    """Whether pages were written one by one, so that each is said to be a series of its own."""
    return len(series) > 1 and series[0].size == page.size


def _first_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    try:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage), page
        numbers = (page.imagelength, page.imagewidth, page.samplesperpixel, page.bitspersample, page.photometric)
        assert all(isinstance(number, int) for number in numbers), numbers  # a damaged tag holds a tuple
    except Exception as error:
        raise BadImage("broken or truncated TIFF header") from error
    return page


def _check_chain(file: IO[bytes]) -> None:
    """Raise BadImage where a page header is said to lie beyond the end of the file.

    tifffile would go on with the pages it has, and a stack cut after its first page would pass for a gray image.
    """
    end = file.seek(0, 2)
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = int.from_bytes(head[2:4], order) == 43  # BigTIFF: 8-byte offsets
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
    offset = int.from_bytes(head[8:16] if big else head[4:8], order)
    seen = set()
    while offset and offset not in seen:
        seen.add(offset)
        file.seek(offset)
        entries = int.from_bytes(file.read(count_bytes), order)
        next_at = offset + count_bytes + entries * entry_bytes
        if next_at + offset_bytes > end:
            raise BadImage("truncated TIFF")
        file.seek(next_at)
        offset = int.from_bytes(file.read(offset_bytes), order)


def _orientation(page: tifffile.TiffPage) -> int:
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _ordinary(page: tifffile.TiffPage) -> bool:
    """Whether Pillow reads this page and keeps all of it."""
    if page.photometric not in _PLAIN:
        return True
    if page.bitspersample > 8 or page.sampleformat != 1:
        return False
    gray = page.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK)
    if gray and page.samplesperpixel > 1:  # Pillow keeps the second sample only where it is marked as alpha
        return page.samplesperpixel == 2 and _alpha_kind(page) == _UNASSOCIATED_ALPHA
    return page.samplesperpixel <= 4


def _alpha_kind(page: tifffile.TiffPage) -> int | None:
    """The first extra sample's meaning where it is alpha, else None."""
    kind = int(page.extrasamples[0]) if page.extrasamples else 0
    return kind if kind in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA) else None


def _check_whole(part: Any, file: IO[bytes]) -> None:
    """Raise BadImage where pixels are said to lie beyond the end of the file: tifffile would fill with zeros."""
    end = file.seek(0, 2)
    pages = [page for page in part.pages if page is not None] if hasattr(part, "pages") and part.pages else [part]
    claimed = 0
    if isinstance(part, tifffile.TiffPageSeries) and part.dataoffset is not None:
        claimed = part.dataoffset + part.nbytes  # ImageJ: one page header for a whole stack
    for page in pages:
        segments = zip(page.dataoffsets, page.databytecounts, strict=False)
        claimed = max([claimed, *(offset + count for offset, count in segments)])
    if claimed > end:
        raise BadImage("truncated TIFF")


def _check_bytes(decoded: int, page: tifffile.TiffPage) -> None:
    """Refuse what would fill the memory although its height and width are small: many samples, or one huge tile.

    Raises:
        BadImage: more decoded bytes than MAX_PIXELS pixels of four floats have.
    """
    tile = int(page.tilewidth or 0) * int(page.tilelength or 0) * max(1, int(page.bitspersample) // 8)
    if max(decoded, tile * int(page.samplesperpixel)) > 16 * MAX_PIXELS:
        raise BadImage(f"decodes to more than {16 * MAX_PIXELS:,} bytes (a decompression bomb?)")


def _values(part: Any) -> Any:
    try:
        return part.asarray(maxworkers=1)  # the loader has its own processes
    except Exception as error:
        if "imagecodecs" in str(error):
            raise NeedsPillow(str(error), isinstance(part, tifffile.TiffPageSeries)) from error
        raise


def _stack(series: tifffile.TiffPageSeries, page: tifffile.TiffPage) -> Pixels:
    """All pages and samples of a series as the channels of one image, in the file's order."""
    axes = series.axes
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise BadImage(f"TIFF axes {axes} are not an image")
    values = np.moveaxis(_values(series), (axes.index("Y"), axes.index("X")), (0, 1))
    values_HWC = values.reshape(values.shape[0], values.shape[1], -1)
    return _to_pixels(values_HWC, page)


def _picture(page: tifffile.TiffPage) -> Pixels:
    """The first page as gray (C 1), colour (C 3, alpha over white), or n-channel data."""
    values = _values(page)
    if page.axes == "YX":
        values = values[..., None]
    elif page.axes == "SYX":  # planar: channel first
        values = values.transpose(1, 2, 0)
    elif page.axes != "YXS":
        raise BadImage(f"TIFF axes {page.axes} are not an image")
    values_HWC = _to_pixels(values, page)
    if page.photometric == _SEPARATED and values_HWC.shape[2] == 4:
        white = 255 if values_HWC.dtype == np.uint8 else 1
        ink = (white - values_HWC).astype(np.float32) / white
        light = ink[..., :3] * ink[..., 3:]
        return np.round(light * 255).astype(np.uint8) if white == 255 else light
    colours = 3 if page.photometric == _RGB else 1
    alpha = _alpha_kind(page)
    if alpha is not None and values_HWC.shape[2] == colours + 1:
        return over_white(values_HWC[..., :colours], values_HWC[..., colours:], alpha == _ASSOCIATED_ALPHA)
    return values_HWC


def _to_pixels(values: Any, page: tifffile.TiffPage) -> Pixels:
    """The numbers as pixels, black as zero.

    Raises:
        BadImage: floats of which some are GDAL's mark of missing ones; integers' mark is mostly 0, and black will do.
    """
    if page.photometric == _MIN_IS_WHITE and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    if values.dtype.kind == "f" and page.nodata:
        missing = np.count_nonzero(values == values.dtype.type(page.nodata))
        if missing:
            raise BadImage(f"{missing:,} values without data (GDAL_NODATA {page.nodata:g}): fill them first")
    return to_pixels(values)
