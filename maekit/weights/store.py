"""Models from every source of weights. What a file is comes from its passport or its keys, never from a guess."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from maekit.config import FILE_FACTS, ModelConfig, SourceConfig, UserError
from maekit.models.classifier import Classifier, Pool
from maekit.models.encoder import set_eps
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import choose_device
from maekit.weights import heads
from maekit.weights.facts import IMAGENET_MEAN, IMAGENET_STD, files_with_decoder
from maekit.weights.files import PICKLES
from maekit.weights.foreign import Material
from maekit.weights.passport import Passport
from maekit.weights.report import KeyReport
from maekit.weights.sources import WEIGHTS_FILE, gather

__all__ = ["PICKLES", "WEIGHTS_FILE", "check_names", "load", "load_any", "load_as", "load_classifier", "load_each",
           "random_model", "require_decoder"]  # fmt: skip


def load(
    source: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    img_size: int | tuple[int, ...] | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    target: Literal["pixels", "norm-pixels"] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    grid: tuple[int, int] | None = None,
    crop_pct: float | None = None,
    encoder_only: bool = False,
) -> Any:
    """A `MaskedAutoencoder` from any source of weights; a `Classifier` from a run of maekit finetune, or its file.

    source: a run's folder, a maekit .safetensors file, a file or folder of any layout in `maekit.weights.layouts`,
        `timm:NAME`, `hub:OWNER/NAME`, or `random:MODEL`.
    img_size, patch_size, in_chans: the shape that is wanted; positions and patch embedding are resized.
    device: cpu, cuda, cuda:1, mps, or auto for the best that there is.
    The others say what a foreign file does not, and are asked for where it matters (`maekit.config.SourceConfig`).

    The model is in evaluation mode; its passport is `model.passport`, and what became of each tensor is
    `model.key_report`. An encoder without a decoder gets an untrained one, and `passport.kind` is then "encoder"; so it
    is with a classifier where `encoder_only` leaves its head out, and with the classifiers of other tools, whose heads
    `load_classifier` reads. A segmenter gives its encoder; `maekit.weights.segmenters.load_segmenter` reads all of it.

    Raises:
        UserError: no such source, a file of another kind, something that must be said, weights that do not fit, or a
            device that is not there.
    """
    if target not in (None, "pixels", "norm-pixels"):
        raise UserError(f"target={target!r}: choose pixels or norm-pixels")
    return load_any(
        source,
        SourceConfig(
            img_size=_sides(img_size), patch_size=patch_size, in_chans=in_chans,
            model=model, num_heads=num_heads, decoder_heads=decoder_heads, target=target, mean=mean, std=std, grid=grid,
            crop_pct=crop_pct, encoder_only=encoder_only,
        ),
        _place(device),
    )  # fmt: skip


def _sides(img_size: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A size as the configs have it, of one number or two."""
    if img_size is None:
        return None
    try:
        return tuple(operator.index(side) for side in (img_size if isinstance(img_size, Iterable) else (img_size,)))
    except TypeError:
        raise UserError(f"img_size={img_size!r}: give one whole number, or (height, width)") from None


def _place(device: str | torch.device) -> torch.device:
    """The device that is meant; kinds that no command knows are torch's to judge."""
    kind = str(device).partition(":")[0]
    if kind in ("auto", "cpu", "cuda", "mps"):
        return choose_device(str(device)).value
    try:
        return torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r}: choose auto, cpu, cuda or mps") from None


def load_any(
    source: str | os.PathLike[str], given: SourceConfig, device: str | torch.device = "cpu"
) -> MaskedAutoencoder | Classifier:
    """`load` with all that is said about the source in a config, as the commands have it."""
    text = os.fspath(source)
    if text.startswith("random:"):
        return random_as(text.removeprefix("random:"), given).to(device)
    material = known_material(text, given)
    learned = material.labelled is not None and material.labelled.kind == "classifier"
    if learned and material.report.layout == "maekit" and not given.encoder_only:
        return build_classifier(material).to(device)
    return build(material).to(device).eval()


def load_as(
    source: str | os.PathLike[str], given: SourceConfig, device: str | torch.device = "cpu"
) -> MaskedAutoencoder:
    """A masked autoencoder from any source of weights; the head of one that learned labels is left out."""
    text = os.fspath(source)
    if text.startswith("random:"):
        return random_as(text.removeprefix("random:"), given).to(device)
    return build(known_material(text, given)).to(device).eval()


