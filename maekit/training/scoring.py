"""How good a classifier is on labelled images: top-1, top-5, accuracy of each class, confusions, with intervals.

Shapes: S images, B batch, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from maekit.data.order import Ids, Pool, Progress
from maekit.models.classifier import Classifier
from maekit.training.interval import wilson

Ints = npt.NDArray[np.int64]
MAX_CONFUSION = 2000
"""Classes up to which the whole table of confusions is kept."""
EVAL_BATCH = 256
"""Images per forward pass; it has no say in the numbers."""


class Answers(NamedTuple):
    """What a classifier said of S images: the true class, the likeliest one, how many classes were thought at least as
    likely as the true one (0: right), and the cross-entropy.
    """

    labels: Ints
    predicted: Ints
    ahead: Ints
    loss: npt.NDArray[np.float64]


@torch.no_grad()
def answer(
    model: Classifier,
    pool: Pool,
    ids: Ids,
    labels: Ints,
    batch_size: int,
    precision: str,
    on_progress: Progress | None = None,
) -> Answers:
    """What a classifier says of the images with these ids; those that cannot be read are left out.

    labels: of all images of the part, as ids of the classifier's classes.
    """
    device = model.mean.device
    found: list[Answers] = []
    done = 0
    for batch in pool.eval_batches(ids, batch_size):
        truth = torch.from_numpy(labels[batch.sample_ids]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(model.normalize(batch.images))
        logits = logits.float()
        own = logits.gather(1, truth[:, None])
        ahead = (~(logits < own)).sum(dim=1) - 1  # neither a tie, as of logits that are all equal, is right, nor NaN
        loss = F.cross_entropy(logits, truth, reduction="none")
        some = Answers(*(one.cpu().numpy() for one in (truth, logits.argmax(dim=1), ahead, loss.cpu().double())))
        kept = ~np.isin(batch.sample_ids, list(pool.unreadable))
        found.append(Answers(some.labels[kept], some.predicted[kept], some.ahead[kept], some.loss[kept]))
        done += len(batch.sample_ids)
        if on_progress is not None:
            on_progress(done, len(ids))
    if not found:
        nothing = np.zeros(0, np.int64)
        return Answers(nothing, nothing, nothing, np.zeros(0))
    return Answers(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def of_all(accelerator: Accelerator, answers: Answers) -> Answers:
    """The answers of all processes together, the same on each."""
    if accelerator.num_processes == 1:
        return answers
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, tuple(answers))
    return Answers(*(np.concatenate(columns) for columns in zip(*everyone, strict=True)))


@dataclass(frozen=True)
class Score:
    """A classifier's score on one set of images; shares are in 0..1."""

    images: int
    top1: float
    top5: float
    """Share of images whose class is among the five likeliest; of five classes or fewer it says nothing."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    interval: tuple[float, float]
    """95 % interval of top1."""
    per_class: list[float | None]
    """Top-1 accuracy of each class; None where no image is of it."""
    class_images: list[int]
    """Images of each class."""
    confusion_KK: Ints | None
    """Images by true class (row) and likeliest one (column)."""

    @property
    def balanced(self) -> float:
        """The mean of the accuracies of the classes that have images: each class counts alike, however rare."""
        there = [share for share in self.per_class if share is not None]
        return sum(there) / len(there)

    @property
    def rank(self) -> float:
        """One number in [-1, 1] that orders scores by top-1, and equal ones by their loss: one right answer more
        outweighs any loss.
        """
        penalty = self.loss / (1 + self.loss) if math.isfinite(self.loss) else 1.0
        return self.top1 - penalty / self.images


def score(answers: Answers, classes: int) -> Score:
    """The score of some answers.

    A class is right where no other is at least as likely, so that a classifier without an opinion scores nothing.
    """
    count = len(answers.labels)
    assert count, "nothing to score"
    right = answers.ahead == 0
    images = np.bincount(answers.labels, minlength=classes)
    hits = np.bincount(answers.labels[right], minlength=classes)
    confusion = None
    if classes <= MAX_CONFUSION:
        places = answers.labels * classes + answers.predicted
        confusion = np.bincount(places, minlength=classes * classes).reshape(classes, classes)
    return Score(
        images=count,
        top1=float(right.mean()),
        top5=float((answers.ahead < 5).mean()),
        loss=float(np.nan_to_num(answers.loss.mean(), nan=math.inf)),
        interval=wilson(float(right.mean()), count),
        per_class=[float(hit / all_) if all_ else None for hit, all_ in zip(hits, images, strict=True)],
        class_images=images.tolist(),
        confusion_KK=confusion,
    )


def worst_confusions(confusion_KK: Ints, limit: int) -> list[tuple[int, int, int]]:
    """(true class, likeliest class, images) of the most frequent mistakes, most first."""
    wrong = confusion_KK.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:limit]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [
        (int(row), int(column), int(wrong[row, column]))
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    ]
