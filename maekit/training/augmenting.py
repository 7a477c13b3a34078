"""Which changes of single images a fine-tuning makes: as its flags say, or as far as its images can take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from maekit.config import FinetuneConfig, UserError
from maekit.data.augment import Augment
from maekit.data.labelled import Splits, why_no_colours
from maekit.terminal import remark


def choose_augment(
    config: FinetuneConfig, splits: Splits, size_hw: tuple[int, int], mean: Sequence[float], console: Console
) -> tuple[FinetuneConfig, Augment | None]:
    """The config with --policy-parts settled, and what is done to each image, if anything; a remark says what is left
    out without having been asked for.

    Raises:
        UserError: changes of colour that were asked for, and images that cannot take them.
    """
    if not config.policy and not config.color_jitter:
        return config, None
    parts = config.policy_parts
    if config.color_jitter or parts != "geometric":
        why = why_no_colours(splits.train, splits.train_ids)
        if why and (config.color_jitter or parts == "all" or config.policy.startswith("augmix")):
            raise UserError(
                f"--auto-augment and --color-jitter: colours are changed in images of 8 bits and 1 or 3 channels, and "
                f"{why}: --policy-parts geometric --color-jitter 0 moves pixels only, --auto-augment none does not"
            )
        if why:
            remark(console, [
                f"colours can be changed in images of 8 bits and 1 or 3 channels, and {why}: of --auto-augment "
                f"{config.policy} only shears, shifts and rotations are made (--auto-augment none: not even these)"
            ])  # fmt: skip
        if parts == "auto":
            parts = "geometric" if why else "all"
    config = dataclasses.replace(config, policy_parts=parts)
    return config, Augment(config.policy, config.color_jitter, size_hw, mean, config.seed, parts == "geometric")
