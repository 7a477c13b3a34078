"""Classes as colours: index pictures that any tool opens, and sheets of image | truth | prediction | error.

Legend: H W height and width in pixels, C channels, K classes. Class ids are 0..K-1, -1 (VOID) where there is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import numpy.typing as npt
from PIL import Image

from maekit.data.annotations import VOID
from maekit.viz.panels import (
    COLUMN_PX,
    GAP_PX,
    HEADING_PX,
    INK,
    LABEL_PX,
    LINE,
    MARGIN_PX,
    NOTE_PX,
    TITLE_PX,
    Words,
    enlargement,
    save_png,
)
from maekit.viz.shown import as_uint8, channels_note, levels, stretched, three_channels

UInt8s = npt.NDArray[np.uint8]

TILE_PX = 480
"""A longer side above this is shown smaller."""
INK_SHARE = 0.72
"""How much of a class's colour lies over the gray image below it; the legend shows it over middle gray."""
WRONG, UNKNOWN = np.array([222, 24, 48], np.uint8), np.array([120, 120, 126], np.uint8)
"""Colours of pixels that are predicted wrongly, and of void ones, which nobody counts."""
_DISTINCT = 1024
"""Colours before the palette repeats."""
_FIRST = np.array([70.0, 125.0, 215.0])
"""The first class's colour, a blue."""
_LIGHT_COUNTS = np.array([0.6, 1.0, 1.0])
"""Lightness counts for less than hue: over an image, bright and dark are the image's."""
_SWATCH_PX, _LEGEND_LINE_PX, _LEGEND_GAP_PX, _LEGEND_TEXT_PX = 17, 26, 20, 15.0
_MIN_LEGEND_PX = 480
_LEGEND_SHOWN = 60


class OverlayRow(NamedTuple):
    """One image [H, W, C] (uint8, or floats in 0..1), its class ids [H, W] and the predicted ones, and its name."""

    image: npt.NDArray[Any]
    truth: npt.NDArray[np.integer[Any]] | None
    prediction: npt.NDArray[np.integer[Any]]
    label: str = ""


# ---- colours ----


def palette(num_classes: int) -> UInt8s:
    """Colours [K + 1, 3]: black for void at 0, then those of the classes, each as far as can be from those before it.

    The first colours do not depend on their number; after 1,024 classes they repeat.
    """
    colours = _spread(min(_DISTINCT, max(32, 2 ** math.ceil(math.log2(max(1, num_classes))))))
    return np.concatenate([np.zeros((1, 3), np.uint8), colours[np.arange(num_classes) % len(colours)]])


