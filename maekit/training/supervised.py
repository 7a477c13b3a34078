"""A run that trains on labels, and its folder: what tasks/finetune.py and tasks/segment.py share between their steps.

The folder is that of a pretraining run (checkpoints, metrics.jsonl, model.safetensors), with best.safetensors beside
it. Randomness of libraries (mixup, stochastic depth, augmentations) is seeded anew for every step and every sample, so
that a resumed run needs no generator's state: it sees what a run left alone would have seen.
Functions that work on a run must be called by all its processes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from maekit.config import SupervisedConfig, UserError
from maekit.configfile import from_values, to_json
from maekit.environment import environment
from maekit.stopping import Stopped, StopRequest, greatest
from maekit.training import checkpoint as checkpoints
from maekit.training import lock
from maekit.training.diary import MOST_UNWRITTEN, note, write_lines
from maekit.training.guard import Guard
from maekit.training.metrics import MetricsLog
from maekit.training.run_state import load_optimizer_tensors, optimizer_tensors
from maekit.training.saving import SaveClock, leave_nothing, persist, write_whole
from maekit.weights.passport import Passport
from maekit.weights.sources import read_passport
from maekit.weights.store import WEIGHTS_FILE, check_names
from maekit.weights.written import write_weights

BEST_FILE = "best.safetensors"
_STEPPED = "stepped/"
"""Where a run averages its weights, the average is a checkpoint's model, since it is what is used; what the names of
the weights that the optimiser steps begin with in optimizer.safetensors."""


@dataclass
class Position:
    """How far a run is. All of it goes into a checkpoint's state.json and comes back on resume."""

    total_steps: int
    """Optimiser steps of the whole run."""
    step: int = 0
    """Optimiser steps done."""
    watched: int = 0
    """Steps done when the last evaluation on held-out images was complete."""
    loss_sum: float = 0.0
    """Training loss summed since the last line of metrics.jsonl."""
    loss_count: int = 0
    """Steps in that sum."""
    best: float = -1.0
    """Best score on the held-out images so far; -1: none yet."""
    best_step: int = 0
    """Steps done when it was reached."""
    bad_steps: int = 0
    """Steps that were skipped because loss or gradient were not finite."""
    bad_row: int = 0
    """How many of them stand in a row up to here."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this position."""
    fingerprint: str = ""
    """Fingerprint of the data."""
    schedule_start: int = 0
    """Where the cosine began anew, after a run was lengthened."""
    world: int = 1
    """Processes of the run: another number would augment and average differently."""

    def problems(self) -> list[str]:
        """What cannot be true of a run, as a damaged or forged state.json may claim."""
        counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        found = [f"{name} {value}: not in 0 .. 2^63" for name, value in counts.items() if not 0 <= value < 2**63]
        for name in ("watched", "best_step", "loss_count", "bad_row", "schedule_start"):
            if counts[name] > self.step:
                found.append(f"{name} {counts[name]}: is beyond step {self.step}")
        if not math.isfinite(self.loss_sum) or not -1 <= self.best <= 1:
            found.append(f"loss_sum {self.loss_sum}, best {self.best}: not a loss and a score")
        return found


