"""TIFFs as microscopes, GIS and X-ray machines write them, whatever lies beside or compresses them."""

from __future__ import annotations

import importlib.util
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from image_files import reason, tiff, unit
from PIL import Image

from maekit.data.images import decode, frames_left_out

PAGES = [np.full((12, 16), 1000 * (number + 1), np.uint16) for number in range(5)]
STACKED = unit(np.stack(PAGES, axis=-1))


def one_by_one(pages: list[npt.NDArray[np.uint16]]) -> bytes:
    """As a loop over `TiffWriter.write`, imageio's mimwrite, and `imwrite(append=True)` write a stack."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack")
    return file.getvalue()


def by_pillow(images: list[npt.NDArray[Any]], **options: Any) -> bytes:
    first, *others = (Image.fromarray(image) for image in images)
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=others, **options)
    return file.getvalue()


def test_pages_that_were_written_one_by_one_are_a_stack() -> None:
    """tifffile takes each for a series of its own; the first would be repeated for every channel."""
    data = one_by_one(PAGES)
    np.testing.assert_array_equal(decode(data, 5), STACKED)
    np.testing.assert_array_equal(decode(one_by_one(PAGES[:3]), 3), STACKED[..., :3])
    assert [frames_left_out(data, channels) for channels in (1, 3, 5)] == [4, 4, 0]
    assert reason(data, 4) == "5 channels where --in-chans is 4"


def test_a_smaller_image_behind_the_first_is_no_page_of_it() -> None:
    data = one_by_one([PAGES[0], PAGES[1][::2, ::2]])
    np.testing.assert_array_equal(decode(data, 1), STACKED[..., :1])
    assert frames_left_out(data, 1) == 0


def write_positions(folder: Path) -> list[Path]:
    """Two positions of a microscope, a file each, both with the whole set's OME metadata, which names both files."""
    ids = ["11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"]
    paths = [folder / f"position{number}.ome.tif" for number in range(2)]
    for own, path in enumerate(paths):
        text = "".join(
            f'<Image ID="Image:{number}"><Pixels ID="Pixels:{number}" DimensionOrder="XYCZT" Type="uint16" SizeX="16" '
            'SizeY="12" SizeC="2" SizeZ="1" SizeT="1">'
            + "".join(f'<Channel ID="Channel:{number}:{c}" SamplesPerPixel="1"/>' for c in range(2))
            + "".join(
                f'<TiffData IFD="{c}" FirstC="{c}" FirstZ="0" FirstT="0" PlaneCount="1">'
                f'<UUID FileName="{other.name}">urn:uuid:{ids[number]}</UUID></TiffData>'
                for c in range(2)
            )
            + "</Pixels></Image>"
            for number, other in enumerate(paths)
        )
        head = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        description = f'{head}UUID="urn:uuid:{ids[own]}">{text}</OME>'
        with tifffile.TiffWriter(path, ome=False) as writer:
            for c in range(2):
                writer.write(
                    PAGES[2 * own + c], description=description if c == 0 else None, metadata=None,
                    contiguous=False, photometric="minisblack",
                )  # fmt: skip
    return paths


def test_a_file_gives_its_own_pixels_whatever_its_metadata_name(tmp_path: Path) -> None:
    """tifffile follows OME's metadata into other files: every position would be the first."""
    for own, path in enumerate(write_positions(tmp_path)):
        expected = STACKED[..., 2 * own : 2 * own + 2]
        np.testing.assert_array_equal(decode(path, 2), expected)
        np.testing.assert_array_equal(decode(path.read_bytes(), 2), expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_inverted_x_rays_are_turned_around_by_every_decompressor(compression: str | None) -> None:
    """LZW of 16 bits is Pillow's, which leaves them as they are."""
    data = by_pillow([PAGES[0]], compression=compression, tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(data, 1)[..., 0], unit(65535 - PAGES[0]))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_overviews_are_no_channels_by_any_decompressor(compression: str | None) -> None:
    """A cloud-optimised GeoTIFF of one band with two overviews has three pages."""
    full = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    data = by_pillow([full, full[::2, ::2].copy(), full[::4, ::4].copy()], compression=compression)
    np.testing.assert_array_equal(decode(data, 3), np.repeat(unit(full)[..., None], 3, axis=2))


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs undoes LZW of any samples")
def test_compressed_samples_that_nobody_can_read_are_named() -> None:
    """One page of five samples in LZW: tifffile lacks the decompressor, and Pillow takes no more than four samples."""
    data = bytearray(tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig"))
    place = data.index(struct.pack("<HHI", 259, 3, 1))  # the tag of the compression
    data[place + 8 : place + 10] = struct.pack("<H", 5)
    said = reason(bytes(data), 5)
    assert "LZW" in said
    assert said.endswith("pip install imagecodecs")


def test_floats_without_data_are_named() -> None:
    """GDAL's mark in a float raster, or one so large that its square overflows; 0 of integers is black."""
    pixels = np.random.default_rng(0).random((8, 8, 4), np.float32)
    pixels[:2] = -9999
    marked: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}

    def tag(text: str) -> dict[str, Any]:
        return {**marked, "extratags": [(42113, 2, 0, text, True)]}

    assert reason(tiff(pixels, **tag("-9999")), 4) == "64 values without data (GDAL_NODATA -9999): fill them first"
    np.testing.assert_array_equal(decode(tiff(pixels, **tag("-1")), 4), pixels)
    pixels[:2] = np.finfo(np.float32).min
    assert reason(tiff(pixels, **marked), 4) == "a value beyond 1e+18, as mark pixels without data: fill them first"
    black = tiff(PAGES[0] * 0, photometric="minisblack", extratags=[(42113, 2, 0, "0", True)])
    np.testing.assert_array_equal(decode(black, 1), np.zeros((12, 16, 1)))
