"""Weights written as one safetensors file whose header says what they are."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import nn

from maekit.config import UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import Passport


def save(
    model: nn.Module, path: str | os.PathLike[str], *, epochs: float | None = None, data: str = "", license: str = ""
) -> None:
    """Write a model that a loop of one's own has trained; every command then takes the file as a source of weights.

    path: NAME.safetensors; a file that is there is replaced. epochs: passes over the data, of which there were more
    where the model was loaded; data: its name; license: of the weights. What is not said stays as in the file that the
    model was loaded from.

    Raises:
        UserError: a path of another suffix, or a model that is neither a `MaskedAutoencoder` nor one that was loaded.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are written as NAME.safetensors")
    passport: Passport | None = getattr(model, "passport", None)
    if passport is None:
        if not isinstance(model, MaskedAutoencoder):
            raise UserError(f"a {type(model).__name__} without a passport: save a MaskedAutoencoder, or what load gave")
        mean, std = (tuple(values.flatten().tolist()) for values in (model.mean, model.std))
        passport = Passport(model=model.config, mean=mean, std=std, grid=model.grid_hw)
    said: dict[str, Any] = {"epochs": epochs, "data": data or None, "weights_license": license or None}
    passport = dataclasses.replace(passport, **{name: value for name, value in said.items() if value is not None})
    write_weights(path, model, passport)


def write_weights(path: Path, model: nn.Module, passport: Passport) -> None:
    """Write weights with their passport; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    temporary.write_bytes(to_bytes(tensors, passport.to_metadata()))  # save_file would let only the owner read it
    temporary.replace(path)
