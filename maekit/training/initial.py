"""Weights to begin a pretraining with: somebody's encoder, and its decoder where there is one of the same sizes.

A fresh run with a fresh schedule, unlike `maekit resume`. The architecture must be the run's own; image size, patch
size and channels are resized. An encoder whose decoder starts anew is left alone for a while
(`--decoder-warmup-epochs`), since the gradients of an untrained decoder would undo it.
"""

from __future__ import annotations

import dataclasses

from rich.console import Console

from maekit.config import ModelConfig, PretrainConfig, SourceConfig, UserError, flag
from maekit.models.encoder import EPS, resolve
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.export import has_decoder
from maekit.weights.passport import Passport
from maekit.weights.sources import gather
from maekit.weights.store import build

ENCODER_FIELDS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "head_dim", "mlp_act", "class_token", "reg_tokens",
                  "pos_embed")  # fmt: skip
DECODER_FIELDS = ("decoder", "decoder_dim", "decoder_depth", "decoder_heads", "target")
WARMUP_SHARE = 0.05
"""Share of a run in which a decoder that starts anew is trained alone, unless --decoder-warmup-epochs says another."""


def load_start(config: PretrainConfig) -> MaskedAutoencoder:
    """The weights that --init names, at the run's image size, patch size and channels.

    Raises:
        UserError: no such weights, or an encoder or decoder of other sizes; names the flags that would fit.
    """
    own = resolve(ModelConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}))
    wanted = SourceConfig(
        img_size=own.img_size, patch_size=own.patch_size, in_chans=own.in_chans, encoder_only=not config.init_decoder
    )
    material = gather(config.init, wanted)
    if material.needs:  # what its file does not say is what the run's flags say
        target = own.target if own.target == "pixels" or own.target == "norm-pixels" else None  # no others' is spectral
        said = dataclasses.replace(
            wanted, model=own.model, num_heads=own.num_heads, decoder_heads=own.decoder_heads, target=target,
            mean=config.mean, std=config.std,
        )  # fmt: skip
        material = gather(config.init, said)
    if material.needs:
        raise UserError(*(f"--init {config.init}: give {need}" for need in material.needs))
    model = build(material)
    theirs = model.config
    fields = ENCODER_FIELDS + (DECODER_FIELDS if has_decoder(model) else ())
    fields += ("target_cut",) if has_decoder(model) and own.target == "norm-pixels-highpass" else ()
    problems = [
        f"--init {config.init}: has {name.replace('_', ' ')} {getattr(theirs, name)}, the run {getattr(own, name)}: "
        f"--{flag(name)} {getattr(theirs, name)}"
        + (", or --no-init-decoder to start the decoder anew" if name not in ENCODER_FIELDS else "")
        for name in fields
        if getattr(theirs, name) != getattr(own, name)
    ]
    if problems:
        raise UserError(*problems)
    return model


def with_start(config: PretrainConfig, start: MaskedAutoencoder, steps_per_epoch: int) -> PretrainConfig:
    """The config with what follows from the weights: mean and deviation, licence, and how long the encoder waits."""
    passport: Passport = start.passport
    warmup = config.decoder_warmup_epochs
    if warmup is None:
        whole = config.epochs if config.epochs is not None else (config.steps or 0) / steps_per_epoch
        warmup = 0.0 if has_decoder(start) else WARMUP_SHARE * whole
    return dataclasses.replace(
        config,
        mean=config.mean or tuple(passport.mean),
        std=config.std or tuple(passport.std),
        weights_license=passport.weights_license,
        decoder_warmup_epochs=warmup,
    )


def take_over(model: MaskedAutoencoder, start: MaskedAutoencoder, console: Console) -> None:
    """Copy the weights into the run's model, and say what was and was not taken."""
    model.encoder.load_state_dict(start.encoder.state_dict())
    if has_decoder(start):
        model.decoder.load_state_dict(start.decoder.state_dict())
    for line in start.key_report.remarks() or [f"{start.key_report.source}: {start.key_report.summary()[0]}"]:
        console.print(line, style="dim", markup=False)
    if start.passport.eps != EPS:
        console.print(f"LayerNorm's epsilon is {EPS:g} from here on; it was {start.passport.eps:g}", style="dim")
