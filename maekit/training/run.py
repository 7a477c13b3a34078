"""A run in progress: its state, what is measured of it, and how it is saved and taken up again.

What the steps of `tasks/pretrain.py` call between two optimiser steps. Every function works on a `Job`; those that
talk to other processes must be called by all of them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from rich.console import Console

from maekit.config import PretrainConfig, UserError
from maekit.configfile import from_values
from maekit.data.loader import Pool, Quarantine, SampleOrder, lowest_hash
from maekit.data.parts import Part
from maekit.models.mae import MaskedAutoencoder
from maekit.rng import Purpose
from maekit.runtime import Choice, package_versions
from maekit.training import checkpoint as checkpoints
from maekit.training.metrics import MetricsLog
from maekit.training.monitor import TRIVIAL_IMAGES, Heldout, heldout_sums, online_probe, training_trivial
from maekit.training.run_state import load_optimizer_tensors, optimizer_tensors, restore_rng, rng_tensors
from maekit.weights.passport import Passport
from maekit.weights.store import WEIGHTS_FILE, check_names

EVAL_BATCH = 256
"""Images per forward pass in evaluation; it has no say in the numbers."""


@dataclass
class Position:
    """How far a run is. All of it goes into a checkpoint's state.json and comes back on resume."""

    total_steps: int
    """Optimiser steps of the whole run."""
    step: int = 0
    """Optimiser steps done."""
    schedule_start: int = 0
    """Step where the cosine began anew, after the run was lengthened."""
    loss_sum: float = 0.0
    """Training loss summed since the last line of metrics.jsonl."""
    loss_count: int = 0
    """Steps in that sum."""
    train_trivial: float = 1.0
    """Loss of the better trivial predictor on augmented training images."""
    heldout_trivial: tuple[float, float] = (1.0, 1.0)
    """Losses of the two trivial predictors on the held-out images."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this position."""
    fingerprint: str = ""
    """Fingerprint of the data."""


@dataclass
class Job:
    """A run that is ready to step: what `prepare` made and the functions below share."""

    config: PretrainConfig
    out: Path
    console: Console
    accelerator: Accelerator
    data_name: str
    part: Part
    pool: Pool
    train_ids: npt.NDArray[np.int64]
    heldout_ids: npt.NDArray[np.int64]
    order: SampleOrder
    model: MaskedAutoencoder
    optimizer: torch.optim.AdamW
    peak_lr: float
    warmup_steps: int
    position: Position
    metrics: MetricsLog
    quarantine: Quarantine
    choices: dict[str, Choice[Any]]
    heldout: Heldout | None = None
    rng: dict[str, torch.Tensor] = field(default_factory=dict)
    """Generators' states of processes that this run does not have, kept for a later one that does."""

    @property
    def epochs_done(self) -> float:
        """Passes over the training images so far."""
        return self.position.step / self.order.steps_per_epoch


def measure_trivial(job: Job) -> None:
    """Before the first step: what does a predictor that learns nothing lose, in training and on held-out images?"""
    some = lowest_hash(job.train_ids, TRIVIAL_IMAGES, Purpose.SUBSET)
    shares = ((0, some[start : start + EVAL_BATCH]) for start in range(0, len(some), EVAL_BATCH))
    batches = job.pool.train_batches(shares)
    job.position.train_trivial = training_trivial(job.model, batches, job.config.seed)
    evaluate(job, with_trivial=True)


def evaluate(job: Job, with_trivial: bool = False) -> None:
    """Held-out loss with fixed masks; every process takes its share of the images, and the sums are added."""
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    job.model.eval()
    sums = heldout_sums(job.model, job.pool, job.heldout_ids[rank::world], EVAL_BATCH, with_trivial=with_trivial)
    job.model.train()
    if world > 1:
        sums = job.accelerator.reduce(sums.to(job.accelerator.device), "sum")
    loss, constant, fill, count = sums.tolist()
    if with_trivial:
        job.position.heldout_trivial = (constant / count, fill / count)
    job.heldout = Heldout(loss / count, job.position.heldout_trivial)
    log(job, {"kind": "heldout", "loss": job.heldout.loss, "skill": job.heldout.skill})


def log(job: Job, record: dict[str, Any]) -> None:
    """One line of metrics.jsonl, and the same numbers to the trackers."""
    record = {"kind": record["kind"], "step": job.position.step, "epoch": job.epochs_done, **record}
    if job.accelerator.is_main_process:
        job.metrics.append(record)
    if job.config.trackers:
        numbers = {f"{record['kind']}/{key}": value for key, value in record.items() if isinstance(value, float)}
        job.accelerator.log(numbers, step=job.position.step)


