"""Curves of a segmentation run from the records of metrics.jsonl: loss, held-out scores, learning rate over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maekit.viz.panels import render, write_png
from maekit.viz.plots import Curve, Drawing, steps_since, training_label

_LOOK = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#bbbbbb", "legend.frameon": False,
}  # fmt: skip
_LINES = (
    ("Loss", (("step", "loss", "training", "#1f4e79", 1.0),)),
    ("Held-out images, %", (
        ("heldout", "miou", "mean IoU", "#1f4e79", 100.0),
        ("heldout", "mean_accuracy", "mean accuracy", "#2a7f62", 100.0),
        ("heldout", "pixel_accuracy", "pixel accuracy", "#c4622d", 100.0),
    )),
    ("Learning rate", (("step", "lr", "head", "#777777", 1.0),)),
)  # fmt: skip
"""Each axes: title, and its curves as kind of record, quantity, name, colour and unit."""


def draw_segment_curves(records: Iterable[Mapping[str, object]], path: Path, title: str) -> None:
    """Write curves.png, whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    with matplotlib.style.context(["default", _LOOK]):  # a user's matplotlibrc must not change a run's pictures
        figure = Figure(figsize=(11.0, 3.6), dpi=100)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        figure.suptitle(title, x=0.011, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        each = segment_drawings(records)
        for axes, drawing in zip(figure.subplots(1, len(each)), each, strict=True):
            axes.set_title(drawing.title)
            axes.set_xlabel(drawing.along, color="#666666")
            drawing.draw(axes)
        picture = render(figure)
    write_png(picture, path)


def segment_drawings(records: Iterable[Mapping[str, object]]) -> list[Drawing]:
    """Loss, held-out scores and learning rate of a segmentation run, over optimiser steps."""
    rows = list(records)

    def draw(axes: Axes, lines: Sequence[tuple[str, str, str, str, float]]) -> None:
        for kind, quantity, label, colour, unit in lines:
            curve = curve_of(rows, kind, quantity)
            named = training_label(curve, ".3g") if (kind, quantity) == ("step", "loss") else ""
            _draw(axes, curve, named or label, colour, unit, told=not named)
        axes.set_xlim(left=0)

    return [Drawing(name, "optimiser steps", partial(draw, lines=lines)) for name, lines in _LINES]


def curve_of(records: Iterable[Mapping[str, object]], kind: str, quantity: str) -> Curve:
    """The points of one quantity over steps."""
    curve, before = Curve(), 0
    for record in records:
        step = record.get("step")
        if record.get("kind") == kind and isinstance(step, int):
            curve.add(float(step), record.get(quantity))
            curve.span, before = steps_since(record, before)
    return curve


def _draw(axes: Axes, curve: Curve, label: str, colour: str, unit: float, told: bool = True) -> None:
    """One curve; told: its last value is to follow the label."""
    if not curve.values:
        return
    values = [unit * value for value in curve.values]
    last = f"{values[-1]:.2f}" if unit > 1 else f"{values[-1]:.3g}"
    marker = "o" if len(values) < 40 else None
    label = f"{label} {last}" if told else label
    axes.plot(curve.epochs, values, color=colour, linewidth=1.4, marker=marker, markersize=3.5, label=label)
    axes.legend(loc="best", fontsize=8)
