"""metrics.jsonl as a run keeps it: written line by line, and kept in memory for as long as the disk refuses it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any, Protocol

from accelerate import Accelerator
from rich.console import Console

from maekit.training.metrics import MetricsLog

MOST_UNWRITTEN = 10_000
"""Lines of metrics.jsonl, at most, that wait in memory for a disk that can be written again."""


class Diary(Protocol):
    """What keeps metrics.jsonl: a pretraining `Job`, or a run of training on labels."""

    accelerator: Accelerator
    console: Console
    metrics: MetricsLog
    unwritten: deque[dict[str, Any]]
    refusals: int


def note(diary: Diary, record: dict[str, Any]) -> None:
    """Write a whole record, with its kind and step; a disk that refuses it stops nothing."""
    if diary.accelerator.is_main_process:
        diary.unwritten.append(record)
        write_lines(diary)
    if diary.accelerator.trackers:
        numbers = {f"{record['kind']}/{key}": value for key, value in record.items() if isinstance(value, float)}
        try:
            diary.accelerator.log(numbers, step=record["step"])
        except OSError as error:
            diary.console.print(f"[red]the trackers failed:[/red] {error}; training goes on")


def write_lines(diary: Diary) -> None:
    """Write the waiting lines of metrics.jsonl; what the disk refuses is kept in memory for the next time."""
    try:
        while diary.unwritten:
            diary.metrics.append(diary.unwritten[0])
            diary.unwritten.popleft()
        diary.refusals = 0
    except OSError as error:
        with suppress(OSError):
            diary.metrics.close()  # opening it again cuts what was written of a line
        diary.refusals += 1
        if diary.refusals & (diary.refusals - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time: loud, but no flood
            diary.console.print(
                f"[red]{diary.metrics.path} cannot be written[/red] (time {diary.refusals}): {error}; training goes "
                f"on, {len(diary.unwritten)} lines wait"
            )
