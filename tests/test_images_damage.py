"""maekit/data/images.py: whatever is wrong with a file becomes BadImage, before it costs memory or time."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import RGB, STACK, encoded, npy, png_chunk, qoi, reason, tiff
from PIL import Image

from maekit.data import images
from maekit.data.images import MAX_PIXELS, BadImage, decode, probe_size

PROMISE = "bad images: each is named, the others keep their order and masks"


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


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "LZW", "ZIP", "QOI"]
)
def test_truncated_files_are_bad(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "QOI":
        data = qoi(RGB)
    elif kind == "ZIP":  # with its header first, so that only pixels are cut
        data = tiff(RGB, photometric="rgb", compression="zlib")
    elif kind == "LZW":
        data = encoded(Image.fromarray(RGB), "TIFF", compression="tiff_lzw")
    else:
        data = encoded(Image.fromarray(RGB), kind)
    assert decode(data, 3).shape == RGB.shape
    for end in (1, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 30):
        found = reason(data[:end])
        words = "broken QOI" if kind == "QOI" else "truncated"  # Pillow below 12 stumbles there in Python
        assert "truncated" in found or words in found or (end <= 10 and found == "not an image"), (end, found)
    assert capfd.readouterr().err == ""


def test_a_cut_n_channel_tiff_says_so() -> None:
    for compression in (None, "zlib"):
        data = tiff(STACK, photometric="minisblack", planarconfig="contig", compression=compression)
        assert reason(data[:-5], 5) == "truncated TIFF"


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
    reasons: list[str] = []
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
                    reasons.append(str(error))
    assert len(reasons) > 100
    assert all(0 < len(text) < 200 and "\n" not in text for text in reasons)


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
    assert reason(npy(STACK).replace(b"NUMPY\1", b"NUMPY\3"), 5) == ".npy version 3.0; 1.0 and 2.0 are read"
    assert reason(npy(np.array([[{}]], object))) == ".npy of object; uint8, uint16 and float are read"


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
    thread.start()
    thread.join(5)
    assert found == ["not a regular file"]


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
