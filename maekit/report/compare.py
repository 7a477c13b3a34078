"""Several runs beside each other: what differs, what came out, and their curves on one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from maekit.report.charts import charts
from maekit.report.facts import MOST_POINTS, Times
from maekit.report.folder import RunFolder
from maekit.report.html import Html, code, heading, join, paragraph, table, tag
from maekit.report.settings import NOT_COMPARED
from maekit.report.style import COLOURS as PALETTE
from maekit.report.values import count, items, mapping, share, shown, text
from maekit.report.words import progress, state_of
from maekit.terminal import short_time
from maekit.training.interval import percent
from maekit.viz.plots import Curve, Drawing

COLOURS = ("#1f4e79", "#c4622d", "#2a7f62", "#7b4ba0", "#b08a1e", "#777777")
DASHES = ("solid", "dashed", "dotted", "dashdot")
MOST_DIFFERENCES = 40
LONGEST_NAME = 28


def labels_of(runs: Sequence[RunFolder]) -> list[str]:
    """Names that tell the runs apart: the folder's own where that is enough, else the path, else a number too."""
    names = [run.name for run in runs]
    found = [name if names.count(name) == 1 else run.shown_path for name, run in zip(names, runs, strict=True)]
    return [f"{name} ({number})" if found.count(name) > 1 else name for number, name in enumerate(found, 1)]


def result_rows(runs: Sequence[RunFolder], times: Sequence[Times]) -> list[list[object]]:
    """Name of a result, then its value in each run; those that no run has are left out."""

    def probe(run: RunFolder, name: str) -> str:
        for card in run.cards:
            rows = [mapping(row) for row in items(card.values.get("scores"))[:1]]
            images = count(card.values.get("test_images"))
            value = share(rows[0].get(name)) if rows else None
            if value is not None and images:
                return f"{percent(value, images)} ({text(card.values.get('data'), 60)})"
        return ""

    def score(run: RunFolder) -> str:
        for card in run.cards:
            top1, images = share(card.values.get("top1")), count(card.values.get("test_images"))
            if top1 is not None and images:
                return f"{percent(top1, images)} ({text(card.values.get('data'), 60)})"
        return ""

    def miou(run: RunFolder) -> str:
        found = [share(mapping(card.values.get("score")).get("miou")) for card in run.cards]
        return next((f"{100 * value:.2f}" for value in found if value is not None), "")

    def last(kind: str, name: str, scale: float, digits: int) -> Callable[[RunFolder], str]:
        return lambda run: "" if (value := run.last(kind, name)) is None else f"{scale * value:.{digits}f}"

    each: dict[str, Callable[[RunFolder], str]] = {
        "state": state_of,
        "done": progress,
        "held-out skill": last("heldout", "skill", 1, 3),
        "held-out loss": last("heldout", "loss", 1, 4),
        "online k-NN, %": last("probe", "knn", 100, 1),
        "online linear, %": last("probe", "linear", 100, 1),
        "linear probe, test %": lambda run: probe(run, "linear"),
        "k-NN, test %": lambda run: probe(run, "knn"),
        "classifier, test top-1 %": score,
        "mean IoU, %": miou,
    }
    rows: list[list[object]] = [[name, *(how(run) or "-" for run in runs)] for name, how in each.items()]
    rows.append(["time", *(short_time(one.seconds) if one.seconds else "-" for one in times)])
    rows.append(["images/s, median", *(f"{one.median:,.0f}" if one.median is not None else "-" for one in times)])
    return [row for row in rows if any(value != "-" for value in row[1:])]


