"""Weights of other programs: their tensors under our names, and a passport of what is known about them.

Sizes come from the tensors. What shapes cannot tell comes from the file's own config, from the table of known facts, or
from the user; where none of them says it, it is asked for. Nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from maekit.config import ModelConfig, SourceConfig, UserError
from maekit.models.encoder import EPS, plain_vit, sincos_positions
from maekit.weights import facts
from maekit.weights.files import Raw
from maekit.weights.layouts import LAYOUTS, Layout, State, bare, recognise
from maekit.weights.passport import Passport, size_problems
from maekit.weights.report import KeyReport
from maekit.weights.resize import KERNEL, by, same_table


@dataclass
class Hints:
    """What a config beside the weights says of them; None: nothing."""

    model: str | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    eps: float = EPS
    target: facts.Target | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_pct: float | None = None
    grid: tuple[int, int] | None = None
    mask_ratio: float | None = None
    epochs: float = 0.0
    license: str = facts.UNKNOWN_LICENSE
    data: str = ""
    what: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Material:
    """Weights that are read but not yet a model."""

    passport: Passport
    state: State
    report: KeyReport
    what: str = ""
    """What the file is, in words."""
    needs: list[str] = field(default_factory=list)
    """What must be said before a model can be built, a sentence with its flag each."""
    head: State = field(default_factory=dict)
    """Where labels were learned: what stands on the encoder, in our names."""
    labelled: Passport | None = None
    """The passport of encoder and head together; `passport` speaks of the encoder alone."""


def identify(raw: Raw, source: str, file_name: str, given: SourceConfig, hints: Hints) -> Material:
    """Everything about a foreign file that can be known, and what must be asked.

    Raises:
        UserError: keys of no known layout, shapes of no plain vision transformer, or claims that contradict the file.
    """
    tensors, taken = bare(raw.tensors)
    layout = recognise(tensors)
    if layout is None:
        raise UserError(
            f"{source}: keys of no known layout ({', '.join(list(tensors)[:3])}, ...); known: {', '.join(LAYOUTS)}"
        )
    if layout.name == "maekit":
        raise UserError(f"{source}: no maekit passport in this file's header, so it is not known what it is")
    report = KeyReport(source, layout.name)
    report.notes += [f"prefix {prefix} taken from every key" for prefix in taken] + hints.notes
    tensors = _final_norm(tensors, layout, report)
    state = layout.to_maekit(tensors)
    for key in tensors:
        if (place := layout.ours(key)) is None:
            report.unused.append(key)
        elif place[0] != f"encoder.{key}":
            report.renamed[key] = place[0]
    _to_float32(state, report)
    config = _sizes(state, source)
    known = _known(raw, file_name, hints)
    if layout.name == "timm" and _is_official(state, config, raw, file_name):
        layout = LAYOUTS["official"]
        report.layout = "official"
    needs: list[str] = []
    has_decoder = _decoder(state, config, layout, given, report, tensors)
    config.model = given.model or hints.model or _carrier(layout, config)
    _take_model(config, given, hints, source)
    grid = _positions(state, config, given, hints, report, needs, source)
    _heads(config, layout, has_decoder, given, hints, needs)
    if has_decoder:
        config.target = _said("--target", given.target, known.target or hints.target, source) or config.target
        if not (given.target or known.target or hints.target):
            needs.append("--target pixels or --target norm-pixels: what its decoder was trained to predict")
    if known.mask_ratio is not None and 0 < known.mask_ratio < 1:
        config.mask_ratio = float(known.mask_ratio)
    mean, std = _statistics(config, layout, given, hints, needs)
    if layout.name == "crossmae" and "encoder.norm.weight" not in state and config.embed_dim:
        state["encoder.norm.weight"], state["encoder.norm.bias"] = (
            torch.ones(config.embed_dim), torch.zeros(config.embed_dim)
        )  # fmt: skip
        report.missing += ["encoder.norm.weight", "encoder.norm.bias"]
        report.notes.append("CrossMAE's pretraining has no final norm: ones and zeros stand for it")
    if problems := size_problems(config):
        raise UserError(*(f"{source}: {problem}" for problem in problems))
    theirs = layout.name in facts.IMAGENET_LAYOUTS and min(config.size_hw) == 224
    crop_pct = hints.crop_pct or (facts.OFFICIAL_CROP_PCT if theirs else 1.0)
    passport = Passport(
        model=config, mean=mean, std=std, interpolation=hints.interpolation, crop_pct=crop_pct,
        kind="mae" if has_decoder else "encoder", eps=hints.eps, grid=grid, epochs=known.epochs,
        data=known.data, weights_license=known.license, origin=f"{layout.name}: {file_name}"[:300],
    )  # fmt: skip
    # A decoder that is not there is built anew by whoever needs one; its names are listed by then.
    return Material(passport, state, report, known.what or _what(tensors, has_decoder), needs)


def _final_norm(tensors: State, layout: Layout, report: KeyReport) -> State:
    """A classifier's norm of the pooled tokens as the final norm, where it has no other."""
    norm = next((theirs for theirs, ours in layout.names.items() if ours == "encoder.norm."), "")
    pooled = norm.replace("norm.", "fc_norm.") if layout.name != "mmpretrain" else "backbone.ln2."
    if f"{norm}weight" in tensors or f"{pooled}weight" not in tensors:
        return tensors
    report.notes.append(f"{pooled}* stood after the pooling and is now the final norm of each token")
    return {norm + key[len(pooled) :] if key.startswith(pooled) else key: value for key, value in tensors.items()}