@dataclass
class SupervisedRun:
    """A run that is ready to step. `passport` tells what the weights at this position say about themselves."""

    config: SupervisedConfig
    out: Path
    console: Console
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position
    passport: Callable[[], Passport]
    stop: StopRequest
    ema: nn.Module | None = None
    """The model with averaged weights, where the run keeps one."""
    unwritten: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_UNWRITTEN))
    """Lines of metrics.jsonl that the disk has refused so far."""
    refusals: int = 0
    """How often in a row it has refused."""

    def __post_init__(self) -> None:
        self.metrics = MetricsLog(self.out / "metrics.jsonl")
        self.clock = SaveClock(self.config.save_minutes, self.config.max_unsaved_minutes)
        self.position.world = self.accelerator.num_processes

    def begin(self, fresh: bool) -> None:
        """Write config.json and env.json, and for a fresh run a checkpoint of step 0, which proves the disk.

        A signal leaves nothing behind of a fresh run.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._write_beginning(fresh)
        except Stopped:
            self.stop.patience = None  # nothing may interrupt what follows
            if fresh and self.accelerator.is_main_process:
                leave_nothing(self.out)
            raise

    def _write_beginning(self, fresh: bool) -> None:
        if self.accelerator.is_main_process:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / "config.json", to_json(self.config))
                about = json.dumps(environment(self.accelerator.device), indent=2) + "\n"
                write_whole(self.out / "env.json", about)
            except OSError as error:
                raise UserError(f"--out {self.out}: cannot be written: {error}") from error
        self.accelerator.wait_for_everyone()
        if self.config.trackers:
            told = {key: str(value) for key, value in dataclasses.asdict(self.config).items()}
            self.accelerator.init_trackers("maekit", config=told)
        if fresh:
            if self.accelerator.is_main_process:
                self.metrics.truncate(0)
            if not self.save(urgent=True):
                raise UserError(f"--out {self.out}: the first checkpoint cannot be written (see above)")

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl (kind and numbers), and the same numbers to the trackers."""
        note(self, {"kind": record["kind"], "step": self.position.step, **record})

    def save(self, urgent: bool = False) -> bool:
        """A checkpoint with all that an exact continuation needs, then model.safetensors; False where the disk failed.

        Raises:
            UserError: none has succeeded for --max-unsaved-minutes.
        """
        return persist(self._write, self.out, self.accelerator, self.console, self.clock, urgent)

    def _write(self) -> None:
        write_lines(self)
        self.metrics.sync()
        self.position.metrics_bytes = self.metrics.position
        stepped = {} if self.ema is None else self.model.state_dict()
        content = checkpoints.Checkpoint(
            model=(self.ema or self.model).state_dict(),
            optimizer=optimizer_tensors(self.optimizer, self.model.named_parameters())
            | {_STEPPED + name: value for name, value in stepped.items()},
            rng={},
            state=dataclasses.asdict(self.position),
            model_metadata=self.passport().to_metadata(),
        )
        path = checkpoints.save(self.out / "checkpoints", self.position.step, content, self.config.keep)
        checkpoints.publish(path, self.out / WEIGHTS_FILE)

    def restore(self) -> None:
        """Go on from the newest whole checkpoint in the folder; metrics.jsonl is cut to it.

        Raises:
            UserError: no whole checkpoint, other data, another number of processes, or weights that do not fit.
        """
        path, messages = checkpoints.latest(self.out / "checkpoints")
        for message in messages:
            self.console.print(f"[red]damaged checkpoint:[/red] {escape(message)}")
        if path is None:
            raise UserError(f"{self.out}: no whole checkpoint; start again into another folder")
        saved = checkpoints.load(path)
        position = from_values(Position, saved.state, path / "state.json")
        if problems := position.problems():
            raise UserError(*(f"{path / 'state.json'}: {problem[:200]}" for problem in problems))
        if position.fingerprint != self.position.fingerprint:
            raise UserError(
                f"--data {self.config.data}: not the data that this run was trained on (names or sizes differ): exact "
                "resume is impossible; start a new run on them"
            )
        world = self.accelerator.num_processes
        if position.world != world:
            raise UserError(
                f"{self.out}: was trained by {position.world} processes and these are {world}: start as many"
            )
        check_names(self.ema or self.model, saved.model, str(path), any_type=True)
        (self.ema or self.model).load_state_dict(saved.model)
        stepped = {name: value for name, value in saved.optimizer.items() if name.startswith(_STEPPED)}
        moments = {name: value for name, value in saved.optimizer.items() if name not in stepped}
        load_optimizer_tensors(self.optimizer, self.model.named_parameters(), moments)
        if self.ema is not None:
            self.model.load_state_dict({name.removeprefix(_STEPPED): value for name, value in stepped.items()})
        if self.position.total_steps < position.step:
            raise UserError(
                f"the run is at step {position.step:,}, beyond the new end at {self.position.total_steps:,}"
            )
        if self.position.total_steps != position.total_steps:
            self.console.print(
                f"the run's length changes from {position.total_steps:,} to {self.position.total_steps:,} steps: the "
                f"cosine starts again at its peak from step {position.step:,}, or from the end of the warm-up"
            )
            position.total_steps, position.schedule_start = self.position.total_steps, position.step
        if position.best_step and self._best_file_step() != position.best_step:
            position.best, position.best_step = -1.0, 0  # a crash came between the file and the checkpoint
        self.position = position
        if self.accelerator.is_main_process:
            self.metrics.truncate(position.metrics_bytes)
        self.console.print(f"continuing from {path.name} of {position.total_steps:,}")

    def keep_best(self, score: float) -> bool:
        """Where a score on the held-out images is the best so far, write best.safetensors and note it.

        Returns: whether it is. Where the file cannot be written, the one before stays the best that there is.
        """
        if score <= self.position.best:
            return False
        failed = False
        if self.accelerator.is_main_process:
            try:
                write_weights(self.out / BEST_FILE, self.ema or self.model, self.passport())
            except OSError as error:
                self.console.print(f"[red]{BEST_FILE} cannot be written:[/red] {error}; training goes on")
                failed = True
        if any(greatest(self.accelerator, failed)):
            return False
        self.position.best, self.position.best_step = score, self.position.step
        return True

    def _best_file_step(self) -> int:
        """Steps done when best.safetensors was written, by its own word; -1: there is none."""
        try:
            return read_passport(self.out / BEST_FILE).steps
        except UserError:
            return -1

    def settle(self, guard: Guard) -> None:
        """Count and report the steps that were skipped since the last time; waits for the device.

        Raises:
            UserError: too many of them in a row.
        """
        position = self.position
        steps, position.bad_row, too_many = guard.look()
        if not steps:
            return
        position.bad_steps += len(steps)
        position.loss_count -= len(steps)
        self.console.print(
            f"[red]loss or gradient not finite in step {', '.join(f'{step + 1:,}' for step in steps)}:[/red] skipped, "
            f"{position.bad_row} in a row"
        )
        if too_many:
            raise UserError(
                f"{position.bad_row} steps in a row with a loss or gradient that is not finite (--max-bad-steps "
                f"{self.config.max_bad_steps}): go on with maekit resume {self.out} --clip-grad 1 or --precision fp32, "
                "or begin again with a lower --lr"
            )


