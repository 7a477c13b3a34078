"""The loss of one part of a batch: what training, the replay of a bad step, a dry run and a benchmark all compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maekit.config import PretrainConfig
from maekit.data.loader import Batch
from maekit.models.mae import MaskedAutoencoder


def part_loss(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    batch: Batch,
    epoch: int,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """The training loss, a float32 scalar, of a batch under its masks of this epoch; nothing waits for the device.

    forward: what is called in the model's place, such as its compiled or distributed form.
    """
    device = batch.images.device
    views = config.masks_per_image
    masks = model.draw_masks(batch.sample_ids, seed=config.seed, epoch=epoch, views=views).to(device)
    images = model.normalize(batch.images)
    if views > 1:
        images = images.repeat_interleave(views, dim=0)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = (forward or model)(images, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM)
    loss: Tensor = output.loss
    return loss
