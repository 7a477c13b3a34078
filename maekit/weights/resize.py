"""Weights brought to another input size, patch size or number of channels, each step with a sentence that says so.

Rules. Positions: bicubic with antialiasing on their 2-D grid, prefix tokens untouched (timm). Patch size: the
pseudo-inverse of the pixels' resize (FlexiViT, arXiv 2212.08013; timm). Channels: to one, the sum over the old ones; to
more or fewer, repeated in order and scaled by old / new (timm); mean and deviation follow their channels. The
decoder's prediction layer cannot follow a new patch size or number of channels: it starts anew, which is `missing`. Nor
can a flat decoder follow a new grid, since its weights belong to places: all of it starts anew.

Shapes: L positions (T prefix tokens and the patches of a grid), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from maekit.config import ModelConfig, UserError
from maekit.weights.layouts import State
from maekit.weights.passport import Passport, size_problems

KERNEL = "encoder.patch_embed.proj.weight"
TABLES = ("encoder.pos_embed", "decoder.pos_embed")
PREDICTION = ("decoder.pred.weight", "decoder.pred.bias")


def resize_positions(table_1LD: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """A position table [1, T + gh*gw, D] for another grid; rows before the grid's are kept. Both grids are H x W."""
    num_prefix = table_1LD.shape[1] - old_hw[0] * old_hw[1]
    assert num_prefix >= 0, (table_1LD.shape, old_hw)
    if old_hw == new_hw:
        return table_1LD
    resized: Tensor = resample_abs_pos_embed(table_1LD, list(new_hw), list(old_hw), num_prefix_tokens=num_prefix)
    return resized


def resize_kernel(weight_DCpp: Tensor, patch_size: int) -> Tensor:
    """The patch embedding's kernel for another patch size: on images resized alike, the tokens stay the same."""
    resized: Tensor = resample_patch_embed(weight_DCpp, [patch_size, patch_size])
    return resized


def adapt_channels(weight_DCpp: Tensor, in_chans: int) -> Tensor:
    """The patch embedding's kernel for another number of channels."""
    adapted: Tensor = adapt_input_conv(in_chans, weight_DCpp, base_chans=weight_DCpp.shape[1])
    return adapted


def channel_values(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Mean or deviation of the channels that `adapt_channels` makes: the average for one, else repeated in order."""
    if in_chans == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(in_chans))


def adapt(
    state: State, passport: Passport, *, img_size: tuple[int, ...] | None, patch_size: int | None, in_chans: int | None,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
) -> tuple[State, Passport, list[str], list[str]]:  # fmt: skip
    """Weights and passport at the wanted sizes, a sentence for each change, and our names of what must start anew.

    Raises:
        UserError: sizes that do not fit each other.
    """
    old = passport.model
    assert old.patch_size is not None
    new = dataclasses.replace(
        old,
        img_size=img_size or old.img_size,
        patch_size=patch_size or old.patch_size,
        in_chans=in_chans or old.in_chans,
    )
    if new == old:
        return state, passport, [], []
    _check(new)
    assert new.patch_size is not None
    said: list[str] = []
    anew: list[str] = []
    state = dict(state)
    grid = (new.size_hw[0] // new.patch_size, new.size_hw[1] // new.patch_size)
    if grid != passport.grid:
        for name in TABLES:
            if name in state:
                state[name] = resize_positions(state[name], passport.grid, grid)
        said.append(f"positions {by(passport.grid)} -> {by(grid)} (bicubic)")
    if new.patch_size != old.patch_size:
        state[KERNEL] = resize_kernel(state[KERNEL], new.patch_size)
        said.append(f"patch embedding {old.patch_size} -> {new.patch_size} px (pseudo-inverse)")
    changes: dict[str, Any] = {"model": new, "grid": grid}
    if new.in_chans != old.in_chans:
        state[KERNEL] = adapt_channels(state[KERNEL], new.in_chans)
        how = "summed" if new.in_chans == 1 else f"repeated, scaled by {old.in_chans}/{new.in_chans}"
        said.append(f"channels {old.in_chans} -> {new.in_chans} ({how})")
        for name, said_values, own in (("mean", mean, passport.mean), ("std", std, passport.std)):
            is_new = (
                said_values is not None and len(said_values) == new.in_chans
            )  # else it spoke of the file's channels
            changes[name] = said_values if is_new else channel_values(own, new.in_chans)
    if new.patch_size != old.patch_size or new.in_chans != old.in_chans:
        anew = [name for name in PREDICTION if state.pop(name, None) is not None]
    if old.decoder == "flat":
        anew += [name for name in list(state) if name.startswith("decoder.") and state.pop(name) is not None]
    state = {name: value.contiguous() for name, value in state.items()}
    return state, dataclasses.replace(passport, **changes), said, anew


def _check(config: ModelConfig) -> None:
    """Refuse sizes that no model can have, before anything of that size is made."""
    assert config.patch_size is not None
    if not 1 <= len(config.img_size) <= 2:
        raise UserError(f"--img-size {' '.join(map(str, config.img_size))}: one number, or height and width")
    problems = [
        f"--{name} {value}: must be positive"
        for name, value in (
            ("img-size", min(config.size_hw)), ("patch-size", config.patch_size), ("in-chans", config.in_chans)
        )
        if value < 1
    ]  # fmt: skip
    problems = problems or size_problems(config)
    if not problems and any(side % config.patch_size for side in config.size_hw):
        problems = [
            f"--img-size {' '.join(map(str, config.img_size))} is not divisible by --patch-size {config.patch_size}"
        ]
    if problems:
        raise UserError(*problems)


def by(grid_hw: tuple[int, int]) -> str:
    """A grid as it is read aloud."""
    return f"{grid_hw[0]} x {grid_hw[1]}"


def same_table(table_1LD: Tensor, expected_1LD: Tensor) -> bool:
    """Whether a table is the expected one, up to the rounding of whoever computed it in float32 or half precision."""
    return table_1LD.shape == expected_1LD.shape and torch.allclose(table_1LD.float(), expected_1LD, atol=2e-3)