def load_each(
    sources: Sequence[str], given: SourceConfig, device: str | torch.device = "cpu"
) -> list[tuple[str, MaskedAutoencoder]]:
    """Several sources by name, all under the same settings.

    Raises:
        UserError: what `load_as` says of one of them, and how settings can be given to that one alone.
    """
    said = [f"--{name.replace('_', '-')}" for name in FILE_FACTS if getattr(given, name) is not None]
    try:
        return [(name, load_as(name, given, device)) for name in sources]
    except UserError as error:
        if len(sources) == 1 or not said:
            raise
        example = f"maekit convert SRC {said[0]} ... --to hf --out DIR"
        raise UserError(
            *error.problems,
            f"{' '.join(said)}: said of every source here; a copy of one keeps what is said of it alone: {example}",
        ) from error


def load_classifier(source: str, given: SourceConfig, device: str | torch.device = "cpu") -> Classifier:
    """A classifier from weights that have a linear head.

    Raises:
        UserError: besides all that `load` refuses, weights without such a head.
    """
    text = os.fspath(source)
    if text.startswith("random:"):
        raise UserError(f"{text}: random weights are no classifier; train one: maekit finetune {text} --data D")
    material = known_material(text, given)
    if material.labelled is None or material.labelled.kind != "classifier":
        raise UserError(f"{text}: {material.what}, no classifier; train one: maekit finetune {text} --data D")
    return build_classifier(material).to(device)


def known_material(source: str, given: SourceConfig) -> Material:
    """The tensors of a source of which all is known that a model needs.

    Raises:
        UserError: no such source, one of no known kind, or what must be said of it.
    """
    material = gather(source, given)
    if material.needs:
        raise UserError(
            *(f"{source}: this file does not say all that is needed: give {need}" for need in material.needs)
        )
    return material


