"""Curves of a run from the records of metrics.jsonl: loss, skill, learning rate and online probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maekit.viz.panels import render, write_png

MAX_POINTS = 1000
"""A longer curve is drawn as the means of this many bins in a band from their smallest to their largest value."""

_TRAIN, _HELDOUT, _KNN, _LINEAR, _RANK = "#8fb3d9", "#1f4e79", "#2a7f62", "#c4622d", "#777777"
_INK, PALE, _GRID = "#222222", "#666666", "#e6e6e6"
LOOK = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": "#bbbbbb", "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": PALE, "ytick.color": PALE,
    "text.color": _INK, "legend.frameon": False, "legend.fontsize": 9, "agg.path.chunksize": 10_000,
}  # fmt: skip


@dataclass
class Curve:
    """The finite points of one quantity, and how many were not finite."""

    epochs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    left_out: int = 0
    span: int = 0
    """Optimiser steps that the last value is the mean of; 0: not known, or none."""

    def thinned(self, most: int) -> Curve:
        """At most so many of its points, evenly, the last among them."""
        every = max(1, -(-len(self.values) // most))
        first = (len(self.values) - 1) % every if self.values else 0
        return Curve(self.epochs[first::every], self.values[first::every], self.left_out, self.span)

    def add(self, epoch: float, value: object) -> None:
        """Take a number; None and words are absent values, NaN and infinities are counted."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if not math.isfinite(value):
            self.left_out += 1
            return
        self.epochs.append(epoch)
        self.values.append(float(value))


Curves = dict[tuple[str, str], Curve]
"""By kind of record and quantity, such as ("heldout", "loss")."""


@dataclass(frozen=True)
class Drawing:
    """One axes of a picture: its title, what is counted along x, and what draws the rest of it."""

    title: str
    along: str
    draw: Callable[[Axes], None]


