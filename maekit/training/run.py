"""A run in progress: its state, and what is measured and written down of it.

What the steps of `tasks/pretrain.py` call between two optimiser steps. Every function works on a `Job`; those that
talk to other processes must be called by all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from rich.console import Console

from maekit.config import PretrainConfig, UserError
from maekit.data.loader import Batch, Pool, Quarantine, SampleOrder, lowest_hash
from maekit.data.parts import Part
from maekit.data.speed import keeps_up
from maekit.data.workers import available_cores
from maekit.models.encoder import flops_per_image
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks
from maekit.rng import Purpose
from maekit.runtime import Choice
from maekit.stopping import StopRequest
from maekit.terminal import Pace
from maekit.training.diary import MOST_UNWRITTEN, note
from maekit.training.guard import Guard
from maekit.training.metrics import MetricsLog
from maekit.training.monitor import ROUNDING, TRIVIAL_IMAGES, Heldout, heldout_sums, online_probe, training_trivial
from maekit.training.nonfinite import SPIKE_HISTORY, is_spike, note_bad_steps
from maekit.training.step import masks_ahead

EVAL_BATCH, EVAL_TOKENS = 256, 2**16
"""Images, and patches of all of them, per forward pass in evaluation, at most; they have no say in the numbers."""
BAD_STEPS_FILE = "nonfinite.jsonl"
WAITING = 0.2
"""Share of the time between two lines of metrics.jsonl from which on waiting for images is worth a word."""


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
    watched: int = 0
    """Steps done when the held-out loss, probes and pictures that were due were last complete: what a signal cut short
    is repeated on resume."""
    bad_steps: int = 0
    """Steps that were skipped because loss or gradient were not finite."""
    bad_row: int = 0
    """How many of them stand in a row up to here."""
    bad_since_line: int = 0
    """How many of them came since the last line of metrics.jsonl."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because of them."""
    lr_scale: float = 1.0
    """Factor of the learning rate: halved by going back."""
    train_trivial: float = 1.0
    """Loss of the better trivial predictor on augmented training images."""
    heldout_trivial: tuple[float, float] = (1.0, 1.0)
    """Losses of the two trivial predictors on the held-out images."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this position."""
    fingerprint: str = ""
    """Fingerprint of the data."""

    def problems(self) -> list[str]:
        """What cannot be true of a run, as a damaged or forged state.json may claim."""
        counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        found = [f"{name} {value}: not in 0 .. 2^63" for name, value in counts.items() if not 0 <= value < 2**63]
        for name in ("watched", "schedule_start", "loss_count", "bad_row"):
            if counts[name] > self.step:
                found.append(f"{name} {counts[name]}: is beyond step {self.step}")
        for value in (self.train_trivial, *self.heldout_trivial, self.lr_scale):
            if not 0 < value < math.inf:
                found.append(f"a trivial loss or lr_scale of {value}: not a positive number")
        if not math.isfinite(self.loss_sum):
            found.append(f"loss_sum {self.loss_sum}: not a number")
        return found


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
    decoder_only: int
    """Steps at the beginning in which the encoder is not trained."""
    position: Position
    metrics: MetricsLog
    quarantine: Quarantine
    choices: dict[str, Choice[Any]]
    loader_speed: float = 0.0
    """Images/s that one loader process reads; 0 where the images are in memory."""
    waited: float = 0.0
    """Seconds since the last line of metrics.jsonl in which the model waited for images."""
    lines: int = 0
    """Lines of training losses that this process has written."""
    heldout: Heldout | None = None
    heldout_step: int = -1
    """Steps done when that was measured."""
    rng: dict[str, torch.Tensor] = field(default_factory=dict)
    """Generators' states of processes that this run does not have, kept for a later one that does."""
    stop: StopRequest = field(default_factory=StopRequest)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_HISTORY))
    """The last logged losses."""
    unwritten: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_UNWRITTEN))
    """Lines of metrics.jsonl that the disk has refused so far."""
    refusals: int = 0
    """How often in a row it has refused."""

    @property
    def epochs_done(self) -> float:
        """Passes over the training images so far."""
        return self.position.step / self.order.steps_per_epoch


