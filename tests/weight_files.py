"""Weight files as other programs write them, by key lists written out here by hand: independent of maekit's tables.

The model: width 32, 2 blocks, 4 heads, patch 4, 3 channels, a grid of 4 x 4 with a class token; decoder 16 wide,
2 blocks, 2 heads.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import sincos_loops
from safetensors.torch import save_file
from torch import Tensor

D, E, PATCH, GRID = 32, 16, 4, (4, 4)
SAID: dict[str, Any] = {
    "num_heads": 4, "decoder_heads": 2, "target": "pixels", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)
}  # fmt: skip
"""What these sizes do not tell; ImageNet's statistics are known for the official layout and then left away."""
ENCODER_SAID = {key: SAID[key] for key in ("num_heads", "mean", "std")}
WHOLE = ("official", "hf", "hf5", "hf5-saved", "mmpretrain", "lightly")
"""Layouts whose decoder is ours."""
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def said_for(name: str) -> dict[str, Any]:
    """What must be said of a tiny file of this layout."""
    said = dict(SAID if name in WHOLE else ENCODER_SAID)
    if name in ("official", "crossmae"):
        said |= {"mean": None, "std": None}
    return said


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Section by section what timm calls the tensors of one block."""
    return {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    """The encoder-only file of the official code."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D), "pos_embed": (1, 17, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    for index in range(2):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block_shapes(D).items()}
    return shapes


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    """What its files with a decoder have besides."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, E), "decoder_pos_embed": (1, 17, E),
        "decoder_embed.weight": (E, D), "decoder_embed.bias": (E,),
        "decoder_norm.weight": (E,), "decoder_norm.bias": (E,),
        "decoder_pred.weight": (PATCH * PATCH * 3, E), "decoder_pred.bias": (PATCH * PATCH * 3,),
    }  # fmt: skip
    for index in range(2):
        shapes |= {f"decoder_blocks.{index}.{name}": shape for name, shape in block_shapes(E).items()}
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random numbers of these shapes; position tables are the sine-cosine ones."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for name in state.keys() & {"pos_embed", "decoder_pos_embed"}:
        width = shapes[name][2]
        state[name] = torch.tensor([[0.0] * width, *sincos_loops(width, GRID)]).unsqueeze(0)
    return state


def official_full(seed: int = 0) -> dict[str, Tensor]:
    return random_state(encoder_shapes() | decoder_shapes(), seed)


def official_encoder(seed: int = 0) -> dict[str, Tensor]:
    return random_state(encoder_shapes(), seed)


def expected_names() -> dict[str, str]:
    """The official names and maekit's."""
    special = {
        "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.pos_embed",
        "decoder_embed.weight": "decoder.embed.weight", "decoder_embed.bias": "decoder.embed.bias",
        "decoder_norm.weight": "decoder.norm.weight", "decoder_norm.bias": "decoder.norm.bias",
        "decoder_pred.weight": "decoder.pred.weight", "decoder_pred.bias": "decoder.pred.bias",
    }  # fmt: skip
    for index in range(2):
        special |= {f"decoder_blocks.{index}.{name}": f"decoder.blocks.{index}.{name}" for name in block_shapes(E)}
    return special | {name: f"encoder.{name}" for name in encoder_shapes()}