def log_training(job: Job, loss_sum: torch.Tensor, lr: float, speed: float, seconds: float) -> tuple[float, float]:
    """Mean training loss since the last line, with its skill; the only wait for the device between two lines."""
    value = float(job.accelerator.reduce(loss_sum.clone(), "mean")) / job.position.loss_count
    skill = 1 - value / job.position.train_trivial
    log(job, {"kind": "step", "loss": value, "skill": skill, "lr": lr, "images_per_s": speed, "seconds": seconds})
    if not math.isfinite(value):
        raise UserError(
            f"the loss became {value} before step {job.position.step}: lower --blr, add --clip-grad 1 or use "
            f"--precision fp32; the checkpoints in {job.out / 'checkpoints'} are from before"
        )
    return value, skill


def probe(job: Job) -> None:
    """Online probes by the first process, on training and held-out images only."""
    if job.accelerator.is_main_process:
        job.model.eval()
        found = online_probe(job.model, job.pool, job.train_ids, job.heldout_ids, job.part.labels, EVAL_BATCH)
        job.model.train()
        log(job, {"kind": "probe", **found})
        if "knn" in found:
            accuracies = f"k-NN {found['knn']:.1%}, linear {found['linear']:.1%}"
            job.console.print(f"  held-out {accuracies}, rank {found['rankme']:.0f}")
    job.accelerator.wait_for_everyone()


def report_unreadable(job: Job, bad: list[tuple[int, str]]) -> None:
    """Name files that could not be read; stops the run above --max-bad-share."""
    for line in job.quarantine.add(bad):
        job.console.print(f"[yellow]unreadable, the next image takes its place:[/yellow] {line}", markup=True)


def save(job: Job) -> None:
    """A checkpoint with all that an exact continuation needs, then the run's model.safetensors."""
    rng = job.rng | gather_rng(job.accelerator)
    if job.accelerator.is_main_process:
        config = job.config
        assert config.mean is not None and config.std is not None
        job.metrics.sync()
        job.position.metrics_bytes = job.metrics.position
        passport = Passport(
            model=job.model.config, mean=config.mean, std=config.std, grid=job.model.grid_hw, steps=job.position.step,
            epochs=job.epochs_done, data=job.data_name, fingerprint=job.part.fingerprint, recipe=config.recipe,
            versions=package_versions(),
        )  # fmt: skip
        content = checkpoints.Checkpoint(
            model=job.model.state_dict(),
            optimizer=optimizer_tensors(job.optimizer, job.model.named_parameters()),
            rng=rng,
            state=dataclasses.asdict(job.position),
            model_metadata=passport.to_metadata(),
        )
        path = checkpoints.save(job.out / "checkpoints", job.position.step, content, config.keep)
        checkpoints.publish(path, job.out / WEIGHTS_FILE)
    job.accelerator.wait_for_everyone()


def restore(job: Job, path: Path) -> None:
    """Put a checkpoint's weights, optimiser, position and generators into the job, and cut metrics.jsonl to it."""
    saved = checkpoints.load(path)
    position = from_values(Position, saved.state, path / "state.json")
    if position.fingerprint != job.part.fingerprint:
        raise UserError(
            f"--data {job.config.data}: not the images that this run was trained on (names or sizes differ): exact "
            "resume is impossible; start a new run on them"
        )
    check_names(job.model, saved.model, str(path))
    job.model.load_state_dict(saved.model)
    load_optimizer_tensors(job.optimizer, job.model.named_parameters(), saved.optimizer)
    unknown = restore_rng(saved.rng, job.accelerator.process_index)
    if unknown and job.config.drop_path > 0:
        job.console.print(f"no saved generator state for {', '.join(unknown)}: --drop-path draws anew there")
    job.rng = saved.rng
    if job.position.total_steps < position.step:
        raise UserError(f"the run is at step {position.step:,}, beyond the new end at {job.position.total_steps:,}")
    if job.position.total_steps != position.total_steps:
        job.console.print(
            f"the run's length changes from {position.total_steps:,} to {job.position.total_steps:,} steps: the cosine "
            f"starts again at its peak from step {max(position.step, job.warmup_steps):,}"
        )
        position.total_steps, position.schedule_start = job.position.total_steps, position.step
    job.position = position
    if job.accelerator.is_main_process:
        job.metrics.truncate(position.metrics_bytes)
    job.console.print(f"continuing from {path.name} of {position.total_steps:,}")


def gather_rng(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The generators' states of all processes."""
    own = rng_tensors(accelerator.process_index)
    if accelerator.num_processes == 1:
        return own
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, {name: state.cpu() for name, state in own.items()})
    return {name: state for states in everyone for name, state in states.items()}
