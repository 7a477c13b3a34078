"""maekit/data/images.py: each rule of "any image" against values worked out here."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from image_files import RGB, RNG, STACK, encoded, npy, png16, reason, tiff, unit
from PIL import Image

from maekit.data.images import IMAGE_SUFFIXES, decode, frames_left_out, probe_size
from maekit.data.pixels import BadImage, luminance

LOSSLESS: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
GRAY16 = np.array([[0, 1, 255, 256], [1000, 40000, 65534, 65535]], np.uint16)


# ---- 8 bits ----


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "QOI"])
def test_colour_is_kept_exactly(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RGB), kind)
    found = decode(data, 3)
    np.testing.assert_array_equal(found, RGB)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    path = tmp_path / "x.any"
    path.write_bytes(data)
    np.testing.assert_array_equal(decode(path, 3), RGB)
    np.testing.assert_array_equal(decode(str(path), 3), RGB)
    assert probe_size(path) == (13, 17)


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_gray_is_replicated(in_chans: int) -> None:
    found = decode(encoded(Image.fromarray(RGB[..., 0])), in_chans)
    np.testing.assert_array_equal(found, np.repeat(RGB[..., :1], in_chans, axis=2))


def test_colour_becomes_luminance_for_one_channel() -> None:
    found = decode(encoded(Image.fromarray(RGB)), 1)
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.fromarray(RGB).convert("L")))
    np.testing.assert_allclose(luminance(RGB / np.float32(255))[..., 0] * 255, found[..., 0], atol=0.6)


@pytest.mark.parametrize("in_chans", [2, 4])
def test_pictures_are_refused_by_models_of_other_channels(in_chans: int) -> None:
    data = encoded(Image.fromarray(RGB))
    assert reason(data, in_chans) == f"3 channels where --in-chans is {in_chans}"


def test_one_bit() -> None:
    bits = RGB[..., 0] > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)), 1)[..., 0], np.where(bits, 255, 0))


def test_cmyk_is_converted() -> None:
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0] = 255  # cyan: no red
    for kind, tolerance in (("TIFF", 0), ("JPEG", 3)):  # Pillow writes and reads CMYK JPEG inverted, as Adobe does
        found = decode(encoded(Image.fromarray(inks, "CMYK"), kind, **({"quality": 100} if kind == "JPEG" else {})), 3)
        np.testing.assert_allclose(found.astype(int), np.broadcast_to([0, 255, 255], (8, 8, 3)), atol=tolerance)


def test_palette_with_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = encoded(image, transparency=bytes([255, 0, 51]))
    np.testing.assert_array_equal(decode(data, 3), [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]])
    np.testing.assert_array_equal(decode(encoded(image), 3), [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])


def test_alpha_lies_over_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51], [0, 2, 3, 200]]], np.uint8)
    white = [[[10, 20, 30], [255, 255, 255], [206, 208, 210], [55, 57, 57]]]
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), kind), 3), white)
    gray = Image.fromarray(np.array([[[10, 255], [10, 0], [10, 51]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode(encoded(gray), 1)[..., 0], [[10, 255, 206]])
    keyed = encoded(Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=7)
    np.testing.assert_array_equal(decode(keyed, 1)[..., 0], [[255, 8]])


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind, {}))
        np.testing.assert_array_equal(decode(data, 3), np.broadcast_to([250, 0, 0], (5, 6, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    scene = np.zeros((16, 24, 3), np.uint8)  # left half red, and below it blue: no symmetry
    scene[:, :12] = (240, 10, 10)
    scene[8:, :12] = (10, 10, 240)
    as_stored = {  # how a camera with this flag stores the scene: the inverse of what the flag asks for
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: np.rot90(scene, 1),
        7: scene[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(scene, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif, **LOSSLESS.get(kind, {}))
    assert probe_size(data) == (16, 24)
    np.testing.assert_allclose(decode(data, 3).astype(int), scene, atol=3)


def test_orientation_of_a_tiff_that_pillow_does_not_read() -> None:
    stored = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    data = tiff(stored, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert probe_size(data) == (7, 5)
    np.testing.assert_array_equal(decode(data, 3), unit(np.rot90(stored, -1)))


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encoded(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(decode(data, 3), RGB)
    assert probe_size(data) == (13, 17)


# ---- 16 bits and floats ----


def test_sixteen_bit_gray_is_divided_by_65535() -> None:
    pgm = b"P5 4 2 65535\n" + GRAY16.astype(">u2").tobytes()
    little = encoded(Image.fromarray(GRAY16))
    for data in (little, encoded(Image.fromarray(GRAY16), "TIFF"), tiff(GRAY16, byteorder=">"), pgm, npy(GRAY16)):
        found = decode(data, 1)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[..., 0], unit(GRAY16))
    np.testing.assert_array_equal(decode(little, 3), np.repeat(unit(GRAY16)[..., None], 3, axis=2))


def test_sixteen_bit_colour_keeps_all_bits() -> None:
    colour = RNG.integers(0, 65536, (9, 11, 3)).astype(np.uint16)
    planes = np.ascontiguousarray(colour.transpose(2, 0, 1))
    for data in (
        png16(colour),
        tiff(colour, photometric="rgb"),
        tiff(colour, photometric="rgb", compression="zlib"),
        tiff(colour, photometric="rgb", byteorder=">"),
        tiff(planes, photometric="rgb", planarconfig="separate"),
    ):
        np.testing.assert_array_equal(decode(data, 3), unit(colour))


def test_sixteen_bit_colour_in_a_compression_that_only_pillow_has(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = RNG.integers(0, 65536, (9, 11, 3)).astype(np.uint16)
    data = tiff(colour, photometric="rgb", compression="zlib")

    def missing(*args: Any, **options: Any) -> Any:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    np.testing.assert_array_equal(decode(data, 3), unit(colour))


def test_sixteen_bit_alpha_lies_over_white() -> None:
    for channels in (2, 4):
        pixels = RNG.integers(0, 65536, (6, 5, channels)).astype(np.uint16)
        pixels[0, 0, -1], pixels[0, 1, -1] = 0, 65535
        exact = pixels.astype(np.float64) / 65535
        white = exact[..., :-1] * exact[..., -1:] + 1 - exact[..., -1:]
        files = [png16(pixels)]
        if channels == 4:
            files.append(tiff(pixels, photometric="rgb", extrasamples=["unassalpha"]))
        for data in files:
            np.testing.assert_allclose(decode(data, 3), np.broadcast_to(white, (6, 5, 3)), atol=1e-6)


def test_sixteen_bit_transparent_colour() -> None:
    colour = np.array([[[256, 257, 258], [1, 1, 1]]], np.uint16)
    found = decode(png16(colour, key=struct.pack(">HHH", 256, 257, 258)), 3)
    np.testing.assert_array_equal(found, [[[1, 1, 1], unit(colour)[0, 1]]])
    found = decode(png16(colour[..., :1], key=struct.pack(">H", 1)), 1)
    np.testing.assert_array_equal(found[..., 0], [[unit(colour)[0, 0, 0], 1]])


def test_floats_stay_as_they_are() -> None:
    values = np.array([[-3.5, 0.25], [1e6, 7]], np.float32)
    for data in (tiff(values), npy(values), npy(values.astype(np.float64)), npy(values.astype(">f4"))):
        found = decode(data, 1)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[..., 0], values)
    colour = RNG.random((5, 7, 3)).astype(np.float32)
    np.testing.assert_array_equal(decode(tiff(colour, photometric="rgb"), 3), colour)
    for bad in (np.nan, np.inf, 1e300):
        assert reason(npy(np.array([[0.5, bad]])), 1) == "values that are not finite"
    assert reason(tiff(np.array([[0.5, np.nan]], np.float32)), 1) == "values that are not finite"


def test_wide_integers_are_refused() -> None:
    assert "uint8, uint16 and float" in reason(tiff(np.array([[70000]], np.int32)), 1)
    assert "uint8, uint16 and float" in reason(tiff(np.array([[70000]], np.uint32)), 1)
    assert "uint8, uint16 and float" in reason(npy(np.array([[1]], np.int64)), 1)


# ---- n channels ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_n_channel_layouts(dtype: Any) -> None:
    stack = STACK.astype(dtype)
    planes = np.ascontiguousarray(stack.transpose(2, 0, 1))
    expected = unit(stack) if dtype == np.uint16 else stack
    files = [
        tiff(planes, photometric="minisblack"),  # pages
        tiff(planes, photometric="minisblack", compression="zlib"),
        tiff(planes, photometric="minisblack", planarconfig="separate"),
        tiff(stack, photometric="minisblack", planarconfig="contig"),
        tiff(planes, imagej=True),
        tiff(planes, ome=True, metadata={"axes": "CYX"}),
        tiff(planes, photometric="minisblack", bigtiff=True),
        npy(stack),
        npy(np.asfortranarray(stack)),
    ]
    for number, data in enumerate(files):
        found = decode(data, 5)
        assert found.dtype == expected.dtype, number
        np.testing.assert_array_equal(found, expected, err_msg=str(number))
        assert probe_size(data) == (9, 11)
        assert found.flags.writeable
        assert found.flags.c_contiguous
        assert reason(data, 4) == "5 channels where --in-chans is 4"
    two = tiff(stack[..., :2], photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(decode(two, 2), expected[..., :2])
    assert "--in-chans" in reason(two, 3)
    assert "--in-chans" in reason(files[3], 3)


def test_pages_that_only_pillow_decompresses() -> None:
    pages = [Image.fromarray(np.ascontiguousarray(STACK[..., page])) for page in range(5)]
    data = encoded(pages[0], "TIFF", compression="tiff_lzw", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(data, 5), STACK)
    np.testing.assert_array_equal(decode(data, 1), STACK[..., :1])
    assert reason(data, 4) == "5 channels where --in-chans is 4"


def test_three_gray_pages_are_three_channels_and_other_numbers_the_first_page() -> None:
    planes = np.ascontiguousarray(STACK.transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(tiff(planes[:3], photometric="minisblack"), 3), STACK[..., :3])
    np.testing.assert_array_equal(decode(tiff(planes, photometric="minisblack"), 3), np.repeat(STACK[..., :1], 3, 2))


def test_frames_that_are_left_out_are_counted() -> None:
    """What `decode` does not read: pages, frames of animations; neither channels, nor a pyramid's smaller copies."""
    planes, colours = np.ascontiguousarray(STACK.transpose(2, 0, 1)), np.stack([STACK[..., :3]] * 4)
    pyramid = io.BytesIO()
    with tifffile.TiffWriter(pyramid) as writer:
        writer.write(STACK[..., :3], photometric="rgb", subifds=1)
        writer.write(np.ascontiguousarray(STACK[::2, ::2, :3]), photometric="rgb", subfiletype=1)
    frames = [Image.new("RGB", (5, 4), (shade, 0, 0)) for shade in (0, 90, 180)]
    all_frames: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    cases: list[tuple[bytes, dict[int, int]]] = [
        (tiff(planes, photometric="minisblack"), {5: 0, 1: 4, 3: 4}),
        (tiff(planes, imagej=True), {5: 0, 1: 4, 3: 4}),
        (tiff(planes[:3], photometric="minisblack"), {3: 0, 1: 2}),
        (tiff(planes, photometric="minisblack", planarconfig="separate"), {5: 0}),
        (tiff(colours, photometric="rgb"), {3: 3, 12: 0}),
        (pyramid.getvalue(), {3: 0}),
        (npy(STACK), {5: 0}),
        (encoded(frames[0], "JPEG"), {3: 0}),
        (encoded(frames[0], "MPO", **all_frames), {3: 0}),
        *((encoded(frames[0], form, **all_frames), {3: 2}) for form in ("GIF", "PNG", "WEBP")),
    ]
    for number, (data, expected) in enumerate(cases):
        for in_chans, left in expected.items():
            assert frames_left_out(data, in_chans) == left, (number, in_chans)
            decode(data, in_chans)
    with pytest.raises(BadImage, match="empty file"):
        frames_left_out(b"", 3)


def test_four_samples_are_alpha_or_data_by_in_chans() -> None:
    pixels = np.array([[[10, 20, 30, 51]]], np.uint8)
    data = tiff(pixels, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(decode(data, 3), [[[206, 208, 210]]])
    np.testing.assert_array_equal(decode(data, 4), pixels)


def test_white_is_zero() -> None:
    data = tiff(GRAY16, photometric="miniswhite")
    np.testing.assert_array_equal(decode(data, 1)[..., 0], unit(65535 - GRAY16))


def test_suffixes_are_those_that_pillow_opens() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".ppm"} <= IMAGE_SUFFIXES
    known = {*Image.registered_extensions(), ".npy", ".dcm", ".dicom"}
    assert all(suffix == suffix.lower() and suffix in known for suffix in IMAGE_SUFFIXES)
