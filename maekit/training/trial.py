"""Training steps for their own sake: what `maekit plan` and the benchmarks time. Nothing is logged or saved.

The pieces are those of `tasks/pretrain.py`, called in its order. Left out: the schedule, and what happens between two
steps. The learning rate is that of a warm-up's beginning, so that no weight runs away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maekit.compiling import compile_or_eager
from maekit.config import PretrainConfig
from maekit.data.loader import Ids
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks
from maekit.seeding import seed_everything
from maekit.training.guard import Guard, backward, guarded_update
from maekit.training.optim import make_optimizer, peak_learning_rate
from maekit.training.replayed import Replayed
from maekit.training.step import masks_ahead, part_loss, whole_step

_FIRST_LR = 1e-3
"""The learning rate as a share of the peak."""
_STATES = 4
"""Weights, gradients and AdamW's two moments."""


class Trial:
    """A model with its optimiser, ready to step on the device. Shapes: images [B, C, H, W] uint8, sample ids [B]."""

    def __init__(self, config: PretrainConfig, device: torch.device, *, precision: str, fused_attention: bool) -> None:
        seed_everything(config.seed)
        chosen: dict[str, Any] = {"precision": precision}
        self.config, self.device = dataclasses.replace(config, **chosen), device
        middle = (0.5,) * config.in_chans  # the statistics have no say in the time
        self.model = MaskedAutoencoder(config, config.mean or middle, config.std or middle).to(device).train()
        use_fused_attention(self.model, fused_attention)
        self.model.set_grad_checkpointing(config.grad_checkpoint)
        self.optimizer = make_optimizer(self.model, config, _FIRST_LR * peak_learning_rate(config)[0])
        self.guard = Guard(device, config.max_bad_steps)
        self.forward: Callable[..., Any] = self.model.__call__
        self.replayed: Replayed | None = None
        self.steps = 0

    def compile(self, how: str, report: Callable[[str], None]) -> None:
        """Compile the forward pass from here on, and record whole steps where `how` says so."""
        self.forward = compile_or_eager(self.model, how, report)
        if how == "graphs" and self.device.type == "cuda":
            step = whole_step(self.model, self.config, self.optimizer, self.guard, self.forward)
            self.replayed = Replayed(step, self.optimizer, report)

    def images(self, batch: int) -> tuple[Tensor, Ids]:
        """Noise of the model's size on the device, with sample ids."""
        shape = (batch, self.config.in_chans, *self.config.size_hw)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return noise, np.arange(batch, dtype=np.int64)

    def loss(self, images_BCHW: Tensor, sample_ids: Ids) -> Tensor:
        """The training loss of a batch, with its own masks."""
        return part_loss(self.model, self.config, images_BCHW, self.masks(sample_ids), self.forward)

    def masks(self, sample_ids: Ids) -> Masks:
        """The masks of this step."""
        return next(masks_ahead(self.model, self.config, [(self.steps, sample_ids)], self.device))

    def gradients(self, images_BCHW: Tensor, sample_ids: Ids) -> None:
        """Forward and backward: all that is done again for each accumulated part of a batch."""
        backward(self.loss(images_BCHW, sample_ids) / self.config.accum)

    def update(self) -> None:
        """What is done once a step: norm, guard, AdamW, gradients dropped."""
        guarded_update(self.model, self.optimizer, self.guard, self.steps, self.config.clip_grad)
        if self.device.type == "cpu":
            self.guard.look()
        self.steps += 1

    def step(self, images_BCHW: Tensor, sample_ids: Ids, masks: Masks | None = None) -> None:
        """One whole training step, under these masks or those of the samples."""
        masks = masks or self.masks(sample_ids)
        if self.replayed is None:
            backward(part_loss(self.model, self.config, images_BCHW, masks, self.forward))
            self.update()
            return
        _, verdict = self.replayed(images_BCHW, masks.ids_keep_BV, masks.ids_masked_BM)
        self.guard.note(self.steps, verdict.clone())
        self.steps += 1

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and moments."""
        return state_bytes(self.model)

    def saved_bytes(self, batch: int) -> int:
        """Bytes that a forward pass of so many images keeps for the backward pass, each storage counted once."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss(*self.images(batch))
        return sum(kept.values())


def state_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights, with gradients and AdamW's moments for those that are trained."""
    return sum(p.numel() * p.element_size() * (_STATES if p.requires_grad else 1) for p in model.parameters())