def _to_float32(state: State, report: KeyReport) -> None:
    """Half precision becomes float32, in place; integers are no weights."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values()} - {"float32"}
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{name} holds no floating-point numbers but {str(value.dtype).removeprefix('torch.')}")
        state[name] = value.to(torch.float32)
    if kinds:
        report.notes.append(f"{', '.join(sorted(kinds))} became float32")


def _sizes(state: State, source: str) -> ModelConfig:
    """The encoder's sizes by its tensors."""
    kernel = state.get(KERNEL)
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or not kernel.numel():
        shape = "none" if kernel is None else list(kernel.shape)
        raise UserError(f"{source}: its patch embedding is no square convolution ({shape})")
    width = kernel.shape[0]
    depth = _depth(state, "encoder.blocks.")
    fc1 = state.get("encoder.blocks.0.mlp.fc1.weight")
    if fc1 is None or fc1.ndim != 2 or fc1.shape[1] != width:
        raise UserError(f"{source}: its blocks are not those of a plain vision transformer")
    for name in ("encoder.cls_token", "encoder.reg_token"):
        if name in state and (state[name].ndim != 3 or state[name].shape[2] != width):
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)}, expected [1, n, {width}]")
    return ModelConfig(
        in_chans=kernel.shape[1],
        patch_size=kernel.shape[2],
        embed_dim=width,
        depth=depth,
        mlp_ratio=fc1.shape[0] / width,
        class_token="encoder.cls_token" in state,
        reg_tokens=state["encoder.reg_token"].shape[1] if "encoder.reg_token" in state else 0,
    )


def _depth(state: State, room: str) -> int:
    """Blocks by their numbers, which must be 0, 1, 2 and so on."""
    numbers = {int(name[len(room) :].split(".")[0]) for name in state if name.startswith(room)}
    if numbers != set(range(len(numbers))):
        raise UserError(f"{room}*: the numbers of the blocks have gaps")
    return len(numbers)


def _known(raw: Raw, file_name: str, hints: Hints) -> Hints:
    """What the hints, the file's known name and its training arguments say together."""
    known = Hints(
        target=hints.target, mask_ratio=hints.mask_ratio, epochs=hints.epochs, license=hints.license, data=hints.data,
        what=hints.what,
    )  # fmt: skip
    released = facts.released(file_name)
    if released is not None:
        known.what, known.target, known.epochs = released.what, released.target, released.epochs
        known.license, known.data = facts.META_LICENSE, "ImageNet-1k"
    if "norm_pix_loss" in raw.facts:
        known.target = "norm-pixels" if raw.facts["norm_pix_loss"] else "pixels"
    known.mask_ratio = raw.facts.get("mask_ratio", known.mask_ratio)
    if 0 <= raw.facts.get("epoch", -1) < 10**7 and not known.epochs:
        known.epochs = raw.facts["epoch"] + 1.0
    return known


