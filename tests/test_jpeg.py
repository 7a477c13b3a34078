"""JPEGs decoded past Pillow: the same bits as Pillow's, and its word on what is damaged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maekit.data import images, jpeg
from maekit.data.images import BadImage, decode
from maekit.data.pixels import Pixels, Window


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with noise upon them, so that chroma and every frequency are there."""
    random = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, **how)
    return buffer.getvalue()


def by_pillow(monkeypatch: pytest.MonkeyPatch, data: bytes, *rest: Any) -> Pixels | str:
    """What `decode` gives, or says, when Pillow decodes."""
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "decode_jpeg", refuse)
        try:
            return decode(data, 3, *rest)
        except BadImage as error:
            return str(error)


def refuse(*_: Any, **__: Any) -> None:
    raise ValueError


KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "RGB in the file": {"keep_rgb": True, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 19), (64, 48), (201, 133)])
def test_the_pixels_are_pillows(kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(*size), **KINDS[kind])
    expected = by_pillow(monkeypatch, data)
    monkeypatch.setattr(images, "_values", refuse)  # Pillow does not decode any more
    assert np.array_equal(decode(data, 3), expected)


def test_gray_stays_one_channel_until_it_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(31, 22, "L"))
    expected = by_pillow(monkeypatch, data)
    monkeypatch.setattr(images, "_values", refuse)
    assert np.array_equal(decode(data, 3), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(203, 149), (208, 160)])
def test_windows_turned_and_decoded_smaller(
    orientation: int, shrink: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(*size), exif=exif)

    def look(height: int, width: int) -> Window:
        assert (width, height) == (size if orientation < 5 else size[::-1])
        return Window(11, 23, height - 40, width - 30, shrink)

    expected = by_pillow(monkeypatch, data, look)
    monkeypatch.setattr(images, "_values", refuse)
    assert np.array_equal(decode(data, 3, look), expected)


def test_four_channels_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(40, 30, "CMYK"))
    expected = by_pillow(monkeypatch, data)
    assert np.array_equal(decode(data, 3), expected)


def damaged() -> dict[str, bytes]:
    good = encoded(picture(64, 48))
    noise = np.random.default_rng(0).integers(0, 255, 60, dtype=np.uint8).tobytes()
    return {
        "no end marker": good[:-2],
        "half": good[: len(good) // 2],
        "header only": good[:300],
        "noise in the middle": good[:900] + noise + good[960:],
        "more behind the end": good + b"trailing" * 20,
        "a size that is not there": good.replace(b"\x00\x30\x00\x40", b"\x10\x00\x10\x00", 1),
    }


@pytest.mark.parametrize("damage", damaged())
def test_pillow_has_the_last_word_on_damage(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = damaged()[damage]
    expected = by_pillow(monkeypatch, data)
    if isinstance(expected, str):
        with pytest.raises(BadImage, match=f"^{expected}$"):
            decode(data, 3)
    else:
        assert np.array_equal(decode(data, 3), expected)
