"""Weights written as one safetensors file whose header says what they are."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from maekit.config import UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import Passport


def save(
    model: nn.Module, path: str | os.PathLike[str], *, epochs: float | None = None, data: str = "", license: str = ""
) -> None:
    """Write a model that a loop of one's own has trained; every command then takes the file as a source of weights.

    model: as it was trained, or wrapped by `torch.compile` or for several devices; numbers of half precision are
    written as float32. path: NAME.safetensors; folders are made, and a file that is there is replaced. epochs: passes
    over the data, of which there were more where the model was loaded; data: its name; license: of the weights. What
    is not said stays as in the file that the model was loaded from.

    Raises:
        UserError: a path of another suffix or that cannot be written, facts that no file can hold, or a model that is
            neither a `MaskedAutoencoder` nor one that was loaded.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are written as NAME.safetensors")
    model = _unwrapped(model)
    passport: Passport | None = getattr(model, "passport", None)
    if passport is None:
        if not isinstance(model, MaskedAutoencoder):
            raise UserError(f"a {type(model).__name__} without a passport: save a MaskedAutoencoder, or what load gave")
        mean, std = (tuple(values.flatten().tolist()) for values in (model.mean, model.std))
        passport = Passport(model=model.config, mean=mean, std=std, grid=model.grid_hw)
    said: dict[str, Any] = {"epochs": epochs, "data": data or None, "weights_license": license or None}
    passport = dataclasses.replace(passport, **{name: value for name, value in said.items() if value is not None})
    try:
        passport.epochs = float(passport.epochs)
    except (TypeError, ValueError):
        raise UserError(f"epochs={epochs!r}: must be a number") from None
    if not 0 <= passport.epochs < math.inf:
        raise UserError(f"epochs={epochs!r}: must not be negative, and finite")
    if problems := passport.problems():
        raise UserError(*problems)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(path, model, passport)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers, whose prefixes would stand before the names of its weights."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def write_weights(path: Path, model: nn.Module, passport: Passport) -> None:
    """Write weights with their passport; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: _written(value) for name, value in model.state_dict().items()}
    temporary.write_bytes(to_bytes(tensors, passport.to_metadata()))  # save_file would let only the owner read it
    temporary.replace(path)


def _written(value: Tensor) -> Tensor:
    """A tensor as the file holds it, in memory of its own."""
    precise = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", precise, copy=True).contiguous()