def _is_official(state: State, config: ModelConfig, raw: Raw, file_name: str) -> bool:
    """An encoder with timm's names is of the official code by its known name, or by its size with the frozen table."""
    size = (config.embed_dim or 0, config.depth or 0, config.patch_size or 0)
    if size not in facts.OFFICIAL_NAMES or not config.class_token or config.reg_tokens:
        return False
    if facts.released(file_name) or re.match(r"(mae_)?vit_(base|large|huge)_patch1[46]\b", str(raw.facts.get("model"))):
        return True
    table = state.get("encoder.pos_embed")
    side = math.isqrt(table.shape[1]) if table is not None and table.ndim == 3 else 0
    return table is not None and same_table(table, sincos_positions(size[0], (side, side), 1))


def _decoder(
    state: State, config: ModelConfig, layout: Layout, given: SourceConfig, report: KeyReport, tensors: State
) -> bool:
    """Whether there is a decoder that ours can be; its sizes go into the config, else its tensors out of the state."""
    theirs = [name for name in state if name.startswith("decoder.")]
    named = any("decoder" in key for key in tensors)
    reason = (layout.no_decoder or "its tensors have names that are not known here") if named else ""
    embed, fc1 = state.get("decoder.embed.weight"), state.get("decoder.blocks.0.mlp.fc1.weight")
    if any(name.startswith("decoder.blocks.") for name in theirs):
        if embed is None or embed.ndim != 2 or fc1 is None or fc1.ndim != 2 or not embed.numel():
            raise UserError(f"{report.source}: decoder.embed or its first MLP is missing, or is no matrix")
        config.decoder_dim, config.decoder_depth = embed.shape[0], _depth(state, "decoder.blocks.")
        if fc1.shape[0] != 4 * config.decoder_dim:
            reason = f"its MLPs are {fc1.shape[0] / config.decoder_dim:g} times as wide as it, ours 4 times"
        elif not given.encoder_only:
            return True
        else:
            reason = "as asked"
        config.decoder_dim, config.decoder_depth = ModelConfig.decoder_dim, ModelConfig.decoder_depth
    for name in theirs:
        del state[name]
    left = [key for key in tensors if (place := layout.ours(key)) and place[0].startswith("decoder.")]
    for key in left:
        report.renamed.pop(key, None)
    report.unused += left
    if reason:
        report.notes.append(f"its decoder is left out: {reason}")
    return False


def _carrier(layout: Layout, config: ModelConfig) -> str:
    """A model with ordinary blocks, whose sizes are then set to the file's."""
    size = (config.embed_dim or 0, config.depth or 0, config.patch_size or 0)
    if layout.name != "timm" and size in facts.OFFICIAL_NAMES:
        return facts.OFFICIAL_NAMES[size]
    return facts.PLAIN_VITS.get(size[0], "vit_base_patch16_224")


def _take_model(config: ModelConfig, given: SourceConfig, hints: Hints, source: str) -> None:
    """Heads of a named architecture, which must be as wide as the file where nothing else says them."""
    if not (given.model or hints.model):
        return
    named: Any = plain_vit(config.model)
    if named.embed_dim == config.embed_dim:
        config.num_heads = named.blocks[0].attn.num_heads
    elif given.num_heads is None and hints.num_heads is None:
        raise UserError(
            f"--model {config.model} is {named.embed_dim} wide, but {source} is {config.embed_dim} wide: name another, "
            "or say --num-heads too"
        )


def _positions(
    state: State,
    config: ModelConfig,
    given: SourceConfig,
    hints: Hints,
    report: KeyReport,
    needs: list[str],
    source: str,
) -> tuple[int, int]:
    """The grid of the position table; rows of zeros are added where prefix tokens have none and ours have."""
    assert config.embed_dim is not None and config.patch_size is not None
    table = state.get("encoder.pos_embed")
    if table is None or table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != config.embed_dim:
        shape = "none" if table is None else list(table.shape)
        raise UserError(f"{source}: its position embedding has shape {shape}, expected [1, n, {config.embed_dim}]")
    model: Any = plain_vit(config.model)
    num_prefix = int(bool(config.class_token)) + (config.reg_tokens or 0)
    own_rows = 0 if model.no_embed_class else num_prefix
    grid = given.grid or hints.grid
    rows = table.shape[1]
    side = math.isqrt(max(0, rows - own_rows))
    bare_side = math.isqrt(rows)
    if grid is None and side * side == rows - own_rows and side:
        grid = (side, side)
    elif grid is None and bare_side * bare_side == rows and rows:
        grid = (bare_side, bare_side)
    if grid is None or min(grid) < 1 or math.prod(grid) not in (rows, rows - own_rows):
        said = f"{rows} positions for {own_rows} prefix tokens and a grid"
        needs.append(f"--grid HEIGHT WIDTH in patches: {said}" + (f"; {by(grid)} does not fit" if grid else ""))
        return (1, max(1, rows - own_rows))
    if own_rows and math.prod(grid) == rows:
        for name in ("encoder.pos_embed", "decoder.pos_embed"):
            if name in state and state[name].ndim == 3 and state[name].shape[1] == rows:
                zeros = torch.zeros(1, own_rows, state[name].shape[2])
                state[name] = torch.cat([zeros, state[name]], dim=1)
        report.notes.append("positions of the patches alone: zeros for the prefix tokens")
        table = state["encoder.pos_embed"]
    config.img_size = (grid[0] * config.patch_size, grid[1] * config.patch_size)
    if not table.any():
        report.notes.append("all its positions are zero: it was pretrained without any")
    is_fixed = config.embed_dim % 4 == 0 and math.prod(grid) <= 1 << 16 and same_table(
        table, sincos_positions(config.embed_dim, grid, table.shape[1] - math.prod(grid))
    )  # fmt: skip
    config.pos_embed = "sincos" if is_fixed else "learned"
    return grid


