"""Models from and to disk. What a file is comes from its passport, never from a guess."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from maekit.config import ModelConfig, UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import Passport

WEIGHTS_FILE = "model.safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
"""Suffixes of what torch.save and its kin write."""
MAX_HEADER_BYTES = 32 << 20
"""A larger safetensors header is refused; ViT-H has 60 kB."""
_PICKLE_MAGICS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
Shapes = dict[str, tuple[int, ...]]
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
    passport, tensors = _read_checked(path)
    try:
        with torch.device("meta"):
            model = MaskedAutoencoder(passport.model, passport.mean, passport.std)
    except UserError as error:
        raise UserError(*(f"{path}, passport: {problem}" for problem in error.problems)) from None
    check_names(model, tensors, str(path))
    model.load_state_dict(tensors, assign=True)
    # Buffers are no part of the state: they are in the passport.
    for name, values in (("mean", passport.mean), ("std", passport.std)):
        setattr(model, name, torch.tensor(values).view(1, -1, 1, 1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_fixed(name, passport.model))
    model.passport = passport
    return model.to(device).eval()


def _read_checked(path: Path) -> tuple[Passport, dict[str, torch.Tensor]]:
    """Passport and weights from one handle, since a run that trains may replace the file between two openings."""
    refuse_others(path)
    try:
        with open_once(path) as file:
            passport, shapes = _header(file, path)
            if passport.kind != "mae":
                raise UserError(f"{path}: holds a {passport.kind!r}, not a masked autoencoder")
            check_claims(passport, shapes, str(path))
            return passport, {name: file.get_tensor(name) for name in file.keys()}
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


@contextlib.contextmanager
def open_once(path: Path) -> Iterator[Any]:
    """A safetensors file for reading, which a run that trains may replace meanwhile: header and data are of one file.

    safetensors opens a file by its name twice, for the header and for the data; the name of an open handle always
    leads to the same file. Systems without such names do not let an open file be replaced.
    """
    with path.open("rb") as handle:
        same = Path(f"/dev/fd/{handle.fileno()}")
        with safe_open(same if same.exists() else path, framework="pt") as file:
            yield file


def _header(file: Any, path: Path) -> tuple[Passport, Shapes]:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return Passport.from_metadata(file.metadata(), str(path)), shapes


def is_fixed(name: str, config: ModelConfig) -> bool:
    """Whether a parameter is a constant: the sine-cosine positions."""
    return name == "decoder.pos_embed" or (name == "encoder.pos_embed" and config.pos_embed == "sincos")


def read_passport(path: Path) -> Passport:
    """The passport in a safetensors header; the weights are not read.

    Raises:
        UserError: not a safetensors file, or one without a passport.
    """
    return read_header(path)[0]


def read_header(path: Path) -> tuple[Passport, Shapes]:
    """The passport, and the shape of each tensor; the weights are not read, so this costs the same for any size.

    Raises:
        UserError: not a safetensors file, or one without a passport, or with one that cannot be true.
    """
    refuse_others(path)
    try:
        with open_once(path) as file:
            return _header(file, path)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


def refuse_others(path: Path) -> None:
    """Refuse by its first bytes what is no safetensors file; nothing is unpickled to find out, and no pipe is opened.

    Raises:
        UserError: a pickle, not a plain file, or a header that is too large.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a plain file")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header = int.from_bytes(head[:8], "little")
    if path.suffix.lower() in PICKLES or (head.startswith(_PICKLE_MAGICS) and head[8:] != b"{"):
        raise UserError(
            f"{path}: looks like a pickle (torch.save), which can run code when it is read; maekit reads .safetensors"
        )
    if len(head) == 9 and header > MAX_HEADER_BYTES:
        raise UserError(f"{path}: not a readable safetensors file (a header of {header:,} bytes)")


def check_claims(passport: Passport, shapes: Shapes, source: str) -> None:
    """Refuse a passport whose sizes are not those of the tensors beside it, before a model of those sizes is built.

    safetensors has checked that the file is as long as its tensors, so what is built is bounded by the file's size.
    """
    config = passport.model
    claims: dict[str, tuple[Any, Any]] = {
        f"--{room}depth": (claimed, sum(name.endswith(".norm1.weight") and name.startswith(prefix) for name in shapes))
        for room, claimed, prefix in (
            ("", config.depth, "encoder.blocks."), ("decoder-", config.decoder_depth, "decoder.blocks."),
        )
    }  # fmt: skip
    patch = shapes.get("encoder.patch_embed.proj.weight", ())
    claims["--decoder-dim"] = (config.decoder_dim, math.prod(shapes.get("decoder.mask_token", (0,))))
    if config.patch_size is not None and config.embed_dim is not None:
        kernel = (config.embed_dim, config.in_chans, config.patch_size, config.patch_size)
        claims["--embed-dim, --in-chans, --patch-size"] = (kernel, patch)
        grid = tuple(side // config.patch_size for side in config.size_hw)
        places = shapes.get("decoder.pos_embed", (0, 0))[1:2]
        if not places or not math.prod(grid) <= places[0] <= math.prod(grid) + 1 + (config.reg_tokens or 0):
            raise UserError(
                f"{source}, passport: {grid[0]} x {grid[1]} patches, but the weights have {places} positions"
            )
    found = [
        f"{source}, passport: {flag} {claimed}, but the weights have {held}"
        for flag, (claimed, held) in claims.items()
        if claimed is not None and held != claimed
    ]
    if found:
        raise UserError(*found)


def one_line(error: Exception) -> str:
    """A library's message, short and on one line."""
    return " ".join(str(error).split())[:300]


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
    found += [
        f"{source}: {name} has type {str(value.dtype).removeprefix('torch.')}, expected float32"
        for name, value in tensors.items()
        if value.dtype != torch.float32
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