def describe(job: Job, peak_reason: str) -> dict[str, str]:
    """The run's settings with their arithmetic, for the reader who wants to check it."""
    config, model, world = job.config, job.model, job.accelerator.num_processes
    total, per_epoch = job.position.total_steps, job.order.steps_per_epoch
    millions = [sum(p.numel() for p in room.parameters()) / 1e6 for room in (model.encoder, model.decoder)]
    hidden = model.num_patches - model.num_visible
    predicted = f", {model.num_predicted} of these predicted" if model.num_predicted < hidden else ""
    each = [statistic.flatten().tolist() for statistic in (model.mean, model.std)]
    shown = [" ".join(f"{value:.3g}" for value in (one if len(set(one)) > 1 else one[:1])) for one in each]
    cost = config.masks_per_image * flops_per_image(model.config, model.num_visible) / 1e9
    return {
        "data": f"{config.data}: {len(job.train_ids):,} images to train on, {len(job.heldout_ids):,} held out",
        "run": str(job.out),
        "model": f"{config.model}, encoder {millions[0]:.2f} M, {config.decoder} decoder {millions[1]:.2f} M "
        f"parameters, {cost:.2g} GFLOP an image and step",
        "masking": f"{config.mask}: {hidden} of {model.num_patches} patches of {config.patch_size} px are hidden"
        + predicted,
        "target": config.target,
        "pixels": f"mean {shown[0]} and deviation {shown[1]} become 0 and 1 (of 8 bits / 255, 16 bits / 65535)",
        "batch": f"{config.batch_size} = {config.batch_size // world // config.accum} images x {world} "
        f"process{'es' if world > 1 else ''} x {config.accum} accumulation step{'s' if config.accum > 1 else ''}"
        + (f", each image under {config.masks_per_image} masks" if config.masks_per_image > 1 else ""),
        "learning rate": f"{peak_reason}, {job.warmup_steps:,} steps of warm-up, then a cosine to {config.min_lr:g}",
        **({"begins with": config.init} if config.init else {}),
        **({"decoder alone": f"the first {job.decoder_only:,} steps"} if job.decoder_only else {}),
        "length": f"{total:,} steps = {total / per_epoch:.4g} epochs x {per_epoch:,} steps",
    }


class TrainPart(NamedTuple):
    """A part of a step: images, and their masks on the device."""

    batch: Batch
    masks: Masks


def open_parts(job: Job) -> Iterator[TrainPart]:
    """This process's parts of all steps from the run's position on."""
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    steps = range(job.position.step, job.position.total_steps)
    shares = job.order.micro_batches(steps, rank, world, job.config.accum)
    for_images, for_masks = itertools.tee(shares)
    masks = masks_ahead(job.model, job.config, for_masks, job.accelerator.device)
    return itertools.starmap(TrainPart, zip(job.pool.train_batches(for_images), masks, strict=True))


def next_part(job: Job, parts: Iterator[TrainPart], begun: bool) -> TrainPart | None:
    """The next part of a step; None where a signal came and it does not: at once, or soon where the step was begun."""
    if job.choices["in memory"].value:
        return next(parts)  # it is there already
    began = time.monotonic()
    part = job.stop.unless_stopped(job.accelerator, lambda: next(parts), job.stop.GRACE if begun else 0.0)
    job.waited += time.monotonic() - began
    return part


