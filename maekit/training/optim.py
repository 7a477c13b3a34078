"""The optimiser as the paper sets it: AdamW, weight decay by kind of parameter, linear warm-up, then a cosine."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from maekit.config import PretrainConfig

TOKENS = ("encoder.cls_token", "encoder.reg_token", "encoder.pos_embed", "decoder.mask_token", "decoder.mix")
"""Parameters of more than one dimension that weight decay leaves alone."""


def make_optimizer(model: nn.Module, config: PretrainConfig, peak_lr: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with weight decay on matrices only: none on biases, normalisations and tokens (table 8)."""
    by_decay = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=TOKENS)
    encoder = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("encoder.")}
    groups = [
        {**group, "params": some, "encoder": of_encoder}
        for group in by_decay
        for of_encoder in (True, False)
        if (some := [parameter for parameter in group["params"] if (id(parameter) in encoder) == of_encoder])
    ]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=peak_lr, betas=config.betas, eps=config.adam_eps, fused=fused)


def peak_learning_rate(config: PretrainConfig) -> tuple[float, str]:
    """The highest learning rate, and the arithmetic that gave it.

    The linear rule of arXiv 1706.02677, in which a batch counts by its predictions: with a predicted share the rate
    shrinks by share / mask ratio (CrossMAE, arXiv 2401.14391).
    """
    if config.lr is not None:
        return config.lr, f"{config.lr:g} (--lr)"
    lr = config.blr * config.batch_size / 256
    reason = f"{config.blr:g} x {config.batch_size} / 256"
    if config.predict_share is not None:
        lr *= config.predict_share / config.mask_ratio
        reason += f" x {config.predict_share:g} / {config.mask_ratio:g} (predicted share / mask ratio)"
    return lr, f"{lr:.3g} = {reason}"


def learning_rate(step: int, total: int, warmup: int, peak: float, lowest: float, start: int = 0) -> float:
    """The learning rate of a step (0-based): linear from 0 over the warm-up, then half a cosine down to `lowest`.

    start: where the cosine begins anew after a run was lengthened; a warm-up that is not over goes on first.
    """
    if step < warmup:
        return peak * step / warmup
    begin = max(start, warmup)
    done = min(1.0, (step - begin) / max(1, total - begin))
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, encoder_waits: bool = False) -> None:
    """Give every group the same rate, or the encoder's none: no update and no decay, on all processes alike."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if encoder_waits and group["encoder"] else lr


def duration_steps(epochs: float | None, steps: int | None, steps_per_epoch: int) -> int:
    """A duration given in one of two units, in optimiser steps (at least one where it is not zero; zero for none)."""
    if steps is not None:
        return steps
    if epochs is None:
        return 0
    return max(1, round(epochs * steps_per_epoch)) if epochs > 0 else 0
