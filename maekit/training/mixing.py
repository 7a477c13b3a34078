"""What a batch goes through before a classifier sees it: erased boxes, mixup, CutMix and soft labels; all are timm's.

They draw from the global generators, which `maekit.seeding.seed_step` sets for every step.
Shapes: B batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from maekit.config import FinetuneConfig


class Mixing:
    """From normalised images and class ids to what is trained on."""

    def __init__(self, config: FinetuneConfig, classes: int, device: torch.device) -> None:
        self.classes, self.smoothing = classes, config.smoothing
        self.is_off = False
        self.erase: Any = None
        if config.erase > 0:
            self.erase = RandomErasing(
                config.erase, mode=config.erase_mode, max_count=config.erase_count, device=str(device)
            )
        self.mix: Any = None
        if config.mixes:
            self.mix = Mixup(
                config.mixup, config.cutmix, config.cutmix_minmax, config.mixup_prob, config.mixup_switch_prob,
                config.mixup_mode, label_smoothing=config.smoothing, num_classes=classes,
            )  # fmt: skip

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W], which are changed in place, and the probability of each class [B, K].

        While `is_off`, images stay as they are and labels are only smoothed.
        """
        if self.erase is not None and not self.is_off:
            images_BCHW = self.erase(images_BCHW)
        if self.mix is not None and not self.is_off:
            mixed: tuple[Tensor, Tensor] = self.mix(images_BCHW, labels_B)
            return mixed
        return images_BCHW, mixup_target(labels_B, self.classes, 1.0, self.smoothing)


def soft_loss(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Cross-entropy with the probability of each class, a mean over the batch, in float32 at least."""
    precise = torch.promote_types(logits_BK.dtype, torch.float32)
    return F.cross_entropy(logits_BK.to(precise), targets_BK.to(precise))