def advise_on_loading(job: Job, images: int, seconds: float) -> None:
    """Say at the second line which flags help, where this process waited long for these images; workers start before.

    images, seconds: those of this process since the line before.
    """
    waited, job.waited, job.lines = job.waited, 0.0, job.lines + 1
    if job.lines != 2 or not job.loader_speed or waited < WAITING * seconds:
        return
    verdict = keeps_up(
        job.part,
        per_worker=job.loader_speed,
        model=images / max(seconds - waited, 1e-9),
        workers=job.choices["workers"].value,
        cores=max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        masks_per_image=job.config.masks_per_image,
    )
    if not verdict.value:
        job.console.print(
            f"[yellow]{waited / seconds:.0%} of the time went into waiting for images:[/] {verdict.reason}"
        )


def due(job: Job) -> set[str]:
    """What is due after so many steps: eval, probe, panel, save; after the last one all but probes that are off."""
    config, step = job.config, job.position.step
    epochs = {"eval": config.eval_every, "probe": config.probe_every, "panel": config.panel_every,
              "save": config.save_every}  # fmt: skip
    every = {name: max(1, round(value * job.order.steps_per_epoch)) for name, value in epochs.items() if value > 0}
    last = {"eval", "panel", "save"} | {"probe"} & every.keys() if step == job.position.total_steps else set()
    return {name for name, steps in every.items() if step % steps == 0} | last


