"""How a run went: machine, versions, time, speed, sessions, and what was left out or skipped."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass

from matplotlib.axes import Axes

from maekit.report.charts import charts
from maekit.report.folder import RunFolder
from maekit.report.html import Html, code, details, heading, join, pairs, paragraph, table
from maekit.report.values import count, items, mapping, number, shown, text
from maekit.terminal import short_time
from maekit.viz.plots import Curve, Drawing

MOST_POINTS = 500
"""Of a line in a chart."""
NAMED = 10
"""Unreadable files and skipped steps that are named."""


@dataclass(frozen=True)
class Times:
    """What the lines of metrics.jsonl say of time."""

    seconds: float
    sessions: int
    speeds: tuple[float, ...]
    waited: float | None
    """Share of the time between lines in which the first process waited for images."""

    @property
    def median(self) -> float | None:
        """Images a second: the middle one of all lines."""
        return statistics.median(self.speeds) if self.speeds else None


def times_of(run: RunFolder) -> Times:
    """Seconds count from 0 in each session, so a line with fewer than the one before it begins another one.

    What was done after the last checkpoint of a killed session was done again, and is not in the file.
    """
    total, before, sessions = 0.0, 0.0, 0
    speeds, waits, spans = [], 0.0, 0.0
    for record in run.of_kind("step"):
        seconds, speed = number(record.get("seconds")), number(record.get("images_per_s"))
        if seconds is not None and seconds >= 0:
            if not sessions or seconds < before:
                total, before, sessions = total + before, 0.0, sessions + 1
            if (waited := number(record.get("waited"))) is not None and waited >= 0:
                waits, spans = waits + waited, spans + seconds - before
            before = seconds
        if speed is not None and speed > 0:
            speeds.append(speed)
    return Times(total + before, sessions, tuple(speeds), min(1.0, waits / spans) if spans > 0 else None)


def speed_drawings(run: RunFolder) -> list[Drawing]:
    """Images a second over the run."""
    curve = Curve()
    for record in run.of_kind("step"):
        place = number(record.get("step" if run.task == "segment" else "epoch"))
        if place is not None:
            curve.add(place, number(record.get("images_per_s")))
    if len(curve.values) < 2:
        return []

    def draw(axes: Axes) -> None:
        few = curve.thinned(MOST_POINTS)
        axes.plot(few.epochs, few.values, color="#2a7f62", linewidth=1.2)
        axes.set_ylim(0.0, 1.1 * max(curve.values))

    along = "optimiser steps" if run.task == "segment" else "epochs"
    return [Drawing("Speed, images/s in training", along, draw)]


def facts_section(run: RunFolder, times: Times, prefix: str, level: int) -> Html:
    """Everything about the machine and the time, then what was left out."""
    values = run.environment or mapping(run.own_card.get("environment"))
    if run.task == "probe" and run.cards:
        values = mapping(run.cards[0].values.get("environment"))
    command = [word for word in items(values.get("command")) if isinstance(word, str)][:200]
    rows: list[tuple[object, object]] = []
    if command:
        again = " (the last session's)" if "resume" in command[:2] or times.sessions > 1 else ""
        rows.append((f"command{again}", code(text(shlex.join(command)))))
    rows.append(("folder", code(run.shown_path)))
    for name, key in (("commit of maekit", "commit"), ("device", "device"), ("processor", "cpu"),
                      ("system", "platform"), ("Python", "python")):  # fmt: skip
        if values.get(key) is not None:
            rows.append((name, shown(values[key])))
    if (threads := count(values.get("threads"))) is not None:
        rows.append(("threads", f"{threads}"))
    versions = mapping(values.get("versions"))
    if versions:
        told = ", ".join(f"{text(name, 40)} {text(value, 60)}" for name, value in list(versions.items())[:40])
        rows.append(("versions", told))
    for name, key in (("seed", "seed"), ("precision", "precision"), ("processes", "processes")):
        if run.config.get(key) is not None:
            rows.append((name, shown(run.config[key])))
    if times.seconds:
        words = f"{short_time(times.seconds)} in the lines that were kept, evaluation and saving included"
        rows.append(("time spent", words))
        stops = times.sessions - 1
        rows.append(("stops and resumes", f"{stops}, as the clock of metrics.jsonl began again {stops} times" if stops
                     else "none"))  # fmt: skip
    if times.median is not None:
        low, high = min(times.speeds), max(times.speeds)
        rows.append(("speed", f"{times.median:,.0f} images/s in training (median; {low:,.0f} to {high:,.0f})"))
    if times.waited is not None:
        rows.append(("waiting for images", f"{100 * times.waited:.1f} % of the time (first process)"))
    parts = [heading(level, "How it ran"), pairs(rows)]
    if drawn := speed_drawings(run):
        parts.append(charts(drawn, f"{prefix}speed"))
    return join([*parts, left_out(run, level + 1)])


def left_out(run: RunFolder, level: int) -> Html:
    """Unreadable files, steps that were skipped, goings back, and spikes."""
    if run.task == "probe":
        return Html("")
    parts: list[Html] = []
    if run.unreadable:
        rows = [[text(one.get("name"), 300) or "?", text(one.get("reason"), 300)] for one in run.unreadable[:NAMED]]
        title = f"Unreadable files: {len(run.unreadable):,}"
        title += f", the first {NAMED}" if len(run.unreadable) > NAMED else ""
        parts.append(table(["file", "why"], rows, title, (0, 1)))
    bad = max(count(run.state.get("bad_steps")) or 0, len(run.bad_steps))
    if bad:
        steps = [f"{count(one.get('step')):,}" for one in run.bad_steps[:NAMED] if count(one.get("step"))]
        named = f" (step {', '.join(steps)}{' ...' if bad > len(steps) else ''})" if steps else ""
        parts.append(paragraph(f"{bad:,} steps were skipped, as their loss or gradient was not finite{named}."))
    if back := count(run.state.get("rollbacks")):
        scale = number(run.state.get("lr_scale"))
        parts.append(
            paragraph(f"It went back to a checkpoint {back} times, and goes on with {shown(scale)} of the rate.")
        )
    if spikes := run.of_kind("spike"):
        rows = [[shown(one.get("step")), shown(one.get("loss")), shown(one.get("median"))] for one in spikes[:NAMED]]
        inner = table(["step", "loss", "median before"], rows, "", ())
        parts.append(details(f"Spikes of the loss: {len(spikes):,}", inner))
    if not parts:
        parts.append(paragraph("Every file was read, and no step was skipped.", class_="note"))
    return join([heading(level, "Left out and skipped"), *parts])
