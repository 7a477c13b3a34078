"""What a probe takes of an encoder: which tokens, which blocks, mirrored images or not, and which probes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from maekit.config import ModelConfig, PretrainConfig, ProbeConfig, UserError
from maekit.models.encoder import flops_per_image
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import Passport

MIRROR_FLOP = 5e12
"""Mirrored images double the encoder's work; on a CPU they are taken by default below this."""


def wanted(config: ProbeConfig) -> tuple[str, ...]:
    """The probes beside L-BFGS and k-NN."""
    return ("lars", "few-labels") if config.probes is None else config.probes


def kinds_of(config: ProbeConfig, model: MaskedAutoencoder) -> tuple[Literal["cls", "mean"], ...]:
    """Which tokens to pool: those asked for, else all that the encoder has."""
    has_class = bool(model.encoder.has_class_token)
    if config.pool == "cls" and not has_class:
        raise UserError("--pool cls: this encoder has no class token; take --pool mean")
    if config.pool is not None:
        return (config.pool,)
    return ("mean", "cls") if has_class else ("mean",)


def blocks_of(config: ProbeConfig, name: str, model: MaskedAutoencoder) -> tuple[int, ...] | None:
    """The blocks that were asked for, counted from 1; None: all."""
    depth = len(model.encoder.blocks)
    if not config.blocks:
        return None
    if bad := [block for block in config.blocks if block == 0 or abs(block) > depth]:
        raise UserError(f"--blocks {' '.join(map(str, bad))}: {name} has blocks 1 to {depth} (-1 is the last)")
    return tuple(block if block > 0 else depth + 1 + block for block in config.blocks)


def wants_mirrored(config: ProbeConfig, model: MaskedAutoencoder, images: int, device: torch.device) -> bool:
    """Whether features of mirrored training images are taken: as asked for, else where they are cheap."""
    if config.flip != "auto":
        return config.flip == "yes"
    plain = dataclasses.replace(model.config, decoder="self", decoder_depth=0)
    forward = flops_per_image(plain, model.grid_hw[0] * model.grid_hw[1]) / 3
    return device.type != "cpu" or images * forward <= MIRROR_FLOP


def untrained(model: MaskedAutoencoder) -> ModelConfig:
    """The config of the encoder that a model began as: fine-tuning trains positions, which were sine-cosine before."""
    if model.passport.kind == "classifier":
        return dataclasses.replace(model.config, pos_embed="sincos")
    return model.config


def encoder_kind(model: MaskedAutoencoder) -> tuple[Any, ...]:
    """What decides a randomly initialised encoder's features: architecture and normalisation, whatever its decoder."""
    plain = dataclasses.replace(untrained(model), decoder="self", target="pixels", mask="random", mask_ratio=0.75,
                                decoder_dim=0, decoder_depth=0, decoder_heads=0, predict_share=None, drop_path=0.0,
                                target_cut=ModelConfig.target_cut)  # fmt: skip
    return plain, model.passport.mean, model.passport.std


def reading_config(config: ProbeConfig, passport: Passport) -> PretrainConfig:
    """How images are read for an encoder; crops and flips are those of the probes that see images anew."""
    return passport.reading(config.data, seed=config.seed, crop_scale=config.crop_scale, flip=config.flip != "no")


def shape_of(reading: PretrainConfig) -> tuple[Any, ...]:
    """What models must have in common to share the images that were read."""
    return reading.size_hw, reading.in_chans, reading.interpolation, reading.crop_pct
