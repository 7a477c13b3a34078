"""The picture of an evaluation card: held-out accuracy after every block, for each encoder, beside raw pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from maekit.viz.panels import render, write_png
from maekit.viz.plots import LOOK, PALE

_COLOURS = ("#1f4e79", "#c4622d", "#2a7f62", "#7b4ba0", "#b08a1e", "#777777")
_MARKERS = {"cls": "o", "mean": "s", "both": "^"}
_NAMES = {"cls": "class token", "mean": "mean of patches", "both": "both"}
_MOST_NAME = 46


@dataclass(frozen=True)
class Curves:
    """One encoder's search: entries with block, pooling, linear and knn (accuracies in 0..1)."""

    name: str
    found: Sequence[Mapping[str, Any]]
    floor: bool = False
    """Random weights: drawn pale, dashed, in the colour of the encoder before."""


def draw_card(curves: Sequence[Curves], path: Path, *, title: str, note: str) -> None:
    """Write card.png: linear probe at the left, k-NN at the right; it appears whole or not at all.

    Features that no block made (block 0: raw pixels) are a line across. One axis of accuracy for both panels.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    with matplotlib.style.context(["default", LOOK]):
        picture = render(figure_of(curves, title=title, note=note))
    write_png(picture, path)


def figure_of(curves: Sequence[Curves], *, title: str, note: str) -> Figure:
    """The figure of `draw_card`, in matplotlib's present style."""
    figure = Figure(figsize=(11.0, 5.4), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.02)
    figure.suptitle(title, x=0.011, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    left, right = figure.subplots(1, 2, sharey=True)
    handles = []
    colour = -1
    for one in curves:
        colour += 0 if one.floor and colour >= 0 else 1
        shade = _COLOURS[colour % len(_COLOURS)]
        for axes, name in ((left, "linear"), (right, "knn")):
            _draw(axes, one, name, shade)
        dash: Any = (0, (4, 2)) if one.floor else "dotted" if _flat(one) else "solid"
        handles.append(Line2D([], [], color=shade, linestyle=dash, label=_short(one.name)))
    left.set_title("Linear probe")
    right.set_title("k-NN")
    left.set_ylabel("held-out accuracy, %", color=PALE)
    last = max((entry["block"] for one in curves for entry in one.found), default=1)
    for axes in (left, right):
        axes.set_xlabel("after block", color=PALE)
        axes.set_xlim(0.5, max(last, 1) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    kinds = [kind for kind in _MARKERS if any(entry["pooling"] == kind for one in curves for entry in one.found
                                              if entry["block"])]  # fmt: skip
    handles += [Line2D([], [], color=PALE, linestyle="", marker=_MARKERS[kind], label=_NAMES[kind]) for kind in kinds]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=min(3, len(handles)))
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.text(0.995, 0.012, note, ha="right", va="bottom", fontsize=8, color=PALE, parse_math=False)
    return figure


def _draw(axes: Axes, one: Curves, name: str, shade: str) -> None:
    if _flat(one):
        for entry in one.found:
            axes.axhline(100 * entry[name], color=shade, linestyle="dotted", linewidth=1.4)
        return
    for kind, marker in _MARKERS.items():
        entries = [entry for entry in one.found if entry["pooling"] == kind]
        if entries:
            axes.plot([entry["block"] for entry in entries], [100 * entry[name] for entry in entries], color=shade,
                      marker=marker, markersize=4.5, linewidth=1.3, alpha=0.55 if one.floor else 1.0,
                      linestyle=(0, (4, 2)) if one.floor else "solid")  # fmt: skip


def _flat(one: Curves) -> bool:
    return all(entry["block"] == 0 for entry in one.found)


def _short(name: str) -> str:
    """The end of a long name: of a path, what tells runs apart."""
    return name if len(name) <= _MOST_NAME else f"...{name[3 - _MOST_NAME :]}"
