"""Batch and learning rate by the number of training images, where no flag says them: few images need small batches.

A rule of images and flags alone, so that every process chooses the same; what it chose stands in the run's config.json,
and a resumed run reads it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from rich.console import Console

from maekit.config import UserError
from maekit.terminal import remark

LEAST_STEPS = 32
"""Optimiser steps that an epoch has at least, where a smaller batch can give them: so that 100 of them are 3,000."""
BLR_BATCH = 256
"""The batch that blr is the rate of."""
SHORT_RUN_LR = 5e-4
"""Least peak rate of a pretraining on few images. Held-out skill of `folder` with a ViT of 128 x 4 at 48 px, one seed:
232 photographs, 100 epochs: batch 64 and its 1.25e-4 0.127, batch 8 and its 1.6e-5 0.131, batch 8 and 5e-4 0.194, and
1e-3 0.199. 1,000 pieces of photographs, 25 epochs: batch 64 and its 1.25e-4 0.181, batch 16 and 5e-4 0.271. ViT-S
at 64 px, 232 photographs, 15 epochs: batch 64 and its 1.25e-4 0.012, batch 8 and 5e-4 0.116."""
UNSCALED_BELOW = 128
"""The batch below which a fine-tuning's rate does not fall. Test accuracy after 100 epochs on digits (64 x 3, mixup,
layer decay 0.75, one seed). 100 images: batch 64 and its 2.5e-4 42.6 %, batch 8 and its 3.1e-5 41.5, 8 and 1.8e-4 (the
square root) 61.0, 8 and 5e-4 72.7, 8 and 1e-3 70.2. 300 images: 128 and its 5e-4 65.5, 8 and its 3.1e-5 57.1, 8 and
1.8e-4 78.3, 8 and 5e-4 84.1."""
SMALLEST_BATCH = 8
"""A step of fewer images costs nearly as much time, and its gradient is mostly noise."""
_SHARED = "(processes, --accum, and pairs that mixup takes)"


class Following(Protocol):
    """A config whose batch and learning rate may follow the number of training images."""

    batch_size: int
    accum: int
    blr: float
    lr: float | None
    follow_images: tuple[Any, ...]


Config = TypeVar("Config", bound=Following)
Rate = Callable[[Following, int], tuple[float, str]]
"""A learning rate for a batch below the config's own, and why it is that."""


def small_batch(images: int, most: int, unit: int = 1) -> int:
    """A batch for so many training images: `most`, or the power of two that leaves an epoch LEAST_STEPS steps.

    It counts the images of all processes, as --batch-size does.
    unit: what it must be a multiple of, for processes and accumulation to share it.
    """
    batch = most
    if images < LEAST_STEPS * most:
        power = 1 << max(0, (images // LEAST_STEPS).bit_length() - 1)
        batch = min(most, max(SMALLEST_BATCH, power), images)
    return max(unit, batch // unit * unit)


def finetuning_rate(config: Following, batch: int) -> tuple[float, str]:
    """blr x batch / 256 down to a batch of UNSCALED_BELOW, whose rate smaller ones keep."""
    linear, rate = (config.blr * size / BLR_BATCH for size in (batch, max(batch, UNSCALED_BELOW)))
    return rate, f"and blr x batch / 256 a rate of {linear:.2g}: that of {UNSCALED_BELOW} images is kept"


def short_run_rate(config: Following, batch: int) -> tuple[float, str]:
    """blr x batch / 256, and SHORT_RUN_LR where that is less."""
    linear = config.blr * batch / BLR_BATCH
    return max(SHORT_RUN_LR, linear), f"and blr x batch / 256 a rate of {linear:.2g}"


def follow_images(config: Config, images: int, parts: int, rate: Rate, console: Console) -> Config:
    """The config with a batch and a rate for so many training images, where they may follow them; says what it chose.

    parts: what a batch must be divisible by, besides accumulation: the number of processes, or twice that for pairs.

    Raises:
        UserError: the batch is larger than the number of images; names one that fits and its rate. Or no batch fits.
    """
    unit = parts * config.accum
    if unit > images > 0:
        raise UserError(
            f"{images} training images are too few: a batch must be divisible by {unit} here {_SHARED}: start fewer "
            "processes, or lower --accum"
        )
    batch = small_batch(images, config.batch_size, unit)
    lr, why = rate(config, batch)
    if not config.follow_images:
        if config.batch_size > images:
            linear = config.blr * batch / BLR_BATCH
            raise UserError(
                f"--batch-size {config.batch_size} is larger than the {images} training images: lower it, such as to "
                f"--batch-size {batch}"
                + (f" --lr {lr:g} (blr x batch / 256 would be {linear:.2g}, too little)" if config.lr is None else "")
                + "; an epoch should have dozens of steps"
            )
        return config
    whole, settled = config.batch_size, dataclasses.replace(config, follow_images=())  # type: ignore[type-var]
    if batch == whole:
        return settled
    few = images < LEAST_STEPS * whole  # otherwise the batch is hardly another one, and blr says its rate
    settled.batch_size, chosen = batch, f"--batch-size {batch}"
    if lr_follows := few and "lr" in config.follow_images:
        settled.lr, chosen = lr, f"{chosen} --lr {lr:g}"
    steps = images // whole
    said = f"{chosen} for {images:,} images, as no flag says {'them' if lr_follows else 'it'}: {whole:,} "
    if few and batch < whole:
        said += f"would make {steps or 'no'} step{'' if steps == 1 else 's'} an epoch"
    else:
        said += f"is not divisible by {unit}, as it must be here {_SHARED}"
    remark(console, [said + (f", {why}" if lr_follows else "")])
    return settled
