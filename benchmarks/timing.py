"""Timing in turn: A B A B ..., medians with quartiles, ratios by round; the machine's peak; tables and JSON.

Two things are never compared by runs that lie apart in time: a machine gets warm, and others work on it too.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from maekit.environment import environment

Clock = Callable[[Callable[[], Any]], float]
"""Does some work and returns the seconds that it took."""


class Spread(NamedTuple):
    """Median and quartiles of so many numbers."""

    median: float
    low: float
    high: float
    number: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation; a single number is all three."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(median, low, high, len(values))


def wall_clock(work: Callable[[], Any]) -> float:
    """Seconds on the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def device_clock(device: torch.device) -> Clock:
    """Seconds that work takes to its end on a device: between two events on CUDA, on the clock elsewhere."""
    if device.type != "cuda":
        return wall_clock

    def clock(work: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000

    return clock


def alternate(
    works: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, clock: Clock = wall_clock
) -> dict[str, list[float]]:
    """Seconds of each work in each round: all take their turn in every round, and the first rounds are not counted."""
    for _ in range(warmup):
        for work in works.values():
            clock(work)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(clock(work))
    return seconds


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times faster ours is, from the seconds of the same rounds: each round gives one ratio."""
    return spread([their / our for our, their in zip(ours, theirs, strict=True)])


def matmul_peak(device: torch.device, precision: str, repeats: int = 6, side: int | None = None) -> float:
    """FLOP/s of the best of some square matrix products, of sizes that keep the device busy."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sides = (side,) if side else (4096, 8192) if device.type == "cuda" else (1024, 2048)
    clock, best = device_clock(device), 0.0
    for n in sides:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        torch.mm(a, b, out=out)
        for _ in range(repeats):
            best = max(best, 2 * n**3 / clock(lambda: torch.mm(a, b, out=out)))  # noqa: B023 # called at once
    return best


def peaks(device: torch.device, repeats: int = 6, side: int | None = None) -> dict[str, Any]:
    """Peaks of both precisions, and whether float32 products may be rounded to TF32 (they are not by default)."""
    found: dict[str, Any] = {name: matmul_peak(device, name, repeats, side) for name in ("fp32", "bf16")}
    found["tf32"] = torch.get_float32_matmul_precision() != "highest"
    return found


def say_machine(device: torch.device, found: Mapping[str, Any]) -> str:
    """The environment on one line."""
    about = environment(device)
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "timm", "numpy", "pillow"))
    where = about["device"] if device.type == "cuda" else f"{about['cpu']} ({about['cpu_capability']})"
    tf32 = " with TF32" if found["tf32"] else ""
    return (
        f"{where}, {about['threads']} threads, matrix products peak at {found['fp32'] / 1e9:,.0f} GFLOP/s in float32"
        f"{tf32}, {found['bf16'] / 1e9:,.0f} in bfloat16; Python {about['python']}, {packages}, "
        f"commit {about['commit']}"
    )


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for the terminal; a log is 160 characters wide."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """The result as JSON, where a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1, default=str) + "\n")


def resident(kind: str) -> int:
    """Bytes of memory of this process: VmRSS now, or VmHWM, the most since `forget_peak` (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew at what is resident now (proc(5), clear_refs); where that is forbidden it stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
