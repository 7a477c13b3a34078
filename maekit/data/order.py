"""Which samples each step sees, which are held out, and what a batch is: the ground that both kinds of pool stand on.

Shapes: B batch, C channels, H x W pixels, N images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from maekit.config import PretrainConfig, UserError
from maekit.data.parts import Part
from maekit.rng import Purpose, random_bits, shuffled

Ids = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

MIN_HELDOUT = 8
"""Held-out images at least: as many as a panel has rows."""


class Batch(NamedTuple):
    """Images [B, C, H, W] on the device (uint8, or floats in 0..1), their sample ids, and what was unreadable."""

    images: Tensor
    sample_ids: Ids
    bad: list[tuple[int, str]]


def split_heldout(
    num: int, share: float, least: int = MIN_HELDOUT, groups_N: Ids | None = None, reported: Ids | None = None
) -> tuple[Ids, Ids]:
    """Training and held-out sample ids, both ascending: held out are those with the lowest hash of their id, or of
    their group (`Part.groups`), which is never parted.

    The hash ignores the run's seed, so every run on the same data holds out the same images.

    Args:
        reported: ids that are kept for a report, which are in neither.

    Raises:
        UserError: too few images, or groups, to hold any out.
    """
    held = max(least, round(share * num))
    if num <= held:
        raise UserError(
            f"{num} images are too few: {held} are held out of training (--heldout-share), and some must be left"
        )
    ids = np.arange(num, dtype=np.int64)
    if reported is None:
        reported = ids[:0]
    if groups_N is None:
        chosen = np.setdiff1d(lowest_hash(ids, held, Purpose.HELDOUT_SPLIT), reported, assume_unique=True)
    else:  # the group that comes first by its hash may be one of those for the report, and then nothing would be left
        chosen = lowest_hash(np.setdiff1d(ids, reported), held, Purpose.HELDOUT_SPLIT, groups_N)
    left = np.setdiff1d(np.setdiff1d(ids, chosen, assume_unique=True), reported, assume_unique=True)
    if groups_N is not None and not len(left):
        raise UserError(
            f"--group-by: {len(np.unique(groups_N))} groups ({num:,} images) are too few: whole groups are held out of "
            f"training, of {held:,} images at least (--heldout-share), and some must be left"
        )
    return left, chosen


def choose_training(train_ids: Ids, count: int | None) -> Ids:
    """`--train-images` of the ids that may be trained on, ascending: those with the lowest hash of their id.

    Raises:
        UserError: more are asked for than there are.
    """
    if count is None:
        return train_ids
    if count > len(train_ids):
        raise UserError(
            f"--train-images {count}: only {len(train_ids)} images are left to train on, as --heldout-share of them is "
            "held out: lower one of the two"
        )
    return lowest_hash(train_ids, count, Purpose.SUBSET)


def sides(part: Part, config: PretrainConfig) -> npt.NDArray[np.bool_]:
    """[N] True for held-out samples: the stand-in of an unreadable one must not cross over to training, or back."""
    heldout_N = np.zeros(len(part), np.bool_)
    with contextlib.suppress(UserError):  # too few to hold any out: then all are on one side
        heldout_N[split_heldout(len(part), config.heldout_share, groups_N=part.groups)[1]] = True
    return heldout_N


def lowest_hash(ids: Ids, count: int, purpose: Purpose, groups_N: Ids | None = None) -> Ids:
    """The `count` ids with the lowest hash, ascending: a fixed random subset that grows with `count`.

    With the groups of all samples: whole groups, those with the lowest hash, until they are `count` ids or more.
    """
    keys = random_bits(ids if groups_N is None else groups_N[ids], 1, seed=0, purpose=purpose)[:, 0]
    if groups_N is not None:  # up to the end of the group in which the last one lies
        in_order = np.sort(keys)
        return np.sort(ids[keys <= in_order[min(count, len(ids)) - 1]]) if count and len(ids) else ids[:0]
    return np.sort(ids[np.lexsort((ids, keys))[:count]])


class SampleOrder:
    """Which samples each optimiser step sees: a permutation an epoch, cut into global batches, the rest dropped."""

    def __init__(self, train_ids: Ids, batch_size: int, seed: int) -> None:
        if batch_size > len(train_ids):
            raise UserError(
                f"--batch-size {batch_size} is larger than the {len(train_ids)} training images: lower it; an epoch "
                "should have dozens of steps"
            )
        self.train_ids, self.batch_size, self.seed = train_ids, batch_size, seed
        self.steps_per_epoch = len(train_ids) // batch_size
        self._epoch, self._permutation = -1, train_ids

    def step_ids(self, step: int) -> tuple[int, Ids]:
        """Epoch (0-based) and the sample ids [batch_size] of a global step (0-based)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = shuffled(self.train_ids, seed=self.seed, purpose=Purpose.ORDER, epoch=epoch)
        return epoch, self._permutation[within * self.batch_size : (within + 1) * self.batch_size]

    def micro_batches(self, steps: Iterable[int], rank: int, world: int, accum: int) -> Iterator[tuple[int, Ids]]:
        """One process's share: for every step its `accum` parts, as (epoch, sample ids [batch / world / accum])."""
        for step in steps:
            epoch, ids = self.step_ids(step)
            for part in ids.reshape(accum, world, -1)[:, rank]:
                yield epoch, part


def together(shares: Iterable[tuple[int, Ids]], most: int) -> Iterator[tuple[int, list[Ids]]]:
    """Successive shares of one epoch in groups of at most `most` samples, or of one share that is larger."""
    group: list[Ids] = []
    current, count = -1, 0
    for epoch, ids in shares:
        if group and (epoch != current or count + len(ids) > most):
            yield current, group
            group, count = [], 0
        group.append(ids)
        current, count = epoch, count + len(ids)
    if group:
        yield current, group


class Pool(Protocol):
    """Images that can be drawn by sample id."""

    @property
    def unreadable(self) -> dict[int, str]:
        """Sample ids that were found unreadable so far, with the reason; another image stands in for each."""
        ...

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        """A batch for each (epoch, sample ids), with the training crops and flips."""
        ...

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        """Batches of centre crops, in order, the last one smaller."""
        ...
