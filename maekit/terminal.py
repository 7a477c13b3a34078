"""What a user sees while waiting: one console for the first process, progress bars, tables."""

from __future__ import annotations

import collections
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from maekit.runtime import Choice

FIRST_SPEAKS = 10.0
"""Seconds for which an error of another process than the first waits: a busy machine takes some to end that one."""


def make_console() -> Console:
    """A console that speaks for the first process and is silent in the others; a log file is 120 characters wide."""
    quiet = int(os.environ.get("RANK", "0")) != 0
    return Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else 120)


def say_of_own(console: Console, line: str) -> None:
    """Print what only this process knows: one that is not the first, whose console is silent, says which it is."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        console, line = Console(stderr=True, highlight=False, soft_wrap=True), f"\\[process {rank}] {line}"
    console.print(line)


def complain(problems: Sequence[str]) -> int:
    """Print problems to stderr, one a line.

    Of several processes the first speaks at once; the others, who mostly have the same to say, only if it does not: the
    launcher ends them when it has ended. They say who they are.

    Returns: the exit code of a user's error.
    """
    who = f" [process {os.environ['RANK']}]" if os.environ.get("RANK", "0") != "0" else ""
    if who:
        with suppress(KeyboardInterrupt):
            time.sleep(FIRST_SPEAKS)
    for problem in problems:
        print(f"maekit: error{who}: {problem}", file=sys.stderr)
    return 2


def output_is_closed() -> bool:
    """Whether whoever read the output has enough of it, as head has; the rest then goes nowhere, in silence."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    # Linux says POLLERR of a pipe that nobody reads any more, macOS and BSD say POLLHUP.
    closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed


def make_progress(console: Console, *columns: str) -> Progress:
    """A bar with count, rich-formatted fields and time left; nothing is drawn where output is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal or console.quiet,
        transient=True,
    )


@contextmanager
def counting(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, total)."""
    with make_progress(console) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def short_time(seconds: float) -> str:
    """A duration as a person says it: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def short_size(count: float) -> str:
    """Bytes as a person says them: 900 bytes, 12.5 kB, 1.23 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


class Pace:
    """Images a second and the time left, evaluation included, by the last few times of asking: an hour in which the
    machine was slow or asleep is soon forgotten."""

    ASKED = 10

    def __init__(self, step: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.past = collections.deque([(time.monotonic(), step)], self.ASKED + 1)

    def told(self, step: int, total: int) -> str:
        """The end of a line, empty where nothing was done yet or steps were taken back."""
        now = time.monotonic()
        if step <= self.past[-1][1]:
            self.past.clear()
        self.past.append((now, step))
        began, first = self.past[0]
        if step == first or now <= began:
            return ""
        seconds = (now - began) / (step - first)
        left = f"  {short_time((total - step) * seconds)} left" if step < total else ""
        return f"  {self.batch_size / seconds:,.0f} images/s{left}"


def print_settings(console: Console, title: str, settings: Mapping[str, str | Choice[Any]]) -> None:
    """Settings, one a line; automatic choices with their reasons."""
    console.print(f"[bold]{title}[/bold]")
    table = Table.grid(padding=(0, 2))
    for name, setting in settings.items():
        if isinstance(setting, Choice):
            value = {True: "yes", False: "no"}[setting.value] if isinstance(setting.value, bool) else setting.value
            table.add_row(f"[dim]{name}[/dim]", f"{value}  [dim]({escape(setting.reason)})[/dim]")
        else:
            table.add_row(f"[dim]{name}[/dim]", escape(setting))
    console.print(table)


def remark(console: Console, lines: Iterable[str]) -> None:
    """What a user may want to know of data or weights, a line each."""
    for line in lines:
        console.print(line, style="dim", markup=False)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
