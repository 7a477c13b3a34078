"""Key names of every known layout, and renaming from and to ours: one small table a layout, read in both directions.

Ours are timm's names below `encoder.`, and `decoder.{embed,mask_token,pos_embed,blocks,norm,pred}` with timm's blocks.
A table's line is (their name, our name); one that ends in a dot stands for everything below it. Their blocks' names
are timm's where no table says otherwise. Values stay as they are, but for query, key and value, which some layouts
keep as three layers and timm as the rows of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from maekit.config import UserError

State = dict[str, Tensor]
_BLOCK = re.compile(r"(\d{1,4})\.(.+)")
_ROOMS = {"encoder.blocks.": "encoder_blocks", "decoder.blocks.": "decoder_blocks"}


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a masked autoencoder."""

    name: str
    what: str
    """Who writes such files."""
    names: dict[str, str]
    """Their names outside the blocks, and ours."""
    encoder_blocks: str
    """What their names of the encoder's blocks begin with."""
    decoder_blocks: str = ""
    """The same of the decoder; empty where the decoder is another one than ours."""
    block: dict[str, str] = field(default_factory=dict)
    """Their names inside a block, and ours; empty: they are the same."""
    qkv: tuple[str, ...] = ()
    """Their three layers for query, key and value."""
    marks: tuple[str, ...] = ()
    """Beginnings of keys that all must be there, by which the layout is recognised."""
    no_decoder: str = ""
    """Why their decoder is not read."""

    @cached_property
    def _back(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.names.items()}

    @cached_property
    def _block_back(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.block.items()}

    def ours(self, key: str) -> tuple[str, int | None] | None:
        """Our name of one of their keys, and which third of it (None: the whole); None where there is no place."""
        for room, attribute in _ROOMS.items():
            start = getattr(self, attribute)
            if start and key.startswith(start) and (found := _BLOCK.fullmatch(key[len(start) :])):
                index, inner = found.groups()
                for part, layer in enumerate(self.qkv):
                    if inner.startswith(f"{layer}."):
                        return f"{room}{index}.attn.qkv.{inner[len(layer) + 1 :]}", part
                new = _renamed(inner, self.block) if self.block else inner
                return (f"{room}{index}.{new}", None) if new else None
        name = _renamed(key, self.names)
        return (name, None) if name else None

    def theirs(self, key: str) -> list[str]:
        """Their names of one of our keys: three for an attention's qkv that they keep apart; none without a place."""
        for room, attribute in _ROOMS.items():
            if key.startswith(room) and (found := _BLOCK.fullmatch(key[len(room) :])):
                start, (index, inner) = getattr(self, attribute), found.groups()
                if not start:
                    return []
                if self.qkv and inner.startswith("attn.qkv."):
                    return [f"{start}{index}.{layer}.{inner.rsplit('.', 1)[1]}" for layer in self.qkv]
                new = _renamed(inner, self._block_back) if self.block else inner
                return [f"{start}{index}.{new}"] if new else []
        name = _renamed(key, self._back)
        return [name] if name else []

    def to_maekit(self, state: Mapping[str, Tensor]) -> State:
        """Their tensors under our names; those without a place are left out.

        Raises:
            UserError: one of query, key and value is missing, or two keys claim the same name.
        """
        found: State = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, value in state.items():
            place = self.ours(key)
            if place is None:
                continue
            name, part = place
            if name in found or part in parts.get(name, {}):
                raise UserError(f"two tensors of this file are both {name}")
            if part is None:
                found[name] = value
            else:
                parts.setdefault(name, {})[part] = value
        for name, thirds in parts.items():
            if len(thirds) != 3:
                raise UserError(f"{name}: query, key and value are not all there")
            if len({third.shape for third in thirds.values()}) != 1 or not thirds[0].ndim:
                raise UserError(f"{name}: query, key and value have different shapes")
            found[name] = torch.cat([thirds[part] for part in range(3)])
        return found

    def from_maekit(self, state: Mapping[str, Tensor]) -> State:
        """Our tensors under their names; those without a place in this layout are left out."""
        found: State = {}
        for key, value in state.items():
            names = self.theirs(key)
            if len(names) == 3:
                found |= {name: part.clone() for name, part in zip(names, value.chunk(3), strict=True)}
            elif names:
                found[names[0]] = value
        return found


def _renamed(key: str, table: Mapping[str, str]) -> str | None:
    """The new name by the line that fits (no table has two for one key), or None."""
    if key in table:
        return table[key]
    old = next((old for old in table if old.endswith(".") and key.startswith(old)), None)
    return None if old is None else table[old] + key[len(old) :]


def _timm_names(prefix: str = "") -> dict[str, str]:
    """The encoder's names outside its blocks, where they are timm's below a prefix."""
    whole = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.", "norm.")
    return {prefix + name: f"encoder.{name}" for name in whole}


def _decoder_names(prefix: str, norm: str = "decoder_norm.") -> dict[str, str]:
    """The decoder's names outside its blocks, as the official code spells them, below a prefix."""
    return {
        f"{prefix}mask_token": "decoder.mask_token",
        f"{prefix}decoder_embed.": "decoder.embed.",
        f"{prefix}decoder_pos_embed": "decoder.pos_embed",
        f"{prefix}{norm}": "decoder.norm.",
        f"{prefix}decoder_pred.": "decoder.pred.",
    }


