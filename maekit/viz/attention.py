"""Sheets of what an encoder looks at: the image, its patch features as colours, and one attention map for each head.

Legend: H W height and width in pixels, C channels; gh gw the grid of patches, N of them; K heads, I images, D width,
R rank.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maekit.viz.panels import render, write_png
from maekit.viz.shown import STRETCHED, FloatArray, channels_note, clipped, levels, stretched

TILE_INCH, LABEL_INCH, HEADING_INCH, LINE_INCH = 1.35, 0.3, 0.3, 0.14
LETTERS_PER_INCH = {"title": 11.5, "note": 18.5}
CLIP_PERCENT = 1.0
"""Share of the patches, at either end of a component, that are shown as its darkest or brightest."""
_INK, _PALE = "#222222", "#666666"


@dataclass(frozen=True)
class AttentionRow:
    """One image [H, W, C] in 0..1, its patches' colours [gh, gw, 3] in 0..1, and each head's weights [K, gh, gw]."""

    image_HWC: FloatArray
    colors: FloatArray
    weights: FloatArray


def pca_colors(features_IND: FloatArray, grid_hw: tuple[int, int]) -> FloatArray:
    """The first three principal components of all patches' features as red, green and blue [I, gh, gw, 3] in 0..1.

    The components are those of all images together, so that a colour means the same in every row. Their order is that
    of their variance; the sign of each is the one that makes its largest loading positive: a decomposition gives any.
    Where there are fewer than three, the last colours are 0.
    """
    images, patches, width = features_IND.shape
    flat = features_IND.reshape(-1, width).astype(np.float64)
    count = min(3, *flat.shape)
    flat = flat - flat.mean(axis=0)
    _, _, axes_RD = np.linalg.svd(flat, full_matrices=False)
    axes_RD = axes_RD[:count]
    largest = np.abs(axes_RD).argmax(axis=1)
    axes_RD = axes_RD * np.sign(axes_RD[np.arange(count), largest])[:, None]
    found = flat @ axes_RD.T
    low, high = np.percentile(found, (CLIP_PERCENT, 100 - CLIP_PERCENT), axis=0)
    scaled = np.clip((found - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    colors = np.zeros((len(flat), 3))
    colors[:, :count] = scaled
    return colors.reshape(images, *grid_hw, 3)


def draw_attention(
    rows: Sequence[AttentionRow], path: Path, *, title: str, note: str, row_labels: Sequence[str]
) -> None:
    """Write one PNG with a line for each image; it appears whole or not at all.

    Maps are drawn patch by patch, never smoothed, each from 0 (dark) to its own largest weight (bright). Under each
    stands how much of the head's attention goes to patches at all: the rest goes to class and register tokens.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    heads = rows[0].weights.shape[0]
    tall, wide = rows[0].image_HWC.shape[:2]
    tile_w, tile_h = TILE_INCH * max(1.0, wide / tall), TILE_INCH * max(1.0, tall / wide)
    columns = 2 + heads
    width = LABEL_INCH + columns * tile_w
    others = STRETCHED if any(levels(row.image_HWC) != (0.0, 1.0) for row in rows) else ""
    note = "\n".join(line for line in (note, channels_note(rows[0].image_HWC), others) if line)
    titles, notes = _wrapped(title, width, "title"), _wrapped(note, width, "note")
    top, bottom = HEADING_INCH + 0.2 * len(titles), 0.25 + LINE_INCH * len(notes)
    height = top + len(rows) * (tile_h + 0.16) + bottom
    with matplotlib.style.context("default"):  # a user's matplotlibrc must not change pictures
        figure = Figure(figsize=(width, height), dpi=128)
        figure.subplots_adjust(LABEL_INCH / width, bottom / height, 0.995, 1 - top / height, wspace=0.05, hspace=0.14)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for row, label, line in zip(rows, row_labels, grid, strict=True):
            _show(line[0], clipped(stretched(row.image_HWC, levels(row.image_HWC))))
            _show(line[1], row.colors, interpolation="nearest")
            for head, axes in enumerate(line[2:]):
                weights = row.weights[head]
                _show(axes, weights, interpolation="nearest", cmap="magma", vmin=0.0, vmax=max(weights.max(), 1e-12))
                axes.set_xlabel(f"{weights.sum():.0%} on patches", fontsize=6, color=_PALE, labelpad=1)
            line[0].set_ylabel(_short(label), fontsize=7, color=_PALE, parse_math=False)
        for axes, words in zip(grid[0], ("image", "features", *(f"head {k + 1}" for k in range(heads))), strict=True):
            axes.set_title(words, fontsize=8, color=_INK, pad=3)
        say = {"x": 0.06 / width, "ha": "left", "parse_math": False}
        figure.text(
            y=1 - 0.08 / height, s="\n".join(titles), va="top", fontsize=10, fontweight="bold", color=_INK, **say
        )
        figure.text(y=0.05 / height, s="\n".join(notes), va="bottom", fontsize=7, color=_PALE, **say)
        picture = render(figure)
    write_png(picture, path)


def _show(axes: Axes, picture: FloatArray, **style: Any) -> None:
    # The extent gives pictures and maps of a row the same shape, whatever their resolution.
    axes.imshow(picture, aspect="equal", **style)
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set_visible(False)


def _wrapped(text: str, width: float, kind: str) -> list[str]:
    """Lines that fit a sheet so many inches wide."""
    room = int(width * LETTERS_PER_INCH[kind])
    return [piece for line in text.splitlines() for piece in textwrap.wrap(line, room)]


def _short(label: str) -> str:
    return label if len(label) <= 22 else f"{label[:11]}...{label[-8:]}"