def _heads(
    config: ModelConfig, layout: Layout, has_decoder: bool, given: SourceConfig, hints: Hints, needs: list[str]
) -> None:
    """Attention heads of encoder and decoder: said, known, or asked for."""
    size = (config.embed_dim or 0, config.depth or 0)
    known = hints.num_heads or config.num_heads or facts.HEADS.get(layout.name, {}).get(size)
    config.num_heads = _said("--num-heads", given.num_heads, known, "this file")
    if config.num_heads is None:
        needs.append(f"--num-heads N (or --model NAME): a width of {size[0]} does not tell the attention heads")
    elif config.num_heads < 1 or size[0] % config.num_heads:
        raise UserError(f"--num-heads {config.num_heads}: must divide the width, {size[0]}")
    if not has_decoder:
        return
    size = (config.decoder_dim, config.decoder_depth)
    known = hints.decoder_heads or facts.DECODER_HEADS.get(layout.name, {}).get(size)
    heads = _said("--decoder-heads", given.decoder_heads, known, "this file")
    if heads is None:
        needs.append(f"--decoder-heads N: a width of {size[0]} does not tell the decoder's heads (or --encoder-only)")
    elif heads < 1 or size[0] % heads:
        raise UserError(f"--decoder-heads {heads}: must divide the decoder's width, {size[0]}")
    else:
        config.decoder_heads = heads


def _said(flag: str, given: Any, known: Any, source: str) -> Any:
    """What is known or said; both must agree."""
    if given is not None and known is not None and given != known:
        raise UserError(f"{flag} {given}: {source} says {known}; leave the flag away")
    return known if given is None else given


def _statistics(
    config: ModelConfig, layout: Layout, given: SourceConfig, hints: Hints, needs: list[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the file's own channels, or a question."""
    known = (hints.mean, hints.std)
    if layout.name in facts.IMAGENET_LAYOUTS and config.in_chans == 3 and None in known:
        known = (facts.IMAGENET_MEAN, facts.IMAGENET_STD)
    wanted = given.in_chans or config.in_chans
    own = given if wanted == config.in_chans or None in known else SourceConfig()  # else they speak of the new channels
    found: list[tuple[float, ...]] = []
    for name, said, value in (("mean", own.mean, known[0]), ("std", own.std, known[1])):
        chosen: Sequence[float] = said or value or ()
        if chosen and len(chosen) not in {config.in_chans, wanted}:
            raise UserError(f"--{name} {' '.join(f'{one:g}' for one in chosen)}: {config.in_chans} values are needed")
        found.append(tuple(float(one) for one in chosen))
    if any(not math.isfinite(one) for one in found[0]) or not all(0 < one < 1e6 for one in found[1]):
        raise UserError("--mean, --std: must be finite, and --std positive")
    if not all(found):
        needs.append(f"--mean and --std ({config.in_chans} values each): what its training normalised pixels by")
    return found[0], found[1]


def _what(tensors: State, has_decoder: bool) -> str:
    """What the file is, by its keys."""
    if "head.0.running_mean" in tensors:
        return "encoder with a linear probe"
    if any(re.match(r"(head|classifier|head\.fc)\.", key) for key in tensors):
        return "encoder with a classifier"
    return "encoder and decoder" if has_decoder else "encoder"
