"""bfloat16 products beside float32: how far losses, gradients and a short training may be apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY

from maekit.config import PretrainConfig
from maekit.models.mae import MaskedAutoencoder
from maekit.training.guard import Guard, backward, guarded_update
from maekit.training.optim import make_optimizer
from maekit.training.step import part_loss

LOSS, GRADIENT, AFTER = 2e-3, 0.03, 0.02
"""Bounds, relative: of the loss, of all gradients together, of the loss after 30 steps."""


def steps(precision: str, count: int, **changes: Any) -> tuple[list[float], torch.Tensor]:
    """The losses of so many steps, and the gradients of the first in one row."""
    config = PretrainConfig(**({**TINY, "precision": precision, "data": "-"} | changes))
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).train()
    optimizer, guard = make_optimizer(model, config, 1e-3), Guard(torch.device("cpu"), 5, 0)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(16, 3, 4, 6, generator=generator)
    images = (torch.nn.functional.interpolate(coarse, (16, 24), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    losses, first = [], torch.empty(0)
    for step in range(count):
        loss = part_loss(model, config, images, model.draw_masks(range(16), seed=config.seed, epoch=step))
        backward(loss)
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        guarded_update(model, optimizer, guard, step, None)
        losses.append(float(loss.detach()))
    return losses, first


@pytest.mark.parametrize("change", [{}, {"target": "pixels"}, {"decoder": "cross"}], ids=str)
def test_bf16_agrees_with_float32(change: dict[str, Any]) -> None:
    whole, gradients = steps("fp32", 30, **change)
    half, rough = steps("bf16", 30, **change)
    assert half != whole, "nothing was computed in bfloat16"
    assert abs(half[0] - whole[0]) < LOSS * whole[0]
    assert float((rough - gradients).norm() / gradients.norm()) < GRADIENT
    assert whole[-1] < 0.97 * whole[0], "nothing was learned"
    assert abs(half[-1] - whole[-1]) < AFTER * whole[-1]
