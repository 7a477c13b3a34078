"""Panels of reconstructions: original | masked | reconstruction | pasted, one row per image.

Pictures are put into the sheet pixel by pixel, so they are never interpolated or shifted; matplotlib writes the words.

Legend: H W height and width in pixels, C channels, M hidden patches of one image, P values of one patch, flattened
(row, column, channel); hh ww the grid of patches, ph pw pixels within a patch.
"""

from __future__ import annotations

import bisect
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from maekit.viz.shown import STRETCHED, FloatArray, as_uint8, channels_note, levels, stretched

GRAY = 0.5
"""What stands where nothing is known: on hidden patches of `masked`, on visible ones of `reconstruction`."""
SMALL_PX = 96
"""An image whose longer side is below this is enlarged by a whole factor, to about ENLARGED_PX."""
ENLARGED_PX = 160
DPI = 128.0
"""A power of two, so that pixels / DPI x DPI is exact; it changes nothing in the picture."""

MARGIN_PX, GAP_PX, LABEL_PX, COLUMN_PX = 12, 6, 18, 120
TITLE_PX, HEADING_PX, NOTE_PX = 16.0, 13.0, 11.0
LINE = 1.35
INK, PALE = "#222222", "#666666"


@dataclass(frozen=True)
class PanelRow:
    """The four pictures of one image, each [H, W, C] in 0..1, and the share of its patches that is hidden."""

    original: FloatArray
    masked: FloatArray
    reconstruction: FloatArray
    pasted: FloatArray
    masked_share: float = math.nan
    stretched: bool = False
    """Whether these are not the image's own levels, which a screen would not show."""

    @property
    def pictures(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """In the order of the columns."""
        return (self.original, self.masked, self.reconstruction, self.pasted)


def compose(
    image_HWC: FloatArray, ids_masked: npt.NDArray[np.integer[Any]], pred_MP: FloatArray, patch: int
) -> PanelRow:
    """The row of one image, from the prediction of its hidden patches.

    Pixels are in 0..1 and predictions in the same units; these are clipped to 0..1, NaN becomes black. Where that would
    hide the image (12 of 16 bits, floats of any range), both are shown from its darkest to its brightest level. The
    rows of `pred_MP` belong to `ids_masked` in the same order; ids count the patches row by row. Any C.

    Raises:
        AssertionError: shapes that do not fit, an id outside the grid, or an id twice.
    """
    height, width, chans = image_HWC.shape
    assert height % patch == 0 and width % patch == 0, (image_HWC.shape, patch)
    grid_hh, grid_ww = height // patch, width // patch
    ids_M = np.asarray(ids_masked, np.int64)
    assert ids_M.ndim == 1 and len(np.unique(ids_M)) == len(ids_M), "ids_masked must be distinct, shape [M]"
    assert not ids_M.size or 0 <= ids_M.min() <= ids_M.max() < grid_hh * grid_ww, (ids_M, grid_hh, grid_ww)
    assert pred_MP.shape == (len(ids_M), patch * patch * chans), (pred_MP.shape, len(ids_M), patch, chans)

    shown = levels(image_HWC)
    image_HWC, pred_MP = stretched(image_HWC, shown), stretched(pred_MP, shown)
    hidden_N = np.zeros(grid_hh * grid_ww, bool)  # True = hidden from the encoder
    hidden_N[ids_M] = True
    hidden_HW1 = hidden_N.reshape(grid_hh, grid_ww).repeat(patch, axis=0).repeat(patch, axis=1)[:, :, None]

    pred_NP = np.full((grid_hh * grid_ww, patch * patch * chans), GRAY, image_HWC.dtype)
    pred_NP[ids_M] = np.clip(np.nan_to_num(pred_MP, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    # (hh ww) (ph pw C) -> (hh ph) (ww pw) C
    pred_HWC = pred_NP.reshape(grid_hh, grid_ww, patch, patch, chans).swapaxes(1, 2).reshape(height, width, chans)

    return PanelRow(
        original=image_HWC,
        masked=np.where(hidden_HW1, image_HWC.dtype.type(GRAY), image_HWC),
        reconstruction=pred_HWC,
        pasted=np.where(hidden_HW1, pred_HWC, image_HWC),
        masked_share=len(ids_M) / len(hidden_N),
        stretched=shown != (0.0, 1.0),
    )


def draw(
    rows: Sequence[PanelRow],
    path: Path,
    *,
    title: str,
    note: str = "",
    row_labels: Sequence[str] | None = None,
) -> None:
    """Write one PNG with a line of four pictures per row; it appears whole or not at all.

    Images of 96 px and more are shown pixel by pixel, smaller ones enlarged by a whole factor. `note` stands in small
    type under the picture, a label of `row_labels` upright at the left of its row, shortened to fit.

    Raises:
        AssertionError: no rows, or another number of labels than rows.
        OSError: the file cannot be written; nothing is left behind.
    """
    assert rows, "a panel needs at least one row"
    assert row_labels is None or len(row_labels) == len(rows), (row_labels, len(rows))
    said = [note, channels_note(rows[0].original), STRETCHED if any(row.stretched for row in rows) else ""]
    note = "\n".join(line for line in said if line)
    tiles = [[display(picture) for picture in row.pictures] for row in rows]
    pitch = max(COLUMN_PX, max(line[0].shape[1] for line in tiles)) + GAP_PX
    left = MARGIN_PX + (LABEL_PX if row_labels else 0)
    width = left + 4 * pitch - GAP_PX + MARGIN_PX

    with matplotlib.style.context("default"):  # a user's matplotlibrc must not change a run's pictures
        words = Words(width)
        y = words.paragraph(title, MARGIN_PX, MARGIN_PX, TITLE_PX, INK, weight="bold")
        y += 4 if title else 0
        for column, heading in enumerate(("original", _masked_heading(rows), "reconstruction", "pasted")):
            words.centred(heading, left + column * pitch + (pitch - GAP_PX) / 2, y, HEADING_PX)
        y += math.ceil(HEADING_PX * LINE) + 2
        places: list[tuple[int, int, npt.NDArray[np.uint8]]] = []
        for index, line in enumerate(tiles):
            tile_height, tile_width = line[0].shape[:2]
            for column, tile in enumerate(line):
                places.append((y, left + column * pitch + (pitch - GAP_PX - tile_width) // 2, tile))
            if row_labels:
                words.upright(row_labels[index], MARGIN_PX + LABEL_PX / 2 - 3, y + tile_height / 2, tile_height)
            y += tile_height + GAP_PX
        bottom = words.paragraph(note, left, y + 2, NOTE_PX, PALE) if note else y
        sheet_HW3 = words.render(bottom + MARGIN_PX - (0 if note else GAP_PX))
    for top, start, tile in places:
        sheet_HW3[top : top + tile.shape[0], start : start + tile.shape[1]] = tile
    write_png(sheet_HW3, path)


def enlargement(height: int, width: int) -> int:
    """The whole factor by which `draw` enlarges a picture of this size in pixels."""
    longer = max(height, width)
    return 1 if longer >= SMALL_PX else max(1, round(ENLARGED_PX / longer))


def render(figure: Figure) -> npt.NDArray[np.uint8]:
    """A figure's pixels, uint8 [H, W, 3], drawn without a window or any global state."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():  # a file name may hold letters that the font lacks: a box is drawn instead
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return np.array(canvas.buffer_rgba(), np.uint8)[:, :, :3]


def write_png(picture_HW3: npt.NDArray[np.uint8], path: Path) -> None:
    """Write a PNG whole or not at all: to a temporary file in the same folder, then renamed.

    Missing folders are made.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    save_png(Image.fromarray(picture_HW3), path)


def save_png(image: Image.Image, path: Path, *, smallest: bool = True) -> None:
    """Write a Pillow image of any mode, as `write_png` does; the smallest file takes seconds for large photographs.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # mkstemp would make it unreadable for others
    try:
        image.save(temporary, format="PNG", optimize=smallest)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def display(picture_HWC: FloatArray) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] as shown: one channel replicated, two padded by zeros, three of more; enlarged when small."""
    times = enlargement(*picture_HWC.shape[:2])
    return as_uint8(picture_HWC).repeat(times, axis=0).repeat(times, axis=1)


def _masked_heading(rows: Sequence[PanelRow]) -> str:
    """Such as "masked 75 %", or "masked 70-75 %" where the rows differ."""
    shares = [round(100 * row.masked_share) for row in rows if math.isfinite(row.masked_share)]
    if not shares:
        return "masked"
    low, high = min(shares), max(shares)
    return f"masked {low} %" if low == high else f"masked {low}-{high} %"


class Words:
    """The words of a sheet, placed in pixels from the top left, before its height is known."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._figure = Figure(figsize=(width / DPI, 1.0), dpi=DPI)
        self._measure = FigureCanvasAgg(self._figure).get_renderer()
        self._pending: list[tuple[float, float, str, dict[str, Any]]] = []

    def paragraph(self, text: str, x: float, y: int, size: float, color: str, **style: Any) -> int:
        """Write text from (x, y) on, wrapped at the right margin; returns the y under it."""
        room = self._width - MARGIN_PX - x
        for line in text.splitlines():
            rest = line
            while rest:

                def begun(count: int, rest: str = rest) -> str:
                    return rest[:count]

                # Break after the last space that fits; where one word fills the line, inside it.
                fits = max(1, self._most(len(rest), room, size, begun, style))
                end = fits if fits == len(rest) else rest.rfind(" ", 0, fits + 1) + 1 or fits
                self._put(rest[:end].rstrip(), x, y, size, color=color, ha="left", va="baseline", **style)
                rest = rest[end:]
                y += math.ceil(size * LINE)
        return y

    def centred(self, text: str, x: float, y: float, size: float) -> None:
        """Write one line under y, centred on x."""
        self._put(text, x, y, size, color=INK, ha="center", va="baseline")

    def beside(self, text: str, x: float, y: float, size: float) -> None:
        """Write one line that starts at x, centred on y."""
        self._put(text, x, y, size, color=INK, ha="left", va="center_baseline")

    def length(self, text: str, size: float) -> float:
        """How long a line is, in pixels."""
        return self._length(text, size, {})

    def upright(self, text: str, x: float, y: float, room: float) -> None:
        """Write one line upwards, centred on (x, y), its middle left out where it is longer than the room."""

        def shortened(kept: int) -> str:
            return f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"

        if self._length(text, NOTE_PX, {}) > room:
            text = shortened(max(2, self._most(len(text), room, NOTE_PX, shortened, {})))
        self._put(text, x, y, NOTE_PX, color=PALE, ha="center", va="center", rotation=90)

    def render(self, height: int) -> npt.NDArray[np.uint8]:
        """The sheet with its words, uint8 [H, W, 3]; its pictures are still white."""
        self._figure.set_size_inches(self._width / DPI, height / DPI)
        for x, y, text, style in self._pending:
            # No $...$ is read as mathematics: file names may hold dollars.
            self._figure.text(x / self._width, 1.0 - y / height, text, parse_math=False, **style)
        return render(self._figure)

    def _put(self, text: str, x: float, y: float, size: float, **style: Any) -> None:
        if style["va"] == "baseline":  # y is the top of the line: words with and without descenders stand level
            y += size
        self._pending.append((x, y, text, {"fontsize": size * 72.0 / DPI, **style}))

    def _most(self, most: int, room: float, size: float, shown: Callable[[int], str], style: dict[str, Any]) -> int:
        """The largest count up to `most` whose words, `shown(count)`, are not longer than the room; 0 where none is."""
        return bisect.bisect_right(range(1, most + 1), room, key=lambda n: self._length(shown(n), size, style))

    def _length(self, text: str, size: float, style: dict[str, Any]) -> float:
        mark = self._figure.text(0, 0, text, parse_math=False, fontsize=size * 72.0 / DPI, **style)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            length = mark.get_window_extent(self._measure).width
        mark.remove()
        return float(length)
