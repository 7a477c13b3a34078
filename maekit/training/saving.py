"""How a run is begun, saved, taken up again, and set back: what stands between a `Job` and its folder of checkpoints.

A save that fails is no end: the checkpoints before it stand, training goes on, and the next try comes soon. Functions
that work on a `Job` must be called by all processes, and tell all of them the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError

from maekit.config import UserError
from maekit.configfile import from_values, to_json
from maekit.environment import environment, package_versions
from maekit.stopping import Stopped, greatest
from maekit.training import checkpoint as checkpoints
from maekit.training import lock, nonfinite
from maekit.training.diary import write_lines
from maekit.training.metrics import MetricsLog
from maekit.training.run import Job, NothingToPredict, Position, bad_step_record, log, measure_trivial
from maekit.training.run_state import load_optimizer_tensors, optimizer_tensors, restore_rng, rng_tensors
from maekit.weights.passport import Passport
from maekit.weights.store import WEIGHTS_FILE, check_names

URGENT_WAITS = (1.0, 2.0)
"""Seconds before the second and the third try of a save that cannot wait: the last one, or the one of a stop."""


class SaveClock:
    """When the next save is due: every `minutes`; after failures in a row, 1, 2, 4 ... minutes later."""

    def __init__(self, minutes: float, most_unsaved: float) -> None:
        self.minutes, self.most_unsaved = minutes, most_unsaved
        self.saved = self.tried = time.monotonic()
        self.failures = 0

    @property
    def wait(self) -> float:
        """Minutes from the last try to the next."""
        return min(self.minutes, 2.0 ** (self.failures - 1)) if self.failures else self.minutes

    @property
    def unsaved(self) -> float:
        """Minutes without a checkpoint."""
        return (time.monotonic() - self.saved) / 60

    def is_due(self) -> bool:
        """Whether it is time for a save, or for another try."""
        return time.monotonic() - self.tried >= 60 * self.wait

    def note(self, good: bool) -> None:
        """A save was tried."""
        self.tried = time.monotonic()
        self.failures = 0 if good else self.failures + 1
        if good:
            self.saved = self.tried


def begin(job: Job, fresh: bool) -> None:
    """Start the run's folder; a fresh one gets the trivial losses and a checkpoint of step 0, which proves the disk.

    A signal, or data with nothing to predict, leave nothing behind of a fresh run. From here on there is always a
    checkpoint to go on from.

    Raises:
        UserError: the folder cannot be written or has too little room, or images without any variation.
    """
    config, accelerator, out = job.config, job.accelerator, job.out
    try:
        if accelerator.is_main_process:
            check_space(job)
            try:
                out.mkdir(parents=True, exist_ok=True)
                write_whole(out / "config.json", to_json(config))  # first: from here on `resume` knows the run
                images = {"images": {"train": len(job.train_ids), "held-out": len(job.heldout_ids)}}
                write_whole(out / "env.json", json.dumps(environment(accelerator.device) | images, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"--out {out}: cannot be written: {error}") from error
        accelerator.wait_for_everyone()
        if config.trackers:
            accelerator.init_trackers("maekit", config={k: str(v) for k, v in dataclasses.asdict(config).items()})
        if fresh:
            if accelerator.is_main_process:
                job.metrics.truncate(0)  # lines of a run that was killed before its first checkpoint
            measure_trivial(job)
            if not save(job, SaveClock(config.save_minutes, config.max_unsaved_minutes), urgent=True):
                raise UserError(f"--out {out}: the first checkpoint cannot be written (see above)")
    except (Stopped, NothingToPredict):
        job.stop.patience = None  # nothing may interrupt what follows
        if fresh and accelerator.is_main_process:
            leave_nothing(out)
        raise


def leave_nothing(out: Path) -> None:
    """Empty the folder of a run that ends before it began."""
    for path in out.iterdir():
        if path.name != lock.FILE:  # the lock goes when it is let go
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def never_began(out: Path) -> bool:
    """Whether a run's folder holds nothing of a step: it was killed before its first checkpoint was whole."""
    if any((out / "checkpoints").glob("step-*")) or (out / WEIGHTS_FILE).exists():
        return False
    return not any(record.get("step") for record in MetricsLog(out / "metrics.jsonl").read())


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def check_space(job: Job) -> None:
    """Refuse to begin where the checkpoints to come will not fit.

    Raises:
        UserError: too little free space; names it, and the flags.
    """
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    one = sum(t.nbytes for t in job.model.state_dict().values()) + 2 * sum(p.nbytes for p in parameters)
    folder = job.out / "checkpoints"
    there = len(list(folder.glob("step-*"))) if folder.is_dir() else 0
    count = max(1, job.config.keep + 1 - there)  # the one being written stands beside those that are kept
    needed, free = 1.1 * one * count, shutil.disk_usage(next(p for p in (job.out, *job.out.parents) if p.exists())).free
    if needed > free:
        raise UserError(
            f"--out {job.out}: {count} checkpoints of {one / 1e6:,.1f} MB need {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free: free some space, name a folder on another disk, or lower --keep"
        )