def eval_batch(model: MaskedAutoencoder) -> int:
    """Images per forward pass; fewer of many patches: a fill from visible ones takes the square of their number."""
    patches: int = model.num_patches
    return max(1, min(EVAL_BATCH, EVAL_TOKENS // patches))


def measure_trivial(job: Job) -> None:
    """Before the first step: what does a predictor that learns nothing lose, in training and on held-out images?"""
    some = lowest_hash(job.train_ids, TRIVIAL_IMAGES, Purpose.SUBSET)
    batch = eval_batch(job.model)
    shares = ((0, some[start : start + batch]) for start in range(0, len(some), batch))
    batches = job.pool.train_batches(shares)
    job.position.train_trivial = training_trivial(job.model, batches, job.config.seed)
    evaluate(job, with_trivial=True)


class NothingToPredict(UserError):
    """A predictor that learns nothing makes no error: there is no skill to speak of."""


def check_trivial(job: Job) -> None:
    """Raise NothingToPredict where images are blank."""
    losses = {"training": job.position.train_trivial, "held-out": min(job.position.heldout_trivial)}
    for which, loss in losses.items():
        if not ROUNDING < loss < math.inf:
            raise NothingToPredict(
                f"--data {job.config.data}: under --target {job.config.target} a predictor that learns nothing has a "
                f"loss of {loss:.2g} on the {which} images, as on blank ones: leave those out, or take a larger "
                "--heldout-share"
            )


def evaluate(job: Job, with_trivial: bool = False) -> bool:
    """Held-out loss with fixed masks; every process takes its share of the images, and the sums are added.

    Returns: False where a signal cut it short; nothing has changed then.
    """
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    ids = job.heldout_ids[rank::world]
    job.model.eval()
    sums = job.stop.unless_stopped(
        job.accelerator,
        lambda: heldout_sums(job.model, job.pool, ids, eval_batch(job.model), with_trivial=with_trivial),
    )
    job.model.train()
    if sums is None:
        return False
    if world > 1:
        sums = job.accelerator.reduce(sums.to(job.accelerator.device), "sum")
    loss, constant, fill, count = sums.tolist()
    if with_trivial:
        job.position.heldout_trivial = (constant / count, fill / count)
        check_trivial(job)
    job.heldout, job.heldout_step = Heldout(loss / count, job.position.heldout_trivial), job.position.step
    log(job, {"kind": "heldout", "loss": job.heldout.loss, "skill": job.heldout.skill})
    return True


def say_heldout(job: Job, pace: Pace) -> None:
    """One line after each held-out pass, which is all that a log file without a terminal shows."""
    assert job.heldout is not None
    job.console.print(
        f"epoch {job.epochs_done:.4g}  step {job.position.step:,}  held-out loss {job.heldout.loss:.4f}  "
        f"skill {job.heldout.skill:.3f}{pace.told(job.position.step, job.position.total_steps)}"
    )


def log(job: Job, record: dict[str, Any]) -> None:
    """One line of metrics.jsonl, and the same numbers to the trackers."""
    note(job, {"kind": record["kind"], "step": job.position.step, "epoch": job.epochs_done, **record})


def log_training(job: Job, loss_sum: torch.Tensor, lr: float, speed: float, seconds: float) -> tuple[float, float]:
    """Mean training loss since the last line, with its skill; the only wait for the device between two lines."""
    position = job.position
    total = float(job.accelerator.reduce(loss_sum.clone(), "mean"))
    value = total / position.loss_count if position.loss_count else math.nan
    skill = 1 - value / position.train_trivial
    record = {"kind": "step", "loss": value, "skill": skill, "lr": lr, "images_per_s": speed, "seconds": seconds}
    if job.loader_speed:  # images that are read from disk as the run goes
        record["waited"] = job.waited
    if position.bad_since_line:
        record["nonfinite"] = position.bad_since_line
    position.loss_count = position.bad_since_line = 0
    log(job, record)
    if math.isfinite(value):
        if is_spike(job.recent, value):
            median = float(np.median(job.recent))
            log(job, {"kind": "spike", "loss": value, "median": median})
            job.console.print(
                f"[yellow]loss spike at step {position.step:,}:[/yellow] {value:.4f}; the last {len(job.recent)} lines "
                f"have a median of {median:.4f}"
            )
        job.recent.append(value)
    return value, skill


def settle(job: Job, guard: Guard) -> int | None:
    """Count, report and write down the bad steps since the last time; waits for the device.

    Returns: the step (0-based) that made a row of them too long, if one did.
    """
    position = job.position
    steps, position.bad_row, too_many = guard.look()
    if not steps:
        return None
    position.bad_steps += len(steps)
    position.bad_since_line += len(steps)
    position.loss_count -= len(steps)
    if job.accelerator.is_main_process:
        records = [bad_step_record(job, step) for step in steps]
        try:
            note_bad_steps(job.out / BAD_STEPS_FILE, records)
        except OSError as error:
            job.console.print(f"[red]{BAD_STEPS_FILE} cannot be written:[/red] {error}")
    job.console.print(
        f"[red]loss or gradient not finite in step {', '.join(f'{step + 1:,}' for step in steps)}:[/red] skipped, "
        f"{position.bad_row} in a row, {position.bad_steps} in all; samples in {job.out / BAD_STEPS_FILE}"
    )
    return steps[-1] if too_many else None


def bad_step_record(job: Job, step: int) -> dict[str, Any]:
    """A step (0-based) as nonfinite.jsonl names it: by its number from 1, its epoch from 0, and all its sample ids."""
    epoch, ids = job.order.step_ids(step)
    return {"step": step + 1, "epoch": epoch, "rollbacks": job.position.rollbacks, "ids": ids.tolist()}


def probe(job: Job) -> bool:
    """Online probes by the first process, on training and held-out images only; False where a signal cut it short."""

    def measure() -> dict[str, float]:
        if not job.accelerator.is_main_process:
            return {}
        batch = eval_batch(job.model)
        return online_probe(job.model, job.pool, job.train_ids, job.heldout_ids, job.part.labels, batch)

    job.model.eval()
    found = job.stop.unless_stopped(job.accelerator, measure)
    job.model.train()
    if found is None:
        return False
    if found:
        log(job, {"kind": "probe", **found})
        if "knn" in found:
            accuracies = f"k-NN {found['knn']:.1%}, linear {found['linear']:.1%} of {found['images']:,} images"
            floor = f"(always the largest class: {found['largest_class']:.1%})"
            job.console.print(f"  held-out {accuracies} {floor}, rank {found['rankme']:.0f}")
    return True