def claim(out: Path, fresh: bool) -> None:
    """Hold a run's folder against other processes; a fresh run needs an empty one.

    Raises:
        UserError: it holds another run, or somebody trains in it.
    """
    if fresh and not lock.is_free(out):
        raise UserError(
            f"--out {out}: is not empty: maekit resume {out} continues the run in it; a new one needs another --out"
        )
    lock.take(out, fresh=fresh)


def seed_name(seed: int) -> str:
    """How the name of a run's folder ends: several seeds of one run must not want the same folder."""
    return f"-seed{seed}" if seed else ""


def layer_decay_groups(model: nn.Module, encoder: nn.Module, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which the rate shrinks by `decay` from each block of the encoder to the one before it.

    Each group has "lr_scale": decay^(L + 1 - l) for the encoder's layer l (0: embedding and tokens; 1..L: blocks), and
    1 for its last normalisation and for all of the model outside of the encoder. Only matrices get weight decay.
    timm's own grouping counts the last normalisation to the last block, one step less than the source does.
    Source: BEiT (arXiv 2106.08254), as the fine-tuning of MAE uses it (He et al. 2021, table 9).
    """
    depth, tokens = len(encoder.blocks), ("cls_token", "reg_token", "pos_embed")  # type: ignore[arg-type]
    own = {id(parameter): name for name, parameter in encoder.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = own.get(id(parameter))
        if name is None or name.startswith("norm."):
            layer = depth + 1
        else:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        decayed = weight_decay if parameter.ndim > 1 and name not in tokens else 0.0
        groups.setdefault((decay ** (depth + 1 - layer), decayed), []).append(parameter)
    return [{"params": some, "lr_scale": scale, "weight_decay": decayed} for (scale, decayed), some in groups.items()]


def set_scaled_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def mean_loss(run: SupervisedRun, loss_sum: Tensor) -> float:
    """Mean training loss over all processes since the last line; waits for the device."""
    total = float(run.accelerator.reduce(loss_sum.clone(), "mean"))
    return total / run.position.loss_count if run.position.loss_count else math.nan
