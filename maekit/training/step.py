"""What one optimiser step computes: for the trainer, the replay of a bad step, a dry run and a benchmark alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maekit.config import PretrainConfig
from maekit.data.order import Ids, together
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks
from maekit.training.guard import Guard, backward, update_if_finite

MASKS_AHEAD = 2048
"""For a GPU, masks of several steps are drawn at once, up to so many: most of a batch's time is calls of NumPy."""


def masks_ahead(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    shares: Iterable[tuple[int, Ids]],
    device: torch.device,
    at_once: int | None = None,
) -> Iterator[Masks]:
    """The masks of each (epoch, sample ids), on the device; they depend on no other sample that is drawn with them.

    at_once: how many are drawn together at most; a share that is larger is drawn whole. Default: by the device.
    """
    views = config.masks_per_image
    if at_once is None:
        at_once = 1 if device.type == "cpu" else MASKS_AHEAD
    for epoch, group in together(shares, at_once // views):
        masks = model.draw_masks(np.concatenate(group), seed=config.seed, epoch=epoch, views=views).to(device)
        sizes = [views * len(ids) for ids in group]
        yield from itertools.starmap(
            Masks, zip(masks.ids_keep_BV.split(sizes), masks.ids_masked_BM.split(sizes), strict=True)
        )


def part_loss(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    images_BCHW: Tensor,
    masks: Masks,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """The training loss, a float32 scalar, of images under their masks; nothing waits for the device.

    forward: what is called in the model's place, such as its compiled or distributed form.
    """
    images_BCHW = model.normalize(images_BCHW)
    if config.masks_per_image > 1:
        images_BCHW = images_BCHW.repeat_interleave(config.masks_per_image, dim=0)
    with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = (forward or model)(images_BCHW, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM)
    loss: Tensor = output.loss
    return loss


def whole_step(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    forward: Callable[..., Any],
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A step that is not accumulated as one function of tensors, for `Replayed`: images, visible and predicted ids.

    It returns the loss and what the guard says of the step.
    """

    def step(images_BCHW: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> tuple[Tensor, Tensor]:
        loss = part_loss(model, config, images_BCHW, Masks(ids_keep_BV, ids_masked_BM), forward)
        backward(loss)
        return loss.detach(), update_if_finite(model, optimizer, guard, config.clip_grad)

    return step