def differing(runs: Sequence[RunFolder]) -> list[list[object]]:
    """Settings in which runs that have them differ, with each one's value; a dash where a run has none of that name."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    kept = [name for name in names if name not in NOT_COMPARED - {"data", "recipe", "preset", "source"}]
    rows: list[list[object]] = []
    for name in kept:
        values = {number: shown(run.config[name]) for number, run in enumerate(runs) if name in run.config}
        if len(set(values.values())) > 1:
            told = [values.get(number, "-") for number in range(len(runs))]
            rows.append([code(f"--{text(name, 80).replace('_', '-')}"), *told])
    return rows


def comparison(runs: Sequence[RunFolder], times: Sequence[Times]) -> Html:
    """The tables, then the curves."""
    labels = labels_of(runs)
    headings: list[object] = ["", *(tag("a", label, href=f"#run{number}") for number, label in enumerate(labels, 1))]
    parts = [heading(2, "Side by side", "compare"), table(headings, result_rows(runs, times), "Results")]
    rows = differing(runs)
    if rows:
        columns = tuple(range(len(runs) + 1))
        parts.append(table(headings, rows[:MOST_DIFFERENCES], "Settings that differ", columns))
        if len(rows) > MOST_DIFFERENCES:
            parts.append(paragraph(f"{len(rows) - MOST_DIFFERENCES} more settings differ.", class_="note"))
    else:
        parts.append(paragraph("No setting differs but names and what depends on the machine."))
    drawn = drawings(runs)
    if drawn:
        parts += [legend(labels), charts(drawn, "all")]
    return join(parts)


def legend(labels: Sequence[str]) -> Html:
    """Which line is which run, said once for all charts."""
    inner = []
    named = {light: name for name, (light, _) in PALETTE.items()}
    for number, label in enumerate(labels):
        colour, dash = look(number)
        border = f"border-top-style:{'double' if dash == 'dashdot' else dash};border-top-color:var(--{named[colour]})"
        inner.append(tag("li", tag("span", aria_hidden="true", class_="key", style=border), label))
    return tag("ul", *inner, class_="legend")


def look(number: int) -> tuple[str, str]:
    """Colour and dash of a run's line; no two of the first 24 share both."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def drawings(runs: Sequence[RunFolder]) -> list[Drawing]:
    """One axes for each quantity that two runs have, a line for each run."""
    wanted = [
        ("Held-out skill", "heldout", "skill", 1.0), ("Held-out loss", "heldout", "loss", 1.0),
        ("Online k-NN, %", "probe", "knn", 100.0), ("Online linear probe, %", "probe", "linear", 100.0),
        ("Held-out top-1, %", "heldout", "top1", 100.0), ("Held-out mean IoU, %", "heldout", "miou", 100.0),
        ("Training loss", "step", "loss", 1.0), ("Learning rate", "step", "lr", 1.0),
    ]  # fmt: skip
    along = "step" if any(run.task == "segment" for run in runs) else "epoch"
    found = []
    for title, kind, name, scale in wanted:
        curves = []
        for run in runs:
            curve = Curve()
            for record in run.of_kind(kind):
                place = record.get(along)
                if isinstance(place, int | float) and not isinstance(place, bool):
                    curve.add(float(place), record.get(name))
            curves.append(curve)
        if sum(bool(curve.values) for curve in curves) > 1:
            found.append(Drawing(title, "optimiser steps" if along == "step" else "epochs", drawer(curves, scale)))
    return found


def drawer(curves: Sequence[Curve], scale: float) -> Callable[[Axes], None]:
    """Draws a line for each run; values before the first step may leave the frame, since they flatten all others."""

    def draw(axes: Axes) -> None:
        points = [zip(curve.epochs, curve.values, strict=True) for curve in curves]
        trained = [scale * value for one in points for place, value in one if place > 0]
        if trained:
            low, high = min(trained), max(trained)
            room = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-6)
            axes.set_ylim(low - room, high + room)
        for number, curve in enumerate(curves):
            if curve.values:
                few = curve.thinned(MOST_POINTS)
                places, values = few.epochs, [scale * value for value in few.values]
                colour, dash = look(number)
                axes.plot(places, values, color=colour, linestyle=dash, linewidth=1.5,
                          marker="o" if len(values) < 30 else "", markersize=3.2)  # fmt: skip

    return draw