_HF_NAMES = {
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "vit.layernorm.": "encoder.norm.",
    **_decoder_names("decoder."),
}
_HF4_BLOCK = {
    "layernorm_before.": "norm1.",
    "attention.output.dense.": "attn.proj.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
_HF5_BLOCK = {
    "layernorm_before.": "norm1.",
    "attention.o_proj.": "attn.proj.",
    "layernorm_after.": "norm2.",
    "mlp.": "mlp.",
}
_HF4_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_HF5_QKV = tuple(f"attention.{part}_proj" for part in "qkv")
_HF_MARK = "vit.embeddings.patch_embeddings.projection.weight"
_MM_BLOCK = {
    "ln1.": "norm1.", "attn.": "attn.", "ln2.": "norm2.", "ffn.layers.0.0.": "mlp.fc1.", "ffn.layers.1.": "mlp.fc2."
}  # fmt: skip
_MM_NAMES = {
    "backbone.cls_token": "encoder.cls_token",
    "backbone.pos_embed": "encoder.pos_embed",
    "backbone.patch_embed.projection.": "encoder.patch_embed.proj.",
    "backbone.ln1.": "encoder.norm.",
    **_decoder_names("neck.", norm="ln1."),
}
_PA_NAMES = {
    "encoder.patch_embed.": "encoder.patch_embed.",
    "encoder.enc_cls_token": "encoder.cls_token",
    "encoder.enc_pos_embed": "encoder.pos_embed",
    "encoder.encoder_layer_norm.": "encoder.norm.",
}
_OURS = {name: name for name in (*_timm_names().values(), "decoder.mask_token", "decoder.pos_embed")} | {
    name: name for name in ("decoder.embed.", "decoder.norm.", "decoder.pred.")
}

_ALL = (
    Layout(
        "maekit", "this program", _OURS, "encoder.blocks.", "decoder.blocks.",
        marks=("encoder.patch_embed.proj.weight", "encoder.blocks.0.norm1.", "encoder.pos_embed"),
    ),
    Layout(
        "pytorch-adventures", "PyTorch-Adventures", _PA_NAMES, "encoder.encoder_blocks.",
        marks=("encoder.enc_pos_embed", "encoder.encoder_blocks."),
        no_decoder="their decoder drops the class token",
    ),
    Layout(
        "stable-pretraining", "stable-pretraining", _timm_names("encoder.vit."), "encoder.vit.blocks.",
        marks=("encoder.vit.patch_embed.proj.weight",),
        no_decoder="their decoder drops the class token and keeps its mask token at another width",
    ),
    Layout(
        "lightly", "lightly", _timm_names("backbone.vit.") | _decoder_names("decoder."), "backbone.vit.blocks.",
        "decoder.decoder_blocks.", marks=("backbone.vit.patch_embed.proj.weight",),
    ),
    Layout(
        "mmpretrain", "mmpretrain", _MM_NAMES, "backbone.layers.", "neck.decoder_blocks.", _MM_BLOCK,
        marks=("backbone.patch_embed.projection.weight", "backbone.layers.0.ln1."),
    ),
    Layout(
        "solo-learn", "solo-learn", _timm_names("backbone."), "backbone.blocks.",
        marks=("backbone.patch_embed.proj.weight", "backbone.blocks.0."),
        no_decoder="their decoder normalises with another epsilon (1e-5)",
    ),
    Layout(
        "hf", "Hugging Face transformers 4", _HF_NAMES, "vit.encoder.layer.", "decoder.decoder_layers.", _HF4_BLOCK,
        _HF4_QKV, (_HF_MARK, "vit.encoder.layer."),
    ),
    Layout(
        "hf5", "Hugging Face transformers 5, as its models are in memory", _HF_NAMES, "vit.layers.",
        "decoder.decoder_layers.", _HF5_BLOCK, _HF5_QKV, (_HF_MARK, "vit.layers."),
    ),
    Layout(
        "hf5-saved", "Hugging Face transformers 5, as it saves", _HF_NAMES, "vit.encoder.layer.",
        "decoder.decoder_encoder.layer.", _HF4_BLOCK, _HF4_QKV, (_HF_MARK, "decoder.decoder_encoder."),
    ),
    Layout(
        "crossmae", "CrossMAE", _timm_names(), "blocks.",
        marks=("patch_embed.proj.weight", "decoder_blocks.0.cross_attn."),
        no_decoder="their decoder is another one: cross-attention over weighted features of all blocks",
    ),
    Layout(
        "official", "facebookresearch/mae", _timm_names() | _decoder_names(""), "blocks.", "decoder_blocks.",
        marks=("patch_embed.proj.weight", "decoder_embed."),
    ),
    Layout("timm", "timm", _timm_names(), "blocks.", marks=("patch_embed.proj.weight", "blocks.0.")),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in _ALL}
"""Every layout by name."""
_ORDER = ["hf5-saved", *(name for name in LAYOUTS if name != "hf5-saved")]
"""Special ones first: what marks `timm` is also in the official files."""


def recognise(keys: Iterable[str]) -> Layout | None:
    """The layout of a file with these keys, or None."""
    names = set(keys)

    def has(mark: str) -> bool:
        return mark in names or any(name.startswith(mark) for name in names)

    return next((LAYOUTS[name] for name in _ORDER if all(has(mark) for mark in LAYOUTS[name].marks)), None)


def bare(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """The state without what wrappers of a model prepend to every key; with what was taken away.

    Encoders that were saved alone by Hugging Face or PyTorch-Adventures get the prefix back that whole models have.
    """
    taken = []
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
            taken.append(prefix)
    for mark, prefix in (("embeddings.patch_embeddings.projection.weight", "vit."), ("enc_pos_embed", "encoder.")):
        if mark in state:
            state = {prefix + key: value for key, value in state.items()}
    return dict(state), taken
