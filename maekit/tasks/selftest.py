"""Prove on this machine, with this recipe, that a stopped run continues exactly.

    maekit selftest resume digits
    maekit selftest resume folder --data ~/images --batch-size 64

One run is left alone. Others are stopped by SIGTERM at several steps and resumed, each in fresh processes, as a user or
a cluster would do it. Then every tensor is compared bit for bit (weights, optimiser, generators) and every line of the
metrics, wall-clock fields aside. On a CPU all must be equal; GPU kernels may add in another order each time.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from maekit.config import SelftestConfig, UserError, flag
from maekit.terminal import make_console, make_table
from maekit.training.checkpoint import Checkpoint, latest, load
from maekit.training.metrics import MetricsLog

WALL_CLOCK = ("images_per_s", "seconds", "waited")
POLL = 0.005
"""Seconds between two looks at a run's metrics: the run goes on meanwhile, so a quick one is stopped a little later."""


class Outcome(NamedTuple):
    """One stop: the step after which the run really stopped (None: it was too quick), and what differs, by name."""

    step: int | None
    differences: dict[str, str]


def main(recipe: str, config: SelftestConfig) -> int:
    """Run alone, stop and resume, compare; returns 0 where all is equal, 1 otherwise.

    Raises:
        UserError: the settings make no sense, or the recipe cannot be run with them; says what the run said.
    """
    if config.steps < 3 or not 1 <= config.stops < config.steps:
        raise UserError(
            f"--steps {config.steps} --stops {config.stops}: needs 3 steps or more, and fewer stops than steps"
        )
    console = make_console()
    with contextlib.ExitStack() as stack:
        if config.out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maekit-selftest-")))
        else:
            folder = Path(config.out).expanduser()
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"--out {folder}: is not empty; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
        words = command(recipe, config)
        console.print(f"left alone: maekit {' '.join(words)}")
        run_to_end([*words, "--out", str(folder / "alone")], folder / "alone.log")
        outcomes = []
        for number in range(1, config.stops + 1):
            wanted = max(1, round(number * config.steps / (config.stops + 1)))
            outcomes.append(stop_and_resume(words, wanted, folder / f"stopped{number}", folder / "alone"))
            console.print(f"stop {number} of {config.stops}: {tell(outcomes[-1])}")
    return report(console, outcomes)


def command(recipe: str, config: SelftestConfig) -> list[str]:
    """The words of the run that is tested: a line of metrics for each step, so that the stop finds its place."""
    words = ["pretrain", recipe, "--steps", str(config.steps), "--log-every", "1", "--probe-every", "0"]
    words += ["--panel-every", "0", "--device", config.device]
    for name in ("data", "batch_size", "accum", "workers", "precision"):
        value = getattr(config, name)
        if value not in (None, ""):
            words += [f"--{flag(name)}", str(value)]
    return words


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A fresh maekit process; its words go to the end of a file."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "maekit", *words], stdout=file, stderr=subprocess.STDOUT)


def run_to_end(words: list[str], log: Path) -> None:
    """Raises UserError with the process's own words where it fails."""
    process = start(words, log)
    try:
        code = process.wait()
    finally:
        process.kill()  # after Ctrl-C in this process; nothing to do otherwise
    if code:
        raise UserError(failure(words, code, log))


def failure(words: list[str], code: int, log: Path) -> str:
    """What a failed process said last."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if "error" in line.lower()] or lines[-3:]
    return f"maekit {' '.join(words)} ended with code {code}: {' | '.join(said[-3:])}"


def stop_and_resume(words: list[str], wanted: int, out: Path, alone: Path) -> Outcome:
    """Stop a new run once it has logged a step, resume it, and compare it with the run that was left alone."""
    log = out.with_suffix(".log")
    words = [*words, "--out", str(out)]
    process = start(words, log)
    try:
        while process.poll() is None and steps_logged(out) < wanted:
            time.sleep(POLL)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    if code == 0:
        return Outcome(None, {})  # the whole run was quicker than the signal
    if code != 128 + signal.SIGTERM:
        raise UserError(failure(words, code, log))
    stopped, _ = latest(out / "checkpoints")
    if stopped is None:
        return Outcome(0, {"checkpoint": "none was written"})
    step = int(load(stopped).state["step"])
    run_to_end(["resume", str(out)], log)
    return Outcome(step, differences(alone, out))


def steps_logged(run: Path) -> int:
    """The last step in a run's metrics, which is being written."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((int(record["step"]) for record in map(json.loads, lines)), default=0)


def differences(alone: Path, other: Path) -> dict[str, str]:
    """What is not equal, by name: the first difference of each of weights, optimiser, generators, metrics."""
    saved: list[Checkpoint] = []
    for run in (alone, other):
        path, problems = latest(run / "checkpoints")
        if path is None:
            return {"checkpoint": f"none in {run.name}: {'; '.join(problems)}"}
        saved.append(load(path))
    found = {}
    for name, part in (("weights", "model"), ("optimiser", "optimizer"), ("generators", "rng")):
        if text := first_difference(getattr(saved[0], part), getattr(saved[1], part)):
            found[name] = text
    one, two = (comparable(run) for run in (alone, other))
    pairs = [f"line {number}: {a} and {b}" for number, (a, b) in enumerate(zip(one, two, strict=False), 1) if a != b]
    if len(one) != len(two):
        pairs.append(f"{len(one)} and {len(two)} lines")
    if pairs:
        found["metrics"] = pairs[0]
    return found


def comparable(run: Path) -> list[dict[str, Any]]:
    """The metrics without wall-clock fields."""
    records = MetricsLog(run / "metrics.jsonl").read()
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in records]


def first_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """The first tensor that is not equal bit for bit (NaN equals NaN, 0.0 does not equal -0.0); empty for none."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            return f"{name} is missing"
        a, b = one[name], other[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} has another shape or type"
        if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            return f"{name} by up to {float((a.double() - b.double()).abs().max()):.3g}"
    return ""


def tell(outcome: Outcome) -> str:
    """An outcome in words."""
    if outcome.step is None:
        return "the run was over before the signal came"
    return f"stopped after step {outcome.step}, resumed: " + ("DIFFERENT" if outcome.differences else "equal")


def report(console: Console, outcomes: list[Outcome]) -> int:
    """The table, and what it means."""
    tried = [outcome for outcome in outcomes if outcome.step is not None]
    if not tried:
        raise UserError(f"--steps: all {len(outcomes)} runs were over before the signal came; give more steps")
    columns = ("checkpoint", "weights", "optimiser", "generators", "metrics")
    rows = [[str(one.step), *(one.differences.get(name, "equal") for name in columns)] for one in tried]
    console.print(make_table("resumed against left alone", ["stopped after step", *columns], rows))
    lost = sum(bool(outcome.differences) for outcome in tried)
    quick = f"; {len(outcomes) - len(tried)} were over before the signal came" if len(tried) < len(outcomes) else ""
    console.print(f"{len(tried)} stopped and resumed, {lost} lost{quick}")
    return int(lost > 0)
