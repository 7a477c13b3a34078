"""Labelled images for training with labels: which of them may be used, and pools that also augment each by itself.

Shapes: B batch, C channels, H x W pixels, N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import PretrainConfig, UserError
from maekit.data.augment import COLOURED, Augment
from maekit.data.images import BadImage
from maekit.data.loader import open_pool
from maekit.data.memory import MemoryPool
from maekit.data.order import Batch, Ids, Pool, Progress, lowest_hash, split_heldout
from maekit.data.parts import ArrayPart, Part
from maekit.data.sources import Source
from maekit.data.stream import StreamPool
from maekit.rng import Purpose
from maekit.runtime import Choice, to_device

TEST_SHARE = 0.2
"""Share of the images that are kept for the report where the data have no test or validation split: the same images
that `maekit probe` keeps."""
NAMED = 5
"""Classes or files that a message names."""


@dataclass(frozen=True)
class Splits:
    """Which labelled images are trained on, which choose the best weights, and which are only for the report."""

    classes: tuple[str, ...]
    train: Part
    train_ids: Ids
    heldout_ids: Ids
    test: Part
    test_ids: Ids
    test_what: str
    """Where the images of the report come from, in words."""


def labels_of(part: Part, data: str) -> npt.NDArray[np.int64]:
    """Class ids [N] of a part, -1 for none.

    Raises:
        UserError: the data have no labels.
    """
    if part.labels is None or part.class_names is None:
        raise UserError(
            f"--data {data}: has no labels, and a classifier needs them: one folder per class, a CSV of "
            "file_name,label, or a column of labels in Parquet (--label-column)"
        )
    return part.labels


def kept_for_report(part: Part) -> Ids:
    """Those of the images that are never trained on, for the report: of data that have no part for it.

    Raises:
        UserError: all of them, as they are of one group.
    """
    everyone = np.arange(len(part), dtype=np.int64)
    kept = lowest_hash(everyone, max(1, round(TEST_SHARE * len(part))), Purpose.TEST_SPLIT, part.groups)
    if part.groups is not None and len(kept) == len(part):
        raise UserError(
            f"--group-by: {len(np.unique(part.groups))} groups are too few: whole groups are kept for the test, of "
            f"{TEST_SHARE:.0%} of the images at least, and some must be left to train on"
        )
    return kept


def groups_said(part: Part, ids: Ids) -> str:
    """Of how many groups some images are, in words; empty where they have none."""
    return "" if part.groups is None else f" ({len(np.unique(part.groups[ids])):,} whole groups)"


def part_for_report(source: Source, data: str) -> tuple[str, Part | None]:
    """What a report is about, in words, and where: the test part; else the validation part, also where nobody has the
    test part's labels, as with ImageNet's; None: the data have neither.

    Raises:
        UserError: the part is there and holds no image.
    """
    named = (("test", "test", source.test), ("validation", "val", source.val))
    for what, name, part in named:
        if name in source.empty:
            raise UserError(f"--data {data}: its {what} split holds no image; put images there, or remove it")
        if part is not None and part.labels is not None and (part.labels >= 0).any():
            return what, part
    return next(((what, part) for what, _, part in named if part is not None), ("test", None))


def test_images(source: Source, data: str) -> tuple[Part, Ids, str]:
    """The labelled images that a report is about: part, sample ids, and what they are in words.

    Raises:
        UserError: no labels, or none on those images.
    """
    name, found = part_for_report(source, data)
    if found is None:
        part = source.train
        ids = kept_for_report(part)
        what = f"a fixed {TEST_SHARE:.0%} of the images{groups_said(part, ids)}, as the data have no test split"
    else:
        part = found
        ids = np.arange(len(part), dtype=np.int64)
        what = f"{name} split{groups_said(part, ids)}"
    ids = ids[labels_of(part, data)[ids] >= 0]
    if not len(ids):
        raise UserError(f"--data {data}: no image of its {what} has a label")
    return part, ids, what


def split_labelled(source: Source, data: str, heldout_share: float, train_share: float = 1.0) -> Splits:
    """The labelled images of a source, told apart; the held-out ones are those of every other maekit run on these data.

    train_share: so much of the training images is used (those of lowest hash, so that a larger share holds a smaller).

    Raises:
        UserError: no labels, a split without any, or training images of one class only.
    """
    labels = labels_of(source.train, data)
    assert source.train.class_names is not None
    part, test_ids, what = test_images(source, data)
    kept = kept_for_report(part) if part is source.train else None
    train_ids, heldout_ids = split_heldout(
        len(source.train), heldout_share, groups_N=source.train.groups, reported=kept
    )
    train_ids, heldout_ids = train_ids[labels[train_ids] >= 0], heldout_ids[labels[heldout_ids] >= 0]
    for name, ids in (("training images", train_ids), ("held-out images", heldout_ids)):
        if not len(ids):
            raise UserError(f"--data {data}: none of the {name} has a label")
    if train_share < 1:
        train_ids = lowest_hash(train_ids, max(1, round(train_share * len(train_ids))), Purpose.SUBSET)
    present = np.unique(labels[train_ids])
    if len(present) < 2:
        raise UserError(
            f"--data {data}: all {len(train_ids)} training images are of one class "
            f"({source.train.class_names[int(present[0])]}): there is nothing to tell apart"
        )
    return Splits(tuple(source.train.class_names), source.train, train_ids, heldout_ids, part, test_ids, what)


def class_map(names: Iterable[str], classes: tuple[str, ...], data: str, source: str) -> npt.NDArray[np.int64]:
    """A classifier's id of each class of the data, by name.

    Raises:
        UserError: a class that the classifier does not know.
    """
    names = list(names)
    known = {name: index for index, name in enumerate(classes)}
    strange = [name for name in names if name not in known]
    if strange:
        shown = ", ".join(strange[:NAMED]) + (f" and {len(strange) - NAMED} more" if len(strange) > NAMED else "")
        own = ", ".join(classes[:NAMED]) + (f" and {len(classes) - NAMED} more" if len(classes) > NAMED else "")
        raise UserError(f"--data {data}: labels of other classes ({shown}) than {source} was trained on ({own})")
    return np.array([known[name] for name in names], np.int64)


def why_no_colours(part: Part, ids: Ids) -> str:
    """Why the libraries cannot change the colours of these images, in words; empty where they can.

    Eight of them are looked at: images of 16 bits or floats, or of neither one nor three channels.
    """
    if part.in_chans not in COLOURED:
        return f"these have {part.in_chans} channels"
    for index in ids[:: max(1, len(ids) // 8)][:8].tolist():
        try:
            image = part.read(index)
        except BadImage:  # it will be met again, and named
            continue
        if image.dtype != np.uint8:
            return f"{part.name(index)} has more"
    return ""


def open_augmented(
    part: Part,
    config: PretrainConfig,
    device: torch.device,
    workers: Choice[int],
    augment: Augment | None,
    on_progress: Progress | None = None,
) -> tuple[Pool, Choice[bool]]:
    """As `open_pool`, with changes of each training image by itself where they are wanted.

    Then small images are decoded once and kept in memory as they are, and loader processes take them from there.
    """
    if augment is None:
        return open_pool(part, config, device, workers, on_progress)
    pool, choice = open_pool(part, config, torch.device("cpu"), workers, on_progress)
    if not isinstance(pool, MemoryPool):
        return StreamPool(part, config, device, workers.value, augment), choice
    reason = f"{choice.reason}; {workers.value} workers augment them"
    return AugmentedMemory(pool, part, config, device, workers.value, augment), Choice(True, reason)


class AugmentedMemory:
    """Images in memory that loader processes crop and augment; evaluation needs no processes."""

    def __init__(
        self,
        memory: MemoryPool,
        part: Part,
        config: PretrainConfig,
        device: torch.device,
        workers: int,
        augment: Augment,
    ) -> None:
        self.memory, self.device = memory, device
        pixels: npt.NDArray[Any] = memory.images_NCHW.permute(0, 2, 3, 1).numpy()
        decoded = ArrayPart(pixels, part.labels, part.class_names, part.in_chans)
        self.stream = StreamPool(decoded, config, device, workers, augment)

    @property
    def unreadable(self) -> dict[int, str]:
        return self.memory.unreadable

    def train_batches(self, shares: Iterable[tuple[int, Ids]]) -> Iterator[Batch]:
        bad = list(self.unreadable.items())
        for batch in self.stream.train_batches(shares):
            yield batch._replace(bad=bad)
            bad = []

    def eval_batches(self, ids: Ids, batch_size: int) -> Iterator[Batch]:
        for batch in self.memory.eval_batches(ids, batch_size):
            yield batch._replace(images=to_device(batch.images, self.device))


def take_good_slots(batch: Batch, unreadable: dict[int, str]) -> tuple[Tensor, Ids, bool]:
    """Images and sample ids of a batch in which the next good slot takes the place of one that cannot be read; and
    whether there is any good one: otherwise the batch is as it was, and nothing may be learned from it.

    A stand-in of another sample would come with a label that is not its own. Which slots are bad shows in the batch
    itself, so the result does not depend on what was met before.
    """
    bad_B = np.isin(batch.sample_ids, list(unreadable)) if unreadable else np.zeros(len(batch.sample_ids), np.bool_)
    if not bad_B.any():
        return batch.images, batch.sample_ids, True
    good = np.flatnonzero(~bad_B)
    if not len(good):
        return batch.images, batch.sample_ids, False
    places = np.arange(len(bad_B))
    places[bad_B] = good[np.searchsorted(good, places[bad_B]) % len(good)]
    return batch.images[torch.from_numpy(places).to(batch.images.device)], batch.sample_ids[places], True
