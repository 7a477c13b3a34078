"""Segmenters from weights: an encoder of any source under a new head, or a trained segmenter from its own file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer

from maekit.config import UserError
from maekit.config.segmentation import HeadConfig
from maekit.models.encoder import EPS, build_encoder, set_eps
from maekit.models.mae import MaskedAutoencoder
from maekit.models.segmentation import Segmenter
from maekit.weights.files import is_pickle, one_line, open_once
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.resize import resize_positions
from maekit.weights.sources import read_passport
from maekit.weights.store import check_names

KIND = "segmenter"
HEADS = ("upernet", "fpn", "linear")


def dense_encoder(model: MaskedAutoencoder, size_hw: tuple[int, int], drop_path: float) -> VisionTransformer:
    """A copy of a loaded model's encoder for images of another size, with stochastic depth; positions are resized.

    Raises:
        UserError: a side that is no multiple of the patch.
    """
    patch = model.patch_size
    if any(side % patch for side in size_hw):
        nearest = " ".join(str(max(1, round(side / patch)) * patch) for side in dict.fromkeys(size_hw))
        given = " ".join(map(str, dict.fromkeys(size_hw)))
        raise UserError(f"--crop {given}: not a multiple of the patch of {patch} px: take --crop {nearest}")
    encoder = build_encoder(dataclasses.replace(model.config, img_size=size_hw, drop_path=drop_path))
    state = dict(model.encoder.state_dict())
    grid = (size_hw[0] // patch, size_hw[1] // patch)
    state["pos_embed"] = resize_positions(state["pos_embed"], model.grid_hw, grid)
    encoder.load_state_dict(state)
    passport = model.passport
    set_eps(encoder, EPS if passport is None else passport.eps)
    return encoder


def is_segmenter(path: Path) -> bool:
    """Whether a file of weights says that it is a segmenter; a file that says nothing is none."""
    try:
        return read_passport(path).kind == KIND
    except UserError:
        return False


def head_facts(model: Segmenter) -> HeadFacts:
    """What the passport says of a segmenter's head."""
    width = 0 if model.head_config.kind == "linear" else model.head_config.width
    return HeadFacts(kind=model.head_config.kind, width=width, blocks=model.block_ids)


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> tuple[Segmenter, Passport]:
    """A trained segmenter in evaluation mode, and its passport; the auxiliary head is left out.

    Raises:
        UserError: no such file, no segmenter, or tensors that are not those that its passport speaks of.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; maekit segment writes it into the folder of its run")
    if is_pickle(path):
        raise UserError(f"{path}: looks like a pickle (torch.save), not a .safetensors file with a passport")
    try:
        with open_once(path) as file:
            passport = Passport.from_metadata(file.metadata(), str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("auxiliary.")}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    if passport.kind != KIND:
        raise UserError(f"{path}: holds a {passport.kind!r}, not a segmenter: train one with maekit segment")
    fuse = tensors["head.fuse.0.weight"].shape[-1] if "head.fuse.0.weight" in tensors else 3
    model = _empty(passport, fuse, str(path))
    check_names(model, tensors, str(path), any_type=True)
    model.load_state_dict(tensors, assign=True)
    for name, values in (("mean", passport.mean), ("std", passport.std)):
        setattr(model, name, torch.tensor(values).view(1, -1, 1, 1))
    set_eps(model.encoder, passport.eps)
    model.head.to(memory_format=torch.channels_last)
    return model.to(device).eval(), passport


def _empty(passport: Passport, fuse_kernel: int, source: str) -> Segmenter:
    """The model that a passport speaks of, on the meta device: no memory, whatever it claims."""
    facts = passport.head
    if facts.kind not in HEADS or not passport.classes or (facts.kind != "linear" and not facts.width):
        raise UserError(
            f"{source}, passport: a segmenter with the head {facts.kind!r} and {len(passport.classes)} classes"
        )
    kind: Any = facts.kind
    blocks = tuple(block + 1 for block in facts.blocks) or None
    with torch.device("meta"):
        encoder = build_encoder(passport.model)
        head = HeadConfig(kind, facts.width, blocks, fuse_kernel=1 if fuse_kernel == 1 else 3)
        return Segmenter(encoder, head, len(passport.classes), passport.mean, passport.std)