@functools.lru_cache(maxsize=4)
def _spread(count: int) -> UInt8s:
    """Farthest-point sampling of mid-range colours in Oklab (Ottosson 2020), where equal steps look equally large."""
    steps = np.linspace(0, 255, 24).round()
    grid_N3 = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab_N3 = _oklab(grid_N3)
    light_N, chroma_N = lab_N3[:, 0], np.hypot(lab_N3[:, 1], lab_N3[:, 2])
    usable_N = (light_N > 0.42) & (light_N < 0.93) & (chroma_N > 0.05) & (chroma_N < 0.21)
    grid_N3, lab_N3 = grid_N3[usable_N], lab_N3[usable_N] * _LIGHT_COUNTS
    taken_23 = _oklab(np.stack([WRONG, UNKNOWN]).astype(np.float64)) * _LIGHT_COUNTS
    far_N = ((lab_N3[:, None] - taken_23) ** 2).sum(axis=2).min(axis=1)
    chosen = [int(np.abs(grid_N3 - _FIRST).sum(axis=1).argmin())]
    while len(chosen) < count:
        far_N = np.minimum(far_N, ((lab_N3 - lab_N3[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(far_N.argmax()))
    return grid_N3[chosen].astype(np.uint8)


def _oklab(rgb_N3: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Oklab lightness 0..1 and two axes of colour, from sRGB in 0..255 (https://bottosson.github.io/posts/oklab)."""
    unit = rgb_N3 / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929],
         [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    ).T  # fmt: skip
    lab: npt.NDArray[np.float64] = np.cbrt(cones) @ np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468],
         [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    ).T  # fmt: skip
    return lab


# ---- index pictures ----


def save_mask_png(labels_HW: npt.NDArray[np.integer[Any]], path: Path, values: Sequence[int]) -> None:
    """Write class ids as a gray PNG of the value of each class, of 8 bits where these fit: 0 and 255 are a mask that
    any viewer shows black and white.

    Raises:
        AssertionError: an id that has no value.
        OSError: the file cannot be written; nothing is left behind.
    """
    assert labels_HW.min(initial=0) >= 0 and labels_HW.max(initial=0) < len(values), (labels_HW.max(), values)
    table = np.array(values, np.uint8 if max(values) <= 255 else np.uint16)
    save_png(Image.fromarray(table[labels_HW]), path)


def save_index_png(labels_HW: npt.NDArray[np.integer[Any]], path: Path, *, num_classes: int | None = None) -> None:
    """Write class ids as a PNG of numbers: 0 for void and id + 1 for classes, the numbering of `--void 0`.

    Up to 255 classes it has 8 bits and a palette, so that viewers show colours; above them 16 bits of gray. Give
    `num_classes` where several pictures are to have one format: without it the highest id decides.

    Raises:
        AssertionError: an id below VOID, or none of `num_classes`.
        OSError: the file cannot be written; nothing is left behind.
    """
    numbers_HW = labels_HW.astype(np.int64) - VOID
    highest = int(numbers_HW.max(initial=0))
    num_classes = highest if num_classes is None else num_classes
    assert numbers_HW.min(initial=0) >= 0 and highest <= num_classes <= 65_535, (highest, num_classes)
    if num_classes > 255:
        save_png(Image.fromarray(numbers_HW.astype(np.uint16)), path)
        return
    image = Image.fromarray(numbers_HW.astype(np.uint8))
    image.putpalette(palette(255).tobytes())  # of an "L" image this makes a "P" image of the same numbers
    save_png(image, path)


# ---- sheets ----


def draw_overlays(
    rows: Sequence[OverlayRow | tuple[Any, ...]], path: Path, class_names: Sequence[str], title: str
) -> None:
    """Write one PNG: image | truth | prediction | error for each row, and a legend of the classes that occur.

    Classes are colours over the gray image. In the last column wrong pixels are red, right ones pale, and void ones,
    which do not count, gray. Where no row has a truth there are two columns. Large images are shown smaller.

    Raises:
        AssertionError: no rows, or shapes that differ within a row.
        OSError: the file cannot be written; nothing is left behind.
    """
    assert rows, "a sheet needs at least one row"
    shown = [_reduced(OverlayRow(*row)) for row in rows]
    channels = channels_note(OverlayRow(*rows[0]).image)
    with_truth = any(row.truth is not None for row in shown)
    colours = palette(len(class_names))
    colours[0] = UNKNOWN
    tiles = [_tiles(row, colours, with_truth) for row in shown]
    headings = ("image", "truth", "prediction", "error") if with_truth else ("image", "prediction")
    pitch = max(COLUMN_PX, max(line[0].shape[1] for line in tiles)) + GAP_PX
    left = MARGIN_PX + (LABEL_PX if any(row.label for row in shown) else 0)
    width = max(left + len(headings) * pitch - GAP_PX + MARGIN_PX, _MIN_LEGEND_PX)
    places: list[tuple[int, int, UInt8s]] = []
    with matplotlib.style.context("default"):  # a user's matplotlibrc must not change pictures
        words = Words(width)
        y = words.paragraph(title, MARGIN_PX, MARGIN_PX, TITLE_PX, INK, weight="bold") + (4 if title else 0)
        y = words.paragraph(channels, MARGIN_PX, y, NOTE_PX, INK)
        for column, heading in enumerate(headings):
            words.centred(heading, left + column * pitch + (pitch - GAP_PX) / 2, y, HEADING_PX)
        y += math.ceil(HEADING_PX * LINE) + 2
        for row, original, line in zip(shown, rows, tiles, strict=True):
            tile_height, tile_width = line[0].shape[:2]
            for column, tile in enumerate(line):
                places.append((y, left + column * pitch + (pitch - GAP_PX - tile_width) // 2, tile))
            if row.label:
                words.upright(row.label, MARGIN_PX + LABEL_PX / 2 - 3, y + tile_height / 2, tile_height)
            y += tile_height
            share = _wrong_share(OverlayRow(*original))
            if share is not None:  # of all pixels, not of those that a smaller picture shows
                words.centred(f"{100 * share:.1f} % wrong", left + 3 * pitch + (pitch - GAP_PX) / 2, y + 1, NOTE_PX)
                y += math.ceil(NOTE_PX * LINE)
            y += GAP_PX
        bottom = _legend(words, places, shown, colours, class_names, (left, y + 4, width))
        sheet_HW3 = words.render(bottom + MARGIN_PX)
    for top, start, tile in places:
        sheet_HW3[top : top + tile.shape[0], start : start + tile.shape[1]] = tile
    save_png(Image.fromarray(sheet_HW3), path, smallest=False)


def _wrong_share(row: OverlayRow) -> float | None:
    """Share of the pixels that are not void which are wrong; None where there is none to count."""
    if row.truth is None or not (row.truth != VOID).any():
        return None
    known_HW = row.truth != VOID
    return float((row.truth != row.prediction)[known_HW].mean())


def _reduced(row: OverlayRow) -> OverlayRow:
    """The row as it is shown: uint8 [h, w, 3], its longer side at most TILE_PX, small ones enlarged.

    Images are averaged over areas; of classes every few pixels one is taken.
    """
    assert row.image.shape[:2] == row.prediction.shape, (row.image.shape, row.prediction.shape)
    assert row.truth is None or row.truth.shape == row.prediction.shape, (row.truth.shape, row.prediction.shape)
    rgb_HW3 = _rgb(row.image)
    height, width = row.prediction.shape
    times = min(1.0, TILE_PX / max(height, width)) if max(height, width) > TILE_PX else enlargement(height, width)
    size_hw = (max(1, round(height * times)), max(1, round(width * times)))
    at_h, at_w = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size_hw, (height, width), strict=True)
    )
    if times < 1:
        rgb_HW3 = np.asarray(Image.fromarray(rgb_HW3).resize(size_hw[::-1], Image.Resampling.BOX))
    else:
        rgb_HW3 = rgb_HW3[at_h][:, at_w]
    truth = None if row.truth is None else row.truth[at_h][:, at_w]
    return OverlayRow(rgb_HW3, truth, row.prediction[at_h][:, at_w], row.label)


def _rgb(image_HWC: npt.NDArray[Any]) -> UInt8s:
    """uint8 [H, W, 3]; floats in levels that can be seen."""
    if image_HWC.dtype == np.uint8:
        return np.ascontiguousarray(three_channels(image_HWC))
    return as_uint8(stretched(image_HWC, levels(image_HWC)))


def _tiles(row: OverlayRow, colours: UInt8s, with_truth: bool) -> list[UInt8s]:
    gray_HW1 = np.asarray(Image.fromarray(row.image).convert("L"))[:, :, None]
    prediction = _over(gray_HW1, colours[row.prediction - VOID])
    if not with_truth:
        return [row.image, prediction]
    if row.truth is None:
        blank = np.full_like(row.image, 255)
        return [row.image, blank, prediction, blank]
    pale_HW3 = np.repeat(175 + gray_HW1 // 4, 3, axis=2).astype(np.uint8)
    wrong_HW1 = (row.truth != row.prediction)[:, :, None]
    error = np.where(wrong_HW1, _over(gray_HW1, WRONG, 0.85), pale_HW3)
    error[row.truth == VOID] = UNKNOWN
    return [row.image, _over(gray_HW1, colours[row.truth - VOID]), prediction, error]


def _over(gray: npt.NDArray[Any] | int, colour: UInt8s, share: float = INK_SHARE) -> UInt8s:
    """A colour laid over gray."""
    mixed: UInt8s = np.round(share * colour.astype(np.float64) + (1 - share) * gray).astype(np.uint8)
    return mixed


def _legend(
    words: Words,
    places: list[tuple[int, int, UInt8s]],
    rows: list[OverlayRow],
    colours: UInt8s,
    class_names: Sequence[str],
    where: tuple[int, int, int],
) -> int:
    """Swatches and names of the classes that occur, in lines; returns the y below them."""
    left, y, width = where
    pictures = [labels for row in rows for labels in (row.truth, row.prediction) if labels is not None]
    occurring = np.unique(np.concatenate([np.unique(labels) for labels in pictures])).tolist()
    entries = [(class_names[i], _over(128, colours[i + 1])) for i in occurring if i != VOID]
    if len(entries) > _LEGEND_SHOWN:
        entries = [*entries[:_LEGEND_SHOWN], (f"... {len(entries) - _LEGEND_SHOWN} more", np.full(3, 255, np.uint8))]
    if any(row.truth is not None for row in rows):
        entries.append(("wrong", _over(128, WRONG, 0.85)))
    if VOID in occurring:
        entries.append(("void, not counted", UNKNOWN))
    x = left
    for name, colour in entries:
        name = name if len(name) <= 32 else f"{name[:29]}..."
        length = _SWATCH_PX + 5 + words.length(name, _LEGEND_TEXT_PX) + _LEGEND_GAP_PX
        if x > left and x + length - _LEGEND_GAP_PX > width - MARGIN_PX:
            x, y = left, y + _LEGEND_LINE_PX
        places.append((y + 2, x, np.full((_SWATCH_PX, _SWATCH_PX, 3), colour, np.uint8)))
        words.beside(name, x + _SWATCH_PX + 5, y + 2 + _SWATCH_PX / 2, _LEGEND_TEXT_PX)
        x += math.ceil(length)
    return y + _LEGEND_LINE_PX
