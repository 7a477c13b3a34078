"""Pictures of training with labels: which classes are taken for which, and the curves of a run.

Shapes: K classes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maekit.viz.panels import render, write_png
from maekit.viz.plots import LOOK, Drawing, collect, training_line

_MOST_NUMBERS = 25
"""Classes up to which every cell says its share; beyond, the colour alone does."""
_MOST_NAMES = 60
LETTERS_PER_INCH = 9
"""Of a title."""
_LONGEST = 18
"""Letters of a class's name."""
_HELDOUT, _SECOND, _PALE = "#1f4e79", "#2a7f62", "#666666"


def picture_confusion(
    confusion_KK: npt.NDArray[np.int64] | None,
    classes: Sequence[str],
    path: Path,
    title: str,
    say: Callable[[str], None],
) -> None:
    """`draw_confusion` where there is a table; a file that cannot be written is only said."""
    if confusion_KK is None:
        return
    try:
        draw_confusion(confusion_KK, classes, path, title=title)
    except OSError as error:
        say(f"[red]{path.name} cannot be written:[/red] {error}")


def draw_confusion(
    confusion_KK: npt.NDArray[np.int64], classes: Sequence[str], path: Path, *, title: str, note: str = ""
) -> None:
    """Write a table of confusions: rows are the true classes, columns what was said, colours the share of a row.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    with matplotlib.style.context(["default", LOOK]):
        picture = render(confusion_figure(confusion_KK, classes, title=title, note=note))
    write_png(picture, path)


def confusion_figure(
    confusion_KK: npt.NDArray[np.int64], classes: Sequence[str], *, title: str = "", note: str = ""
) -> Figure:
    """The figure of `draw_confusion`, in matplotlib's present style."""
    count = len(classes)
    share_KK = confusion_KK / np.maximum(confusion_KK.sum(axis=1, keepdims=True), 1)
    side = min(16.0, max(5.0, 1.8 + 0.42 * min(count, _MOST_NUMBERS) + 0.03 * count))
    figure = Figure(figsize=(side + 1.0, side), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    if title:
        lines = textwrap.wrap(title, int((side + 1.0) * LETTERS_PER_INCH))
        figure.suptitle("\n".join(lines), x=0.011, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    axes = figure.subplots()
    axes.grid(visible=False)
    image = axes.imshow(share_KK, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    _name(axes, classes)
    axes.set_ylabel("true class", color=_PALE)
    axes.set_xlabel(f"said\n{note}" if note else "said", color=_PALE, parse_math=False)
    if count <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(confusion_KK), strict=True):
            share = share_KK[row, column]
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="white" if share > 0.5 else "#333333")  # fmt: skip
    return figure


def _name(axes: Axes, classes: Sequence[str]) -> None:
    """Names at both axes; of many classes, only some."""
    step = math.ceil(len(classes) / _MOST_NAMES)
    places = range(0, len(classes), step)
    shown = [classes[k] if len(classes[k]) <= _LONGEST else classes[k][: _LONGEST - 2] + ".." for k in places]
    axes.set_xticks(list(places), shown, rotation=90 if len(classes) > 3 else 0, fontsize=8, parse_math=False)
    axes.set_yticks(list(places), shown, fontsize=8, parse_math=False)


def draw_training(
    metrics: Iterable[Mapping[str, object]], path: Path, *, title: str, scores: Mapping[str, str]
) -> None:
    """Write the curves of a run with labels: loss, scores in % on the held-out images, learning rate, over epochs.

    metrics: the records of metrics.jsonl; `loss` and `lr` of kind "step", `loss` and the scores of kind "heldout".
    scores: the name of each score in the records, and in words.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    with matplotlib.style.context(["default", LOOK]):
        figure = Figure(figsize=(13.0, 4.2), dpi=100)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.02)
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        each = training_drawings(metrics, scores)
        for axes, drawing in zip(figure.subplots(1, len(each)), each, strict=True):
            axes.set_title(drawing.title)
            axes.set_xlabel(drawing.along, color=_PALE)
            drawing.draw(axes)
        picture = render(figure)
    write_png(picture, path)


def training_drawings(metrics: Iterable[Mapping[str, object]], scores: Mapping[str, str]) -> list[Drawing]:
    """Loss, held-out scores and learning rate of a run with labels, over epochs."""
    records = list(metrics)

    def loss(axes: Axes) -> None:
        training_line(axes, collect(records)["step", "loss"], ".3g")
        _line(axes, records, "heldout", "loss", "held-out", _HELDOUT, marker="o")

    def score(axes: Axes) -> None:
        for number, (name, words) in enumerate(scores.items()):
            color, marker = ((_HELDOUT, "o"), (_SECOND, "s"))[number % 2]
            _line(axes, records, "heldout", name, words, color, marker=marker, scale=100.0)

    def rate(axes: Axes) -> None:
        _line(axes, records, "step", "lr", "", _HELDOUT)

    def draw(axes: Axes, how: Callable[[Axes], None]) -> None:
        how(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1, borderpad=0.2)

    each = {"Loss": loss, "Held-out, %": score, "Learning rate of the head": rate}
    return [Drawing(title, "epochs", partial(draw, how=how)) for title, how in each.items()]


def _line(
    axes: Axes,
    records: Sequence[Mapping[str, object]],
    kind: str,
    name: str,
    label: str,
    color: str,
    *,
    marker: str = "",
    scale: float = 1.0,
) -> None:
    """One curve; what is absent or not finite is left out."""
    points = [
        (float(epoch), scale * float(value))
        for record in records
        if record.get("kind") == kind
        and isinstance(epoch := record.get("epoch"), int | float)
        and isinstance(value := record.get(name), int | float)
        and math.isfinite(value)
    ]
    if not points:
        return
    epochs, values = zip(*points, strict=True)
    shown = f"{label} {values[-1]:.3g}" if label else None
    axes.plot(epochs, values, color=color, linewidth=1.3, marker=marker or ("o" if len(points) == 1 else ""),
              markersize=3.5, markevery=math.ceil(len(points) / 50), label=shown)  # fmt: skip
