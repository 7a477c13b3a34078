"""A segmentation run in progress: its steps' data and denominators, and what is measured between two steps.

Functions that work on a `SegmentJob` must be called by all processes, and tell all of them the same.
Shapes: B images, K classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config.segmentation import SegmentConfig
from maekit.data.loader import Ids, Quarantine, SampleOrder, lowest_hash
from maekit.data.pair_transforms import AugmentPlan, PairBatch, train_batches, whole_pairs
from maekit.data.pairs import VOID, PairPart, Pairs, PartCheck
from maekit.models.segmentation import Segmenter, loss_denominator
from maekit.rng import Purpose
from maekit.runtime import Choice, to_device
from maekit.terminal import Pace
from maekit.training.optim import learning_rate
from maekit.training.segmentation_inference import View, predict_classes
from maekit.training.segmentation_metrics import Confusion, SegmentationScore, score
from maekit.training.supervised import SupervisedRun

Shown = tuple[npt.NDArray[Any], npt.NDArray[np.int16] | None, npt.NDArray[np.int64], str]
"""What a sheet of overlays shows of an image: pixels [H, W, C], classes [H, W], predicted classes, name."""


@dataclass
class SegmentJob:
    """A run that is ready to step: what `prepare` made and the functions below share."""

    run: SupervisedRun
    config: SegmentConfig
    pairs: Pairs
    checks: dict[str, PartCheck]
    train_ids: Ids
    heldout_ids: Ids
    order: SampleOrder
    plan: AugmentPlan
    model: Segmenter
    weights_K: Tensor | None
    view: View
    quarantine: Quarantine
    choices: dict[str, Choice[Any]]
    fresh: bool
    heldout: SegmentationScore | None = None


def scheduled_rate(config: SegmentConfig, step: int) -> float:
    """The learning rate of a step (0-based): linear from 0 over the warm-up, then poly (power 1) or half a cosine."""
    peak = config.lr
    assert peak is not None, "prepare has settled it"
    if config.schedule == "cosine" or step < config.warmup_steps:
        return learning_rate(step, config.steps, config.warmup_steps, peak, config.min_lr)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (peak - config.min_lr) * (1 - min(1.0, done))


def open_batches(job: SegmentJob) -> Iterator[PairBatch]:
    """This process's parts of all steps from the run's position on."""
    accelerator, config = job.run.accelerator, job.config
    steps = range(job.run.position.step, config.steps)
    shares = job.order.micro_batches(steps, accelerator.process_index, accelerator.num_processes, config.accum)
    return train_batches(
        job.pairs.train, job.plan, shares, seed=config.seed, workers=job.choices["workers"].value,
        allowed=job.train_ids, pin=accelerator.device.type == "cuda",
    )  # fmt: skip


def next_parts(job: SegmentJob, batches: Iterator[PairBatch]) -> list[tuple[Tensor, Tensor]] | None:
    """The accumulation parts of a step, normalised images and labels on the device; None where a signal came first."""
    accum, device = job.config.accum, job.run.accelerator.device
    parts = job.run.stop.unless_stopped(job.run.accelerator, lambda: [next(batches) for _ in range(accum)])
    if parts is None:
        return None
    job.quarantine.report([item for part in parts for item in part.bad], job.run.console)
    return [(job.model.normalize(to_device(part.images, device)), to_device(part.labels, device)) for part in parts]


def step_denominator(job: SegmentJob, labels: Sequence[Tensor]) -> Tensor:
    """What the losses of a step's parts are divided by: all its pixels that are not void, over all processes.

    Divided by the number of processes, since these average their gradients.
    """
    own = torch.stack([loss_denominator(part, VOID, job.weights_K) for part in labels]).sum()
    accelerator = job.run.accelerator
    if accelerator.num_processes == 1:
        return own
    whole: Tensor = accelerator.reduce(own, "sum") / accelerator.num_processes
    return whole


def measure(job: SegmentJob, part: PairPart, ids: Ids, on_progress: Any = None) -> tuple[Tensor, int] | None:
    """The confusion matrix [K, K] over these images, and how many could not be read; None where a signal came.

    Every process takes its share of the images, and the counts are added.
    """
    accelerator = job.run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    if world > 1:  # running means differ between processes on a CPU; those of the first are the ones that are saved
        for buffer in job.model.buffers():
            torch.distributed.broadcast(buffer, 0)
    job.model.eval()
    counted = job.run.stop.unless_stopped(
        accelerator,
        lambda: confusion_over(job.model, part, ids[rank::world], job.view, job.config.precision,
                               job.choices["workers"].value, on_progress),
    )  # fmt: skip
    job.model.train()
    if counted is None:
        return None
    matrix_KK, unreadable = counted
    if world > 1:
        both = torch.cat([matrix_KK.flatten(), torch.tensor([unreadable], device=matrix_KK.device)])
        both = accelerator.reduce(both, "sum")
        matrix_KK, unreadable = both[:-1].view_as(matrix_KK), int(both[-1])
    return matrix_KK, unreadable


def confusion_over(
    model: Segmenter, part: PairPart, ids: Ids, view: View, precision: str, workers: int, on_progress: Any = None
) -> tuple[Tensor, int]:
    """The confusion matrix [K, K] of a model over images at their annotations' size, and how many were unreadable."""
    device = model.mean.device
    confusion = Confusion(model.num_classes, VOID, device)
    unreadable = 0
    for done, pair in enumerate(whole_pairs(part, ids, workers=workers), start=1):
        if pair.image is None or pair.labels is None:
            unreadable += 1
        else:
            image = torch.from_numpy(pair.image).to(device).permute(2, 0, 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                predicted = predict_classes(model, image, view)
            confusion.add(predicted, torch.from_numpy(pair.labels).to(device))
        if on_progress is not None:
            on_progress(done, len(ids))
    return confusion.matrix_KK, unreadable


def overlay_rows(job: SegmentJob, part: PairPart, count: int, ids: Ids | None = None) -> list[Shown]:
    """The first process's rows of a sheet: the same images every time, spread over the part by their hash."""
    ids = np.arange(len(part), dtype=np.int64) if ids is None else ids
    device = job.run.accelerator.device
    job.model.eval()
    rows: list[Shown] = []
    for pair in whole_pairs(part, lowest_hash(ids, min(count, len(ids)), Purpose.SUBSET), workers=0):
        if pair.image is None or pair.labels is None:
            continue
        image = torch.from_numpy(pair.image).to(device).permute(2, 0, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
            predicted = predict_classes(job.model, image, job.view)
        rows.append((pair.image, pair.labels, predicted.cpu().numpy(), part.name(pair.sample_id)))
    job.model.train()
    return rows


def measure_heldout(job: SegmentJob) -> bool:
    """Score the held-out images with the weights as they are; False where a signal cut it short."""
    found = measure(job, job.pairs.train, job.heldout_ids)
    if found is None:
        return False
    job.heldout = score(found[0])
    return True


def evaluate(job: SegmentJob, pace: Pace) -> bool:
    """Score the held-out images, log the score, keep the best weights; False where a signal cut it short."""
    run = job.run
    if not measure_heldout(job):
        return False
    assert job.heldout is not None
    miou = 0.0 if math.isnan(job.heldout.miou) else job.heldout.miou
    run.log({"kind": "heldout", "miou": job.heldout.miou, "mean_accuracy": job.heldout.mean_accuracy,
             "pixel_accuracy": job.heldout.pixel_accuracy})  # fmt: skip
    best = run.keep_best(miou)
    run.console.print(
        f"step {run.position.step:,}  held-out mIoU {100 * miou:.2f} %  pixel accuracy "
        f"{100 * job.heldout.pixel_accuracy:.2f} %{pace.told(run.position.step, job.config.steps)}"
        + ("  best so far" if best else "")
    )
    run.position.watched = run.position.step
    return True