def hf4(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 4's names, by the rules of its conversion script."""
    found = {}
    for key, value in official.items():
        if "attn.qkv" in key:
            room, index, *_, kind = key.split(".")
            base = "decoder.decoder_layers" if room == "decoder_blocks" else "vit.encoder.layer"
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{base}.{index}.attention.attention.{part}.{kind}"] = rows.clone()
            continue
        name = key
        for old, new in (
            ("cls_token", "vit.embeddings.cls_token"), ("mask_token", "decoder.mask_token"),
            ("decoder_pos_embed", "decoder.decoder_pos_embed"),
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ):  # fmt: skip
            if key.startswith(old):
                name = new + key[len(old) :]
        if key == "pos_embed":
            name = "vit.embeddings.position_embeddings"
        for old, new in (
            ("decoder_blocks", "decoder.decoder_layers"), ("blocks", "vit.encoder.layer"),
        ):  # fmt: skip
            if key.startswith(f"{old}."):
                name = new + key[len(old) :]
                for inner, theirs in (
                    ("attn.proj", "attention.output.dense"),
                    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                    ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                ):  # fmt: skip
                    name = name.replace(f".{inner}.", f".{theirs}.")
        for kind in ("weight", "bias"):
            name = {f"norm.{kind}": f"vit.layernorm.{kind}"}.get(key, name)
            for part in ("decoder_embed", "decoder_norm", "decoder_pred"):
                name = {f"{part}.{kind}": f"decoder.{part}.{kind}"}.get(key, name)
        found[name] = value
    return found


def hf5_saved(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers 5 writes: only the decoder's blocks are named otherwise."""
    return {
        key.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): value
        for key, value in hf4(official).items()
    }


def hf5(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers 5 has in memory."""
    found = {}
    for key, value in hf4(official).items():
        new = key.replace("vit.encoder.layer.", "vit.layers.")
        for old, part in (("query", "q"), ("key", "k"), ("value", "v")):
            new = new.replace(f".attention.attention.{old}.", f".attention.{part}_proj.")
        new = new.replace(".attention.output.dense.", ".attention.o_proj.")
        new = new.replace(".intermediate.dense.", ".mlp.fc1.").replace(".output.dense.", ".mlp.fc2.")
        found[new] = value
    return found


def mmpretrain(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmpretrain's names: ln1 is a block's first norm, and also the last norm of encoder and decoder."""
    found = {}
    for key, value in official.items():
        new = key
        for old, theirs in (
            ("norm1", "ln1"), ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")
        ):  # fmt: skip
            new = new.replace(f".{old}.", f".{theirs}.")
        if new.startswith("blocks."):
            new = f"backbone.layers.{new[len('blocks.') :]}"
        elif new.startswith("norm."):
            new = f"backbone.ln1.{new[len('norm.') :]}"
        elif new.startswith("patch_embed.proj."):
            new = f"backbone.patch_embed.projection.{new[len('patch_embed.proj.') :]}"
        elif new in ("cls_token", "pos_embed"):
            new = f"backbone.{new}"
        elif new.startswith("decoder_norm."):
            new = f"neck.ln1.{new[len('decoder_norm.') :]}"
        else:
            new = f"neck.{new}"
        found[new] = value
    return found


def below(official: dict[str, Tensor], encoder: str, decoder: str) -> dict[str, Tensor]:
    """timm's names below a prefix, and the official decoder's below another."""
    inside = ("decoder", "mask_token")
    return {(decoder if key.startswith(inside) else encoder) + key: value for key, value in official.items()}


def lightly(official: dict[str, Tensor]) -> dict[str, Tensor]:
    return below(official, "backbone.vit.", "decoder.") | {"backbone.mask_token": torch.zeros(1, 1, D)}


def solo_learn(official: dict[str, Tensor]) -> dict[str, Tensor]:
    found = below(official, "backbone.", "decoder.")
    return found | {"classifier.weight": torch.zeros(10, D), "classifier.bias": torch.zeros(10)}


def stable_pretraining(official: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {f"encoder.vit.{key}": official[key] for key in encoder_shapes()}
    return found | {"decoder.mask_token": torch.zeros(1, 1, D), "decoder.transformer.blocks.0.x": torch.zeros(3)}


def adventures(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """PyTorch-Adventures: positions of one dimension, a decoder without a class token."""
    names = {"cls_token": "enc_cls_token", "pos_embed": "enc_pos_embed"}
    found = {}
    for key in encoder_shapes():
        new = names.get(key, key)
        for old, theirs in (("norm.", "encoder_layer_norm."), ("blocks.", "encoder_blocks.")):
            new = theirs + new[len(old) :] if new.startswith(old) else new
        found[f"encoder.{new}"] = official[key]
    found["encoder.enc_pos_embed"] = one_dimensional(17, D)
    return found | {
        "decoder.mask_token": torch.zeros(1, 1, E), "decoder.dec_pos_embed": torch.zeros(1, 16, E),
        "decoder.encoder2decoder_embbedding_proj.weight": torch.zeros(E, D), "embed2image.weight": torch.zeros(48, E),
    }  # fmt: skip


def one_dimensional(count: int, width: int) -> Tensor:
    """Sine-cosine positions of a sequence, interleaved."""
    place = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([place.sin(), place.cos()], dim=2).flatten(1).unsqueeze(0)


def crossmae(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """CrossMAE's pretraining: no final norm, cross-attention in the decoder, weighted feature maps."""
    found = {key: official[key] for key in encoder_shapes() if not key.startswith("norm.")}
    found |= {key: official[key] for key in ("mask_token", "decoder_pos_embed", "decoder_pred.weight")}
    return found | {
        "decoder_blocks.0.cross_attn.q.weight": torch.zeros(E, E),
        "decoder_blocks.0.cross_attn.kv.weight": torch.zeros(32, D),
        "wfm.linear.weight": torch.zeros(2, 3), "dec_norms.0.weight": torch.zeros(D),
    }  # fmt: skip


def save_pth(state: dict[str, Tensor], path: Path, **beside: Any) -> Path:
    """A file as the official code writes it; `args` become an argparse.Namespace."""
    if "args" in beside:
        beside["args"] = argparse.Namespace(**beside["args"])
    torch.save({"model": state, **beside}, path)
    return path


def save_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