def save(job: Job, clock: SaveClock, urgent: bool = False) -> bool:
    """A checkpoint with all that an exact continuation needs, then the run's model.safetensors; see `persist`."""
    rng = job.rng | gather_rng(job.accelerator)
    return persist(lambda: _write(job, rng), job.out, job.accelerator, job.console, clock, urgent)


def persist(
    write: Callable[[], None],
    out: Path,
    accelerator: Accelerator,
    console: Console,
    clock: SaveClock,
    urgent: bool = False,
) -> bool:
    """Let the first process write a checkpoint, and try again where the disk fails.

    urgent: there is no later, so try three times. Returns: whether it succeeded, the same on all processes.

    Raises:
        UserError: none has succeeded for --max-unsaved-minutes.
    """
    for wait in (0.0, *(URGENT_WAITS if urgent else ())):
        time.sleep(wait)
        problem = ""
        if accelerator.is_main_process:
            try:
                write()
            except (OSError, SafetensorError) as error:
                problem = str(error)
        (failed,) = greatest(accelerator, bool(problem))
        clock.note(not failed)
        if not failed:
            return True
        console.print(
            f"[bold red]checkpoint failed ({_ordinal(clock.failures)} time, {clock.unsaved:.0f} min without one):"
            f"[/bold red] {problem}" + ("" if urgent else f"; training goes on, next try in {clock.wait:g} min"),
            soft_wrap=True,
        )
    (over,) = greatest(accelerator, clock.unsaved > clock.most_unsaved)
    if over and not urgent:
        raise UserError(
            f"--out {out}: no checkpoint could be written for {clock.unsaved:.0f} min (--max-unsaved-minutes "
            f"{clock.most_unsaved:g}), so the run stops; mend the disk, then maekit resume {out}"
        )
    return False


def _write(job: Job, rng: dict[str, torch.Tensor]) -> None:
    config = job.config
    assert config.mean is not None and config.std is not None
    write_lines(job)
    with suppress(OSError):
        job.metrics.sync()
    job.position.metrics_bytes = job.metrics.position
    content = checkpoints.Checkpoint(
        model=job.model.state_dict(),
        optimizer=optimizer_tensors(job.optimizer, job.model.named_parameters()),
        rng=rng,
        state=dataclasses.asdict(job.position),
        model_metadata=passport_of(job).to_metadata(),
    )
    keep = config.keep + job.position.bad_row  # those of bad steps must not crowd out the ones to go back to
    path = checkpoints.save(job.out / "checkpoints", job.position.step, content, keep)
    checkpoints.publish(path, job.out / WEIGHTS_FILE)


def passport_of(job: Job) -> Passport:
    """What the weights at this position say about themselves."""
    config = job.config
    assert config.mean is not None and config.std is not None
    passport = Passport(
        model=job.model.config, mean=config.mean, std=config.std, interpolation=config.interpolation,
        crop_pct=config.crop_pct, grid=job.model.grid_hw, steps=job.position.step, epochs=job.epochs_done,
        data=job.data_name, fingerprint=job.part.fingerprint, recipe=config.recipe, versions=package_versions(),
        origin=config.init,
    )  # fmt: skip
    if config.weights_license:  # of the weights that it began with
        passport.weights_license = config.weights_license
    return passport


def restore(job: Job, path: Path) -> None:
    """Put a checkpoint's weights, optimiser, position and generators into the job, and cut metrics.jsonl to it."""
    position, unknown = _take_up(job, path)
    if unknown and job.config.drop_path > 0:
        job.console.print(f"no saved generator state for {', '.join(unknown)}: --drop-path draws anew there")
    if job.position.total_steps < position.step:
        raise UserError(f"the run is at step {position.step:,}, beyond the new end at {job.position.total_steps:,}")
    if job.position.total_steps != position.total_steps:
        job.console.print(
            f"the run's length changes from {position.total_steps:,} to {job.position.total_steps:,} steps: the cosine "
            f"starts again at its peak from step {max(position.step, job.warmup_steps):,}"
        )
        position.total_steps, position.schedule_start = job.position.total_steps, position.step
    _set_position(job, position)
    job.console.print(f"continuing from {path.name} of {position.total_steps:,}")