def draw_curves(metrics: Iterable[Mapping[str, object]], path: Path, *, title: str) -> None:
    """Write curves.png with four axes over epochs; it appears whole or not at all.

    Records are those of metrics.jsonl: `kind` is step, heldout or probe; `epoch` places the point; `loss`, `skill`
    (1 - loss / trivial loss), `lr`, `knn` and `linear` (accuracies in 0..1), of how many `images`, and `rankme`
    (effective rank) are drawn where present. Other kinds and records without an epoch are passed over, values that are
    not finite are counted.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    curves = collect(metrics)
    with matplotlib.style.context(["default", LOOK]):  # a user's matplotlibrc must not change a run's pictures
        picture = render(figure_of(curves, title=title))
    write_png(picture, path)


def figure_of(curves: Curves, *, title: str) -> Figure:
    """The figure of `draw_curves`, in matplotlib's present style."""
    figure = Figure(figsize=(11.0, 7.2), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.02)
    figure.suptitle(title, x=0.011, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    places = figure.subplots(2, 2).flatten()
    for number, (axes, drawing) in enumerate(zip(places, drawings(curves), strict=True)):
        axes.set_title(drawing.title)
        if number > 1:
            axes.set_xlabel(drawing.along, color=PALE)
        drawing.draw(axes)
    return figure


def drawings(curves: Curves) -> list[Drawing]:
    """Loss, skill, learning rate and online probes of a pretraining, over epochs."""
    last = max((max(curve.epochs) for curve in curves.values() if curve.epochs), default=0.0)
    each = {
        "Loss": _draw_loss,
        "Skill": _draw_skill,
        "Learning rate": _draw_rate,
        "Probes": _draw_probes,
    }

    def draw(axes: Axes, how: Callable[[Axes, Curves], None]) -> None:
        axes.set_xlim(0.0, 1.03 * last if last > 0 else 1.0)
        how(axes, curves)

    return [Drawing(title, "epochs", partial(draw, how=how)) for title, how in each.items()]


def collect(metrics: Iterable[Mapping[str, object]]) -> Curves:
    """The curves by (kind of record, quantity)."""
    wanted = {
        "step": ("loss", "skill", "lr"),
        "heldout": ("loss", "skill"),
        "probe": ("knn", "linear", "rankme", "images"),
    }
    curves = {(kind, name): Curve() for kind, names in wanted.items() for name in names}
    before = 0
    for record in metrics:
        kind, epoch = record.get("kind"), record.get("epoch")
        if not isinstance(kind, str) or isinstance(epoch, bool) or not isinstance(epoch, int | float):
            continue
        if math.isfinite(epoch):
            for name in wanted.get(kind, ()):
                curves[kind, name].add(float(epoch), record.get(name))
            if kind == "step":
                span, before = steps_since(record, before)
                curves[kind, "loss"].span = curves[kind, "skill"].span = span
    return curves


def steps_since(record: Mapping[str, object], before: int) -> tuple[int, int]:
    """Optimiser steps that a logged training loss is the mean of (0: unknown), and the step of its line.

    A line of training has the mean over the steps since the line before it, whose step is `before`.
    """
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        return 0, before
    return max(0, step - before), step


def training_label(curve: Curve, digits: str = ".4f") -> str:
    """What a line of training losses is called: its last value is no measurement of the whole training set."""
    steps = f"last {curve.span:,} step{'s' if curve.span != 1 else ''}" if curve.span else "last logged"
    return f"training, {steps} {format(last_of(curve), digits)}"


def _draw_loss(axes: Axes, curves: Curves) -> None:
    train, heldout = curves["step", "loss"], curves["heldout", "loss"]
    training_line(axes, train)
    _points(axes, heldout, f"held-out {last_of(heldout):.4f}", _HELDOUT)
    _limit(axes, train, heldout)
    _finish(axes, train, heldout)


def _draw_skill(axes: Axes, curves: Curves) -> None:
    """1 - loss / trivial loss: higher is better, 0 is no better than the trivial predictor."""
    train, heldout = curves["step", "skill"], curves["heldout", "skill"]
    axes.set_ylabel("higher is better", color=PALE)
    training_line(axes, train)
    _points(axes, heldout, f"held-out {last_of(heldout):.4f}", _HELDOUT)
    if train.values or heldout.values:
        axes.axhline(0.0, color=PALE, linestyle=(0, (5, 3)), linewidth=1.0)
        # At the right end, where a run that learns is far above it.
        axes.annotate("the trivial predictor; skill = 1 - loss / its loss", (0.995, 0.0), xytext=(0, 3), ha="right",
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=PALE,
                      fontsize=8)  # fmt: skip
    _limit(axes, train, heldout, keep=0.0)
    _finish(axes, train, heldout)


def _draw_rate(axes: Axes, curves: Curves) -> None:
    rate = curves["step", "lr"]
    if rate.values:
        label = f"now {rate.values[-1]:.2e}, highest {max(rate.values):.2e}"
        axes.plot(rate.epochs, rate.values, color=_HELDOUT, linewidth=1.4, label=label, **_lone(rate))
        axes.set_ylim(0.0, max(1.08 * max(rate.values), 1e-12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    _finish(axes, rate)


def _draw_probes(axes: Axes, curves: Curves) -> None:
    """Accuracies in % at the left; the rank of the features, which has another unit, at the right."""
    knn, linear, rank = (curves["probe", name] for name in ("knn", "linear", "rankme"))
    for curve, name, color, marker in ((linear, "linear", _LINEAR, "o"), (knn, "k-NN", _KNN, "s")):
        percent = Curve(curve.epochs, [100.0 * value for value in curve.values])
        _points(axes, percent, f"{name} {last_of(percent):.1f} %", color, marker=marker)
    if knn.values or linear.values:
        images = curves["probe", "images"].values
        of = f" of {images[-1]:,.0f} held-out images" if images else ""
        axes.set_ylabel(f"accuracy, %{of}", color=PALE)
    elif rank.values:
        _say(axes, "no labels: k-NN and linear probe are not measured", y=0.08)
    else:
        _say(axes, "no probe recorded (yet): see --probe-every;\nk-NN and linear probe need labels")
    handles, labels = axes.get_legend_handles_labels()
    if rank.values:
        right = axes.twinx()
        _points(right, rank, f"rank {last_of(rank):.1f}", _RANK, marker="^", linestyle=(0, (2, 2)))
        right.set_ylim(0.0, 1.1 * max(*rank.values, 1.0))
        right.grid(visible=False)
        right.set_ylabel("feature rank (RankMe)", color=_RANK)
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    _legend(axes, handles, labels)
    _say_left_out(axes, knn, linear, rank)


def training_line(axes: Axes, curve: Curve, digits: str = ".4f") -> None:
    """A thin line of training losses; beyond MAX_POINTS the means of bins, in a band from smallest to largest."""
    if not curve.values:
        return
    epochs, values = np.asarray(curve.epochs), np.asarray(curve.values)
    if len(values) > MAX_POINTS:
        starts = np.linspace(0, len(values), MAX_POINTS, endpoint=False).astype(np.int64)
        counts = np.diff(np.append(starts, len(values)))
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        epochs, values = np.add.reduceat(epochs, starts) / counts, np.add.reduceat(values, starts) / counts
        axes.fill_between(epochs, low, high, color=_TRAIN, alpha=0.35, linewidth=0)
    axes.plot(epochs, values, color=_TRAIN, linewidth=1.0, label=training_label(curve, digits), **_lone(curve))


def _points(axes: Axes, curve: Curve, label: str, color: str, *, marker: str = "o", **style: Any) -> None:
    """A line whose markers thin out before they touch."""
    if curve.values:
        every = math.ceil(len(curve.values) / 50)
        axes.plot(curve.epochs, curve.values, color=color, linewidth=1.4, marker=marker, markersize=3.8,
                  markevery=every, label=label, **style)  # fmt: skip


def last_of(curve: Curve) -> float:
    """The last value; NaN where there is none."""
    return curve.values[-1] if curve.values else math.nan


def _lone(curve: Curve) -> dict[str, Any]:
    """A line of a single point shows nothing: mark it."""
    return {"marker": "o", "markersize": 3.5} if len(curve.values) == 1 else {}


def _limit(axes: Axes, train: Curve, heldout: Curve, keep: float | None = None) -> None:
    """Let the bulk of the training values and every held-out value be seen: a few spikes may leave the frame.

    So may what stands before the first held-out pass of a trained model: untrained values flatten all that follow.
    """
    begin = min((epoch for epoch in heldout.epochs if epoch > 0), default=0.0)
    shown = [value for epoch, value in zip(heldout.epochs, heldout.values, strict=True) if epoch >= begin]
    shown += [] if keep is None else [keep]
    values = [value for epoch, value in zip(train.epochs, train.values, strict=True) if epoch >= begin]
    if values:
        shown += [float(value) for value in np.percentile(values, (0, 100) if len(values) < 20 else (2, 98))]
    if not shown:
        return
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-6)
    axes.set_ylim(low - room, high + room)


def _finish(axes: Axes, *curves: Curve) -> None:
    """The legend with the last values, or a word where there is nothing; and what was left out."""
    if not any(curve.values for curve in curves):
        _say(axes, "nothing recorded (yet)")
    _legend(axes, *axes.get_legend_handles_labels())
    _say_left_out(axes, *curves)


def _legend(axes: Axes, handles: list[Any], labels: list[str]) -> None:
    """On the title's line at the right: inside the frame it would cover a curve sooner or later."""
    if labels:
        axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1,
                    borderpad=0.2, columnspacing=1.2, handlelength=1.5, handletextpad=0.5)  # fmt: skip


def _say(axes: Axes, words: str, y: float = 0.5) -> None:
    """Words in place of an absent curve; y in shares of the axes' height."""
    axes.set_yticks([])
    axes.text(0.5, y, words, transform=axes.transAxes, ha="center", va="center", color=PALE)


def _say_left_out(axes: Axes, *curves: Curve) -> None:
    count = sum(curve.left_out for curve in curves)
    if count:
        axes.text(0.01, 0.02, f"not finite, not drawn: {count}", transform=axes.transAxes, color="#b00020", fontsize=8)
