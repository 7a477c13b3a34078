"""Models from and to disk. What a file is comes from its passport, never from a guess."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from maekit.config import ModelConfig, UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import Passport

WEIGHTS_FILE = "model.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> MaskedAutoencoder:
    """A masked autoencoder from a run's folder, a maekit .safetensors file, or `random:MODEL`.

    The model is in evaluation mode; its passport is `model.passport`.

    Raises:
        UserError: no such file, a file of another kind, or weights that do not fit their passport.
    """
    text = os.fspath(source)
    if text.startswith("random:"):
        return random_model(ModelConfig(model=text.removeprefix("random:"))).to(device)
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / WEIGHTS_FILE
        if not path.exists():
            raise UserError(f"{text}: not a run: no {WEIGHTS_FILE} in this folder")
    if not path.exists():
        raise UserError(f"{text}: no such run or file (a run's folder, a .safetensors file, or random:MODEL)")
    passport = read_passport(path)
    if passport.kind != "mae":
        raise UserError(f"{path}: holds a {passport.kind!r}, not a masked autoencoder")
    with torch.device("meta"):
        model = MaskedAutoencoder(passport.model, passport.mean, passport.std)
    tensors = load_file(path, device="cpu")
    check_names(model, tensors, str(path))
    model.load_state_dict(tensors, assign=True)
    # Buffers are no part of the state: they are in the passport.
    for name, values in (("mean", passport.mean), ("std", passport.std)):
        setattr(model, name, torch.tensor(values).view(1, -1, 1, 1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_fixed(name, passport.model))
    model.passport = passport
    return model.to(device).eval()


def is_fixed(name: str, config: ModelConfig) -> bool:
    """Whether a parameter is a constant: the sine-cosine positions."""
    return name == "decoder.pos_embed" or (name == "encoder.pos_embed" and config.pos_embed == "sincos")


def read_passport(path: Path) -> Passport:
    """The passport in a safetensors header; the weights are not read.

    Raises:
        UserError: not a safetensors file, or one without a passport.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return Passport.from_metadata(metadata, str(path))


def check_names(model: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Refuse weights that are missing, unknown or of another shape: nothing stays at its initial value in silence."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = [f"{source}: {name} is missing" for name in own.keys() - tensors.keys()]
    found += [f"{source}: {name} is unknown" for name in tensors.keys() - own.keys()]
    found += [
        f"{source}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in own.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if found:
        raise UserError(*sorted(found)[:8], *([f"... and {len(found) - 8} more"] if len(found) > 8 else []))


def random_model(
    config: ModelConfig, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, seed: int = 0
) -> MaskedAutoencoder:
    """A model with the paper's random initialisation, in evaluation mode: the floor that training must beat."""
    mean = mean or (IMAGENET_MEAN if config.in_chans == 3 else (0.5,) * config.in_chans)
    std = std or (IMAGENET_STD if config.in_chans == 3 else (0.25,) * config.in_chans)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(config, mean, std)
    model.passport = Passport(model=model.config, mean=mean, std=std, kind="mae", grid=model.grid_hw, recipe="random")
    return model.eval()
