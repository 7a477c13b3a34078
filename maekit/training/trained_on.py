"""Which images of some data a classifier was trained on: an accuracy on those says little of any others.

A run says it by its config (which data, and what was held out of them) and the fingerprint in its weights; files are
known again by their paths, also where --data names a part of the training images, or a folder around them. Copies of
some of the files under other names are not known.

Shapes: N images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maekit.config import FinetuneConfig, UserError
from maekit.configfile import read
from maekit.data.archive_names import archive_above
from maekit.data.labelled import kept_for_report, part_for_report, split_labelled
from maekit.data.parts import Part, PlacedPart
from maekit.data.sources import Source, lasting, open_configured
from maekit.weights.passport import Passport


@dataclass(frozen=True)
class Training:
    """The part that a classifier was trained on, and which of its images: trained on, or chosen the best epoch by."""

    fingerprint: str
    ids: npt.NDArray[np.int64]
    part: Part | None = None
    """The part itself, where its files can be told by their paths."""
    sure: bool = True
    """False: files came or went since, or the run is not known, so that any of the images may have been used."""

    def among(self, part: Part) -> npt.NDArray[np.bool_]:
        """[N] True for the images of a part that the training used, as far as that can be known."""
        used_N = np.zeros(len(part), np.bool_)
        if part.fingerprint == self.fingerprint:
            used_N[self.ids] = True
        elif isinstance(part, PlacedPart) and isinstance(self.part, PlacedPart):
            places = set(places_of(self.part, self.ids.tolist()))
            used_N[:] = [place in places for place in places_of(part, range(len(part)))]
        return used_N


def training_of(source: str, passport: Passport, data: Source, spec: str) -> Training | None:
    """What a classifier was trained on, where it may be among these data; None: nothing says that it is.

    source: its run's folder, or a file of weights. spec: what names the data.
    """
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    known = any(part.fingerprint == passport.fingerprint for part in parts)
    run = run_of(source)
    if run is not None and (known or _overlap(run.data, spec)):
        try:
            ungrouped = run.group_by is None and data.train.groups is None
            same = lasting(spec) == run.data and ungrouped
            own = data if same else open_configured(run, passport.model.in_chans)
            splits = split_labelled(own, run.data, run.heldout_share, run.train_share)
        except UserError:  # they are gone, or have changed
            pass
        else:
            if splits.train.fingerprint == passport.fingerprint:
                used = np.union1d(splits.train_ids, splits.heldout_ids)
                return Training(passport.fingerprint, used, splits.train)
            return Training(
                passport.fingerprint, np.arange(len(splits.train), dtype=np.int64), splits.train, sure=False
            )
    if not known:
        return None
    # The same data, and nobody knows the run: what a run on data of this form would have used.
    there = next(part for part in parts if part.fingerprint == passport.fingerprint)
    everyone = np.arange(len(there), dtype=np.int64)
    try:
        alone = there is data.train and part_for_report(data, spec)[1] is None
    except UserError:
        alone = False
    used = np.setdiff1d(everyone, kept_for_report(there)) if alone else everyone
    return Training(passport.fingerprint, used, sure=False)


def run_of(source: str) -> FinetuneConfig | None:
    """The settings of the fine-tuning in whose folder some weights lie; None where it is not known."""
    path = Path(source).expanduser()
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        run = read(FinetuneConfig, file)
    except UserError:  # another task's, or none
        return None
    return run if run.task == "finetune" else None


def places_of(part: PlacedPart, ids: Iterable[int]) -> Iterable[str]:
    """The files of a part as paths that are the same whatever way led to them, but for links to a file itself."""
    for index in ids:
        folder, name = os.path.split(part.place(index))
        yield os.path.join(_real(folder), name)


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _overlap(one: str, other: str) -> bool:
    """Whether two names of data may lead to the same files: one lies in the other, or lists name files anywhere."""
    paths = [os.path.realpath(archive_above(path) or path) for path in map(os.path.expanduser, (one, other))]
    if not all(map(os.path.exists, paths)):
        return False
    if not all(map(os.path.isdir, paths)):
        return not any(path.lower().endswith(".parquet") for path in paths)
    return os.path.commonpath(paths) in paths


def said_of(used: int, count: int, sure: bool) -> str:
    """How a score on so many images of which some were trained on is to be read."""
    which = "these images" if used == count else f"{used:,} of these {count:,} images"
    return f"the model was {'' if sure else 'probably '}trained on {which}, so this says little of new ones"
