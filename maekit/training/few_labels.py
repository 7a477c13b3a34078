"""Which labels a probe with few of them is given: a share of each class, as whoever labels so many images would have.

Drawn in proportion to the classes, and at least one of each. Equal numbers of every class are what the 1 % and 10 %
subsets of ImageNet have (SimCLR, arXiv 2002.05709, section 6), whose classes are about equal, and of classes of one
size these are the same draws. Of others they would not be a share of the labels (a rare class would give all it has),
and a probe would meet other frequencies than the test images have, and than the probe with all labels is fitted on.

Shapes: S images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.rng import Purpose, random_bits

FEW_LABELS = (0.01, 0.1)
"""Shares of the labels for the probes with few."""

Ints = npt.NDArray[np.int64]


def labels_to_draw(labels_S: Tensor, share: float) -> Ints:
    """How many labels of each class [C] a share of them is, in proportion to the classes; all 0 where it is too few.

    In all they are a whole number for each class, rounded: classes of one size give just that number each. Every class
    gives one at least; what is left of the proportions goes to those that are furthest below their own.
    """
    counts_C = torch.bincount(labels_S).cpu().numpy().astype(np.int64)
    there_C, images = counts_C > 0, int(counts_C.sum())
    total = int(there_C.sum()) * round(share * images / max(1, int(there_C.sum())))
    if not total:
        return np.zeros_like(counts_C)
    drawn_C: Ints = np.where(there_C, np.maximum(1, total * counts_C // images), 0)
    while (left := total - int(drawn_C.sum())) != 0:
        # In integers, so that equal classes tie and the first of them come first.
        behind_C = total * counts_C - drawn_C * images
        if left > 0:
            drawn_C[np.argsort(-np.where(there_C, behind_C, behind_C.min() - 1), kind="stable")[:left]] += 1
        else:  # single labels of rare classes are taken from those that have more than their part
            drawn_C[np.argmin(np.where(drawn_C > 1, behind_C, behind_C.max() + 1))] -= 1
    return drawn_C


def label_shares(labels_S: Tensor, asked: Sequence[float] | None) -> list[float]:
    """The shares of labels that were asked for, or those of FEW_LABELS, that give every class one."""
    return [share for share in asked or FEW_LABELS if labels_to_draw(labels_S, share).any()]


def draw_labels(labels_S: Tensor, images_S: Tensor, wanted_C: Ints, draw: int) -> Tensor:
    """So many images of each class, at random, the same in every run; a class that has fewer here gives all it has."""
    images, labels = images_S.cpu().numpy(), labels_S[images_S].cpu().numpy()
    keys = random_bits(images, 1, seed=draw + 1, purpose=Purpose.SUBSET)[:, 0]
    order = np.lexsort((images, keys, labels))
    first = np.searchsorted(labels[order], labels[order])  # where each one's class begins
    chosen = images[order][np.arange(len(order)) - first < wanted_C[labels[order]]]
    return torch.from_numpy(np.sort(chosen)).to(images_S.device)