def build(material: Material) -> MaskedAutoencoder:
    """The model of weights that were read; a decoder that is not there starts anew, which the report says.

    Raises:
        UserError: tensors that are missing, unknown or of another shape.
    """
    passport, tensors, report = material.passport, material.state, material.report
    try:
        with torch.device("meta"):
            model = MaskedAutoencoder(passport.model, passport.mean, passport.std)
    except UserError as error:
        raise UserError(*(f"{report.source}: {problem}" for problem in error.problems)) from None
    may_lack = "decoder." if passport.kind == "encoder" else ""
    check_names(model, tensors, report.source, may_lack, foreign=report.layout != "maekit")
    if passport.kind == "encoder" and any(name not in tensors for name in _decoder_names(model)):
        model.decoder = _new_decoder(model, passport)
        anew = [name for name in _decoder_names(model) if name not in tensors]
        report.missing = [*anew, *(name for name in report.missing if name not in anew)]
    if report.layout != "maekit":  # own memory: a foreign file is mapped, and its tensors may share numbers
        tensors = {name: value.clone() for name, value in tensors.items()}
    model.load_state_dict(tensors, assign=True, strict=False)
    # Buffers are no part of the state: they are in the passport.
    for name, values in (("mean", passport.mean), ("std", passport.std)):
        setattr(model, name, torch.tensor(values).view(1, -1, 1, 1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_fixed(name, passport.model))
    set_eps(model, passport.eps)
    model.passport = dataclasses.replace(passport, model=model.config, grid=model.grid_hw)
    report.loaded = [name for name in model.state_dict() if name in tensors and name not in report.missing]
    model.key_report = report
    return model


def build_classifier(material: Material) -> Classifier:
    """The classifier of weights that were read, in evaluation mode.

    Raises:
        UserError: tensors that are missing, unknown or of another shape, or a head of another kind.
    """
    labelled, report = material.labelled, material.report
    assert labelled is not None
    here = material.passport  # at the size that was asked for
    pool: Pool | None = {"mean": "mean", "cls": "cls"}.get(labelled.head.pool)  # type: ignore[assignment]
    if labelled.kind != "classifier" or labelled.head.kind != "linear" or pool is None or not labelled.classes:
        raise UserError(f"{report.source}: its passport describes no classifier of images")
    try:
        with torch.device("meta"):
            model = Classifier(here.model, labelled.classes, here.mean, here.std, pool)
    except UserError as error:
        raise UserError(*(f"{report.source}: {problem}" for problem in error.problems)) from None
    tensors = {**material.state, **material.head}
    if pool == "mean":
        tensors = {
            heads.POOLED_NORM + name[len(heads.NORM) :] if name.startswith(heads.NORM) else name: value
            for name, value in tensors.items()
        }
    check_names(model, tensors, report.source)
    model.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, values in (("mean", here.mean), ("std", here.std)):
        setattr(model, name, torch.tensor(values).view(1, -1, 1, 1))
    set_eps(model, here.eps)
    model.passport = dataclasses.replace(labelled, model=model.config, mean=here.mean, std=here.std, grid=model.grid_hw)
    model.key_report = dataclasses.replace(
        report,
        loaded=list(tensors),
        unused=[name for name in report.unused if name not in tensors],
        renamed={theirs: ours for theirs, ours in report.renamed.items() if theirs not in tensors},
        notes=[note for note in report.notes if "fc_norm." not in note],
    )
    return model.eval()


def _new_decoder(model: MaskedAutoencoder, passport: Passport) -> Any:
    """An untrained decoder. It comes with an encoder of one block, as initialising ViT-L's 24 takes seconds."""
    shapes = {name: value.shape for name, value in model.decoder.state_dict().items()}
    for depth in (1, model.config.depth):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = dataclasses.replace(model.config, depth=depth)
            decoder = MaskedAutoencoder(config, passport.mean, passport.std).decoder
        if {name: value.shape for name, value in decoder.state_dict().items()} == shapes:
            break
    return decoder


def _decoder_names(model: MaskedAutoencoder) -> list[str]:
    return [f"decoder.{name}" for name in model.decoder.state_dict()]


def require_decoder(model: MaskedAutoencoder, source: str) -> None:
    """Refuse what needs a decoder where none was trained, and say which file has one.

    Raises:
        UserError: the decoder, or its prediction layer, holds initial values.
    """
    if model.passport is not None and model.passport.kind == "encoder":
        where = files_with_decoder(model.config.embed_dim)
        raise UserError(f"{source}: its decoder is not trained, so it cannot reconstruct: {where}")


def is_fixed(name: str, config: ModelConfig) -> bool:
    """Whether a parameter is a constant: the sine-cosine positions."""
    return name == "decoder.pos_embed" or (name == "encoder.pos_embed" and config.pos_embed == "sincos")


def check_names(
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    source: str,
    may_lack: str = "",
    foreign: bool = False,
    any_type: bool = False,
) -> None:
    """Refuse weights that are missing, unknown or of another shape: nothing stays at its initial value in silence.

    may_lack: what the names of those begin with that may be missing; empty: none.
    any_type: numbers need not be float32, as the counters of batch normalisation are not.
    foreign: their architecture was not said by a passport, so unknown ones hint at another.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    lacking = [name for name in own.keys() - tensors.keys() if not (may_lack and name.startswith(may_lack))]
    hint = " to a plain vision transformer: name its architecture, --model NAME" if foreign else ""
    found = [f"{source}: {name} is missing" for name in lacking]
    found += [f"{source}: {name} is unknown{hint}" for name in tensors.keys() - own.keys()]
    found += [
        f"{source}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in own.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    found += [
        f"{source}: {name} has type {str(value.dtype).removeprefix('torch.')}, expected float32"
        for name, value in tensors.items()
        if value.dtype != torch.float32 and not any_type
    ]
    if found:
        raise UserError(*sorted(found)[:8], *([f"... and {len(found) - 8} more"] if len(found) > 8 else []))


def random_as(name: str, given: SourceConfig) -> MaskedAutoencoder:
    """`random:MODEL` at the sizes, heads and statistics that are said."""
    fields: dict[str, Any] = {"img_size": given.img_size, "patch_size": given.patch_size, "in_chans": given.in_chans}
    fields |= {"num_heads": given.num_heads, "decoder_heads": given.decoder_heads, "target": given.target}
    config = ModelConfig(model=name, **{key: value for key, value in fields.items() if value is not None})
    # Commands whose help promises a seed of random weights have one in their config.
    random = random_model(config, given.mean, given.std, seed=getattr(given, "seed", 0))
    random.passport.crop_pct = given.crop_pct or random.passport.crop_pct
    return random


def random_model(
    config: ModelConfig, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, seed: int = 0
) -> MaskedAutoencoder:
    """A model with the paper's random initialisation, in evaluation mode: the floor that training must beat.

    Raises:
        UserError: sizes or statistics of no model.
    """
    mean = mean or (IMAGENET_MEAN if config.in_chans == 3 else (0.5,) * config.in_chans)
    std = std or (IMAGENET_STD if config.in_chans == 3 else (0.25,) * config.in_chans)
    if problems := Passport(model=config, mean=mean, std=std).problems():
        raise UserError(*(f"random:{config.model}: {problem}" for problem in problems))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(config, mean, std)
    model.passport = Passport(model=model.config, mean=mean, std=std, kind="mae", grid=model.grid_hw, recipe="random")
    model.key_report = KeyReport(f"random:{config.model}", "random", missing=list(model.state_dict()))
    return model.eval()
