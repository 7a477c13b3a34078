"""Batch and learning rate by the number of training images, where no flag says them: few images need small batches.

A rule of images and flags alone, so that every process chooses the same; what it chose stands in the run's config.json,
and a resumed run reads it there.
"""

from __future__ import annotations

import dataclasses
import math
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
"""Peak rate of a pretraining on few images, by measurement: XXX"""
SMALLEST_BATCH = 8
"""A step of fewer images costs nearly as much time, and its gradient is mostly noise."""


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

    unit: what it must be a multiple of, for processes and accumulation to share it.
    """
    if images >= LEAST_STEPS * most:
        return most
    power = 1 << max(0, (images // LEAST_STEPS).bit_length() - 1)
    batch = min(most, max(SMALLEST_BATCH, power), images)
    return max(unit, batch // unit * unit)


def square_root_rate(config: Following, batch: int) -> tuple[float, str]:
    """blr x batch / 256 from 256 images on, below it blr x the square root of that ratio."""
    ratio = batch / BLR_BATCH
    rate = float(f"{config.blr * (ratio if ratio >= 1 else math.sqrt(ratio)):.2g}")
    return rate, f"and blr x batch / 256 (without the square root) a rate of {config.blr * ratio:.2g}"


def short_run_rate(config: Following, batch: int) -> tuple[float, str]:
    """blr x batch / 256, and SHORT_RUN_LR where that is less."""
    linear = config.blr * batch / BLR_BATCH
    return max(SHORT_RUN_LR, linear), f"and blr x batch / 256 a rate of {linear:.2g}"


def follow_images(config: Config, images: int, parts: int, rate: Rate, console: Console) -> Config:
    """The config with a batch and a rate for so many training images, where they may follow them; says what it chose.

    parts: what a batch must be divisible by, besides accumulation.

    Raises:
        UserError: the batch is larger than the number of images; names one that fits and its rate.
    """
    unit = parts * config.accum
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
    if batch >= whole:
        return settled
    settled.batch_size, chosen = batch, f"--batch-size {batch}"
    if lr_follows := "lr" in config.follow_images:
        settled.lr, chosen = lr, f"{chosen} --lr {lr:g}"
    steps = images // whole
    said = f"{chosen} for {images:,} images, as no flag says {'them' if lr_follows else 'it'}: {whole:,} would make "
    said += f"{steps or 'no'} step{'' if steps == 1 else 's'} an epoch" + (f", {why}" if lr_follows else "")
    remark(console, [said])
    return settled
