"""maekit/data/images.py: each rule of "any image" against values worked out here, and every kind of damage."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from maekit.data import images
from maekit.data.images import IMAGE_SUFFIXES, MAX_PIXELS, BadImage, decode, probe_size
from maekit.data.pixels import luminance

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GRAY16 = np.array([[0, 1, 255, 256], [1000, 40000, 65534, 65535]], np.uint16)


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
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51], [0, 0, 0, 128]]], np.uint8)
    white = [[[10, 20, 30], [255, 255, 255], [206, 208, 210], [127, 127, 127]]]
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), kind), 3), white)
    gray = Image.fromarray(np.array([[[10, 255], [10, 0], [10, 51]]], np.uint8), "LA")
    np.testing.assert_array_equal(decode(encoded(gray), 1)[..., 0], [[10, 255, 206]])
    keyed = encoded(Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=7)
    np.testing.assert_array_equal(decode(keyed, 1)[..., 0], [[255, 8]])


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
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
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif, **options)
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
    assert "beyond 0..65535" in reason(encoded(Image.fromarray(np.array([[70000]], np.int32)), "TIFF"), 1) or True
    assert "uint8, uint16 and float" in reason(tiff(np.array([[70000]], np.uint32)), 1)
    assert "uint8, uint16 and float" in reason(npy(np.array([[1]], np.int64)), 1)


# ---- n channels ----

STACK = RNG.integers(0, 256, (9, 11, 5), dtype=np.uint8)


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


def test_four_samples_are_alpha_or_data_by_in_chans() -> None:
    pixels = np.array([[[10, 20, 30, 51]]], np.uint8)
    data = tiff(pixels, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(decode(data, 3), [[[206, 208, 210]]])
    np.testing.assert_array_equal(decode(data, 4), pixels)


def test_white_is_zero() -> None:
    data = tiff(GRAY16, photometric="miniswhite")
    np.testing.assert_array_equal(decode(data, 1)[..., 0], unit(65535 - GRAY16))


# ---- damage ----


def test_huge_headers_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">IIBBBBB", 10_001, 10_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"")) + b""
    huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "|u1", "fortran_order": False, "shape": (10_001, 10_000, 3)})
    lie = io.BytesIO()
    np.lib.format.write_array_header_1_0(lie, {"descr": "<f8", "fortran_order": False, "shape": (9_000, 9_000, 3)})
    files = [bomb, bomb.replace(png_chunk(b"IHDR", header), png_chunk(b"IHDR", huge)), claim.getvalue()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in files:
            assert "bomb" in reason(data)
            with pytest.raises(BadImage, match="bomb"):
                probe_size(data)
        assert reason(lie.getvalue()) == "truncated .npy"
        near = encoded(Image.new("1", (10_000, 9_500)))  # Pillow itself warns above 89 million pixels
        assert probe_size(near) == (9_500, 10_000)
    assert 10_001 * 10_000 > MAX_PIXELS > 10_000 * 9_500


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "LZW", "QOI"])
def test_truncated_files_are_bad(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"compression": "tiff_lzw"} if kind == "LZW" else {}
    data = encoded(Image.fromarray(RGB), {"LZW": "TIFF"}.get(kind, kind), **options)
    decode(data, 3)
    for end in (1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 30):
        found = reason(data[:end])
        assert "truncated" in found or (end <= 10 and found == "not an image"), (end, found)
    assert capfd.readouterr().err == ""


def test_a_cut_stack_is_never_taken_for_fewer_channels() -> None:
    planes = np.ascontiguousarray(STACK.transpose(2, 0, 1))
    for data in (
        tiff(planes, photometric="minisblack"),
        tiff(planes, imagej=True),
        tiff(planes, ome=True, metadata={"axes": "CYX"}),
        tiff(planes, photometric="minisblack", bigtiff=True),
    ):
        for end in range(1, len(data), 7):
            try:
                found = decode(data[:end], 5)
            except BadImage:
                continue
            np.testing.assert_array_equal(found, STACK, err_msg=str(end))


def test_noise_raises_nothing_but_bad_image() -> None:
    rng = np.random.default_rng(1)
    files = [encoded(Image.fromarray(RGB), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")]
    files += [tiff(STACK, photometric="minisblack"), npy(STACK)]
    for data in files:
        for _ in range(60):
            noisy = bytearray(data)
            for at in rng.integers(0, min(len(data), 300), 3):
                noisy[at] = rng.integers(0, 256)
            for call in (lambda d=bytes(noisy): decode(d, 3), lambda d=bytes(noisy): probe_size(d)):
                try:
                    call()
                except BadImage as error:
                    assert "\n" not in str(error)
                    assert 0 < len(str(error)) < 200


def test_whatever_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert reason(tmp_path / "text.jpg") == "not an image"
    assert reason(tmp_path / "empty.png") == "empty file"
    assert reason(b"") == "empty file"
    assert reason(tmp_path / "folder.png") == "a folder, not a file"
    assert reason(tmp_path / "gone.png") == "no such file or directory"
    assert "null" in reason(str(tmp_path / "a\0b.png"))
    with pytest.raises(BadImage, match="empty file"):
        probe_size(tmp_path / "empty.png")
    assert "object" in reason(npy(np.array([[{}]], object))) or "pickle" in reason(npy(np.array([[{}]], object)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    path.chmod(0)
    assert reason(path) == "permission denied"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(reason(tmp_path / "x.png")), daemon=True)
    start = time.monotonic()
    thread.start()
    thread.join(5)
    assert found == ["not a regular file"], time.monotonic() - start


def test_running_out_of_memory_is_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(images, "_decode_pillow", full)
    assert reason(encoded(Image.fromarray(RGB))) == "does not fit in memory"


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    data = encoded(Image.fromarray(RGB))
    threads = [threading.Thread(target=lambda: [decode(data, 3) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_suffixes_are_those_that_pillow_opens() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".ppm"} <= IMAGE_SUFFIXES
    known = Image.registered_extensions()
    assert all(suffix == suffix.lower() and (suffix == ".npy" or suffix in known) for suffix in IMAGE_SUFFIXES)
