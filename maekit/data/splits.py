"""The labelled images of a training and a test split, for the tasks that measure: where they are, and their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import PretrainConfig, UserError
from maekit.data.labelled import groups_said, kept_for_report, part_for_report
from maekit.data.loader import Pool, open_pool
from maekit.data.parts import Part
from maekit.data.sources import Source
from maekit.data.workers import choose_workers


@dataclass(frozen=True)
class Split:
    """Labelled images of one split: where they are, which of them, their class ids on the device."""

    part: Part
    pool: Pool
    ids: npt.NDArray[np.int64]
    labels: Tensor
    what: str = ""
    """Where they come from, in words."""

    @property
    def readable_S(self) -> npt.NDArray[np.bool_]:
        """[S] False where another image stood in for an unreadable one, whose label is not its own.

        To be asked after the images were read once: only then it is known which they are.
        """
        kept_S: npt.NDArray[np.bool_] = ~np.isin(self.ids, list(self.pool.unreadable))
        return kept_S

    def kept(self, kept_S: npt.NDArray[np.bool_]) -> Split:
        """Without the images that are False."""
        return replace(self, ids=self.ids[kept_S], labels=self.labels[torch.from_numpy(kept_S).to(self.labels.device)])

    def unreadable(self) -> dict[tuple[str, int], str]:
        """Labelled images of its part that could not be read so far: name and reason by a key of part and image.

        A part that is opened again, for another number of channels, has the same keys.
        """
        found = sorted(self.pool.unreadable.items())
        labels = self.part.labels
        return {
            (self.part.fingerprint, i): f"{self.part.name(i)}: {why}"
            for i, why in found
            if labels is not None and labels[i] >= 0
        }


def open_splits(
    data: Source, reading: PretrainConfig, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> tuple[Split, Split]:
    """Training split, and test split: the data's test part, else their validation part, else a fixed fifth.

    reading: size, channels and augmentation of the images.

    Raises:
        UserError: no labels, or a split without labelled images.
    """

    pools: dict[int, Pool] = {}

    def open_split(part: Part, ids: npt.NDArray[np.int64], what: str) -> Split:
        if part.labels is None:
            which = "" if data.train.labels is None else f"its {what} split "
            raise UserError(
                f"--data {reading.data}: {which}has no labels, and a probe needs them: one folder per class, a "
                "CSV of file_name,label, or a column of labels in Parquet (--label-column)"
            )
        ids = ids[part.labels[ids] >= 0]
        if not len(ids):
            raise UserError(f"--data {reading.data}: its {what} split has no labelled images")
        if id(part) not in pools:  # where the test images are a share of the training part, all are read once
            pools[id(part)], _ = open_pool(part, reading, device, choose_workers(None, 1), progress)
        pool = pools[id(part)]
        return Split(part, pool, ids, torch.from_numpy(part.labels[ids]).to(device), what)

    what, test_part = part_for_report(data, reading.data)
    train_ids = np.arange(len(data.train), dtype=np.int64)
    if test_part is not None:
        test_ids = np.arange(len(test_part), dtype=np.int64)
        test = open_split(test_part, test_ids, what)
        test = replace(test, what=f"{what}{groups_said(test_part, test_ids)}")
    else:
        test_ids = kept_for_report(data.train)
        train_ids = np.setdiff1d(train_ids, test_ids)
        what = f"a fixed fifth of the images{groups_said(data.train, test_ids)}, which no probe is fitted on"
        test = replace(open_split(data.train, test_ids, "test"), what=what)
    return open_split(data.train, train_ids, "training"), test
