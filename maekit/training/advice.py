"""What is said of a run that is short, learned little, or has few images to choose by: the number, and what to try."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maekit.config import PretrainConfig
from maekit.training.batch import short_run_rate, small_batch

Ints = npt.NDArray[np.int64]
NAMED = 5
"""Classes that a message names."""
FEW_STEPS = 1_000
"""Optimiser steps of a whole pretraining below which a word is due: 240 photographs in batches of 64 make 300 in 100
epochs. Recipes that bring their data (photos, digits) were tuned to be shorter and are left alone."""
LOW_SKILL = 0.05
"""Final skill below which a model hardly knows more than a fill from the visible patches does."""
FEW_HELDOUT = 100
"""Held-out images below which a choice by their accuracy is noisy: +- 10 points and more."""


def few_steps(config: PretrainConfig, steps: int, steps_per_epoch: int, world: int) -> list[str]:
    """A line where a pretraining is to make few optimiser steps in all, with the flags that make more of them.

    world: processes of the run, which must be able to share a batch that is named: it counts the images of them all.
    """
    if steps >= FEW_STEPS or config.data == config.recipe:
        return []
    longer = f"--steps {FEW_STEPS}" if config.epochs is None else f"--epochs {-(-FEW_STEPS // steps_per_epoch)}"
    ways = [f"{longer} makes {FEW_STEPS:,}"]
    images = config.batch_size * steps_per_epoch
    batch = small_batch(images, config.batch_size, world * config.accum)
    if config.epochs is not None and batch < config.batch_size:
        made = round(config.epochs * (images // batch))
        ways.append(f"--batch-size {batch} --lr {short_run_rate(config, batch)[0]:g} makes {made:,}")
    return [
        f"only {steps:,} optimiser step{'s' if steps != 1 else ''} in all, and a model learns little in less than "
        f"about {FEW_STEPS:,}: {'; '.join(ways)}"
    ]


def low_skill(
    config: PretrainConfig, skill: float, steps: int, steps_per_epoch: int, peak_lr: float, world: int
) -> dict[str, str]:
    """What a skill near 0 means and what to try, as a setting to print; nothing where the skill is better.

    world: processes of the run, as in `few_steps`.
    """
    if skill >= LOW_SKILL:
        return {}
    ways = [f"a longer run (--epochs; this one made {steps:,} steps)"]
    batch = small_batch(config.batch_size * steps_per_epoch, config.batch_size, world * config.accum)
    rate = short_run_rate(config, batch)[0]
    if batch < config.batch_size:
        ways.append(f"smaller batches (--batch-size {batch} --lr {max(rate, peak_lr):.3g})")
    elif peak_lr < rate:
        ways.append(f"a higher rate (--lr {rate:g}; this one's peak was {peak_lr:.3g})")
    return {
        "that is": f"{'no' if skill <= 0 else 'hardly'} better than interpolation (below {LOW_SKILL:g}): the model has "
        f"learned next to nothing of these images; try {' or '.join(ways)}"
    }


def few_heldout(score: str, count: int) -> list[str]:
    """A line where few held-out images choose the best epoch: 95 % of accuracies of n images lie within 1 / sqrt(n)."""
    if score != "best" or count >= FEW_HELDOUT:
        return []
    return [
        f"the best epoch is chosen on {count} held-out image{'s' if count != 1 else ''}, whose accuracy is uncertain "
        f"by up to +- {100 / math.sqrt(max(1, count)):.0f} points: --heldout-share 0.2 takes more of them, and --score "
        "last needs no choice"
    ]


def missed_classes(score: str, train_S: Ints, heldout_S: Ints, names: Sequence[str]) -> list[str]:
    """A line where no held-out image is of a class that is trained on, so that ignoring it is never punished.

    Both are class ids of S images.
    """
    missed = np.setdiff1d(train_S, heldout_S).tolist() if score == "best" else []
    if not missed:
        return []
    more = f" and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
    return [
        f"no held-out image is of {', '.join(names[k] for k in missed[:NAMED])}{more}: the choice of the best epoch "
        "does not see what becomes of it"
    ]


def what_next(task: str, out: str, data: str = "", labelled: bool = False) -> dict[str, str]:
    """What to type after a finished run, as settings to print.

    out: the run's folder; data: what it was trained on, and whether that has labels.
    """
    out = shlex.quote(out)
    if task == "finetune":
        return {"next": f"maekit predict {out} --data FOLDER --out predictions.csv"}
    if task == "segment":
        return {"next": f"maekit segment {out} --predict IMAGES --out DIR"}
    probe = {"and": f"maekit probe {out} --data {shlex.quote(data)}"} if labelled else {}
    return {"next": f"maekit reconstruct {out} --image IMAGE --out panel.png", **probe}


def see_report(out: str) -> str:
    """Where the pictures and numbers of a run stand on one page."""
    return f"one page of all: maekit report {shlex.quote(out)}"


def images_seen(images: int, since: int, how: str) -> str:
    """Images of the whole run, and how long they took; of a resumed run, those of this session."""
    return f"{images:,} in {how}" if since == images else f"{images:,}, the last {since:,} of them in {how}"