def roll_back(job: Job, last_bad: int) -> bool:
    """Go back, once in a run, to the last good checkpoint, with half the learning rate; False where that was done.

    last_bad: the step (0-based) that ended the row of bad ones. Good is a checkpoint that stands before the last good
    step; one that stands at the beginning of the row has the same weights that failed, and is second choice.
    """
    first_bad = last_bad - job.config.max_bad_steps + 1
    now, folder = job.position, job.out / "checkpoints"
    chosen = -1
    if job.accelerator.is_main_process and now.rollbacks == 0:
        steps = sorted(
            (step for step in _steps(folder) if step <= first_bad), key=lambda step: (step < first_bad, step)
        )
        whole = (step for step in reversed(steps) if not checkpoints.verify(folder / f"step-{step:06d}"))
        chosen = next(whole, -1)
    (found,) = greatest(job.accelerator, chosen)
    if found < 0:
        return False
    position, _ = _take_up(job, folder / f"step-{int(found):06d}")
    # A schedule that began where the run was lengthened begins at a checkpoint from before that.
    position.total_steps, position.schedule_start = now.total_steps, min(now.schedule_start, position.step)
    position.rollbacks, position.lr_scale = now.rollbacks + 1, now.lr_scale / 2
    position.bad_steps = now.bad_steps
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process:
        for step in _steps(folder):
            if step > position.step:  # they are of the row; a resume must not take them for the newest
                shutil.rmtree(folder / f"step-{step:06d}", ignore_errors=True)
    _set_position(job, position)
    log(job, {"kind": "rollback", "from": last_bad + 1, "lr_scale": position.lr_scale})
    job.console.print(
        f"[bold red]{job.config.max_bad_steps} bad steps in a row:[/bold red] back to step {position.step:,} with half "
        "of the learning rate; the next time the run stops"
    )
    return True


def give_up(job: Job, step: int, lr: float) -> None:
    """Write down the bad step (0-based) that ends the run, so that `nonfinite.replay` can do it again."""
    folder = job.out / "nonfinite" / f"step-{step + 1}"
    if job.accelerator.is_main_process:
        record = bad_step_record(job, step) | {
            "seed": job.config.seed, "lr": lr, "fingerprint": job.part.fingerprint, "row": job.position.bad_row,
        }  # fmt: skip
        try:
            nonfinite.dump(folder, job.model, job.config, record, passport_of(job).to_metadata())
        except (OSError, SafetensorError) as error:
            job.console.print(f"[red]{folder} cannot be written:[/red] {error}")
    job.console.print(
        f"[bold red]the run stops: {job.position.bad_row} bad steps in a row again.[/bold red] {folder} holds the last "
        f"of them (maekit.training.nonfinite.replay does it again); go on with maekit resume {job.out} --clip-grad 1 "
        "or --precision fp32, or begin again with a lower --blr",
        soft_wrap=True,
    )


def _take_up(job: Job, path: Path) -> tuple[Position, list[str]]:
    """Weights, optimiser and generators from a checkpoint; returns its position and the generators it does not know."""
    saved = checkpoints.load(path)
    position = position_of(saved, path)
    if position.fingerprint != job.part.fingerprint:
        raise UserError(
            f"--data {job.config.data}: not the images that this run was trained on (names or sizes differ): exact "
            "resume is impossible; start a new run on them"
        )
    check_names(job.model, saved.model, str(path))
    job.model.load_state_dict(saved.model)
    load_optimizer_tensors(job.optimizer, job.model.named_parameters(), saved.optimizer)
    unknown = restore_rng(saved.rng, job.accelerator.process_index)
    job.rng = saved.rng
    return position, unknown


def position_of(saved: checkpoints.Checkpoint, path: Path) -> Position:
    """The position in a checkpoint's state.json; UserError where it cannot be one of a run."""
    position = from_values(Position, saved.state, path / "state.json")
    if problems := position.problems():
        raise UserError(*(f"{path / 'state.json'}: {problem[:200]}" for problem in problems))
    return position


def _set_position(job: Job, position: Position) -> None:
    """Go on from a position: the metrics after it are cut off, and the last losses read from those before it."""
    job.position = position
    job.unwritten.clear()
    job.recent.clear()
    if job.accelerator.is_main_process:
        with suppress(OSError):
            job.metrics.truncate(position.metrics_bytes)
        with suppress(OSError, UserError):  # what is said about spikes is not worth a run
            job.recent.extend(_losses(job.metrics.read()))


def _losses(records: Iterable[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in records if line.get("kind") == "step" and isinstance(line.get("loss"), float)]


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return [int(name) for name in names if name.isdigit()]


def _ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 11th, ..., 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def gather_rng(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The generators' states of all processes."""
    own = rng_tensors(accelerator.process_index)
    if accelerator.num_processes == 1:
        return own
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, {name: state.cpu() for name, state in own.items()})
    return {name: state for states in everyone for name, state in states.items()}
