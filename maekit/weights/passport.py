"""What a weights file says about itself: a JSON passport in the header of the safetensors file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from maekit.config import ModelConfig, PretrainConfig, UserError
from maekit.configfile import from_json

FORMAT = 1
_KEY = "maekit"

LIMITS = {
    "img_size": 65_536, "in_chans": 4_096, "patch_size": 4_096, "embed_dim": 65_536, "depth": 1_000, "num_heads": 4_096,
    "head_dim": 65_536, "mlp_ratio": 64, "reg_tokens": 4_096, "decoder_dim": 65_536, "decoder_depth": 1_000,
    "decoder_heads": 4_096, "target_cut": 8_192,
}  # fmt: skip
"""Largest values of a model's sizes: ten times the largest model known, and small enough to be refused or built."""
MAX_PATCHES = 1 << 20
"""Patches of an image: position tables are computed for each."""
MAX_PARAMETERS = 1 << 40
"""A rough count is bounded too, since every size by itself may be allowed and the product absurd."""
_MAX_ENTRIES = 1_000
MAX_CLASSES = 100_000
"""Classes of a head."""
MAX_HEAD_WIDTH = 1 << 14
"""Channels of a head."""


@dataclass(kw_only=True)
class HeadFacts:
    """What stands on the encoder where labels were learned; the tensors are named "head.*"."""

    kind: str = ""
    """linear for classes of images; upernet, linear or fpn for classes of pixels."""
    pool: str = ""
    """Of the tokens that a classifier reads: mean or cls."""
    width: int = 0
    """Channels of a segmentation head."""
    blocks: tuple[int, ...] = ()
    """Blocks of the encoder that a segmentation head reads, counted from 0."""


@dataclass(kw_only=True)
class Passport:
    """Everything about a model that its tensors cannot tell."""

    model: ModelConfig
    """Architecture, masking and target, with every default resolved."""
    mean: tuple[float, ...]
    """Per-channel mean of the pixels in 0..1 that the input is normalised by."""
    std: tuple[float, ...]
    """Per-channel standard deviation that the input is normalised by."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images were brought to the input's size, always with antialiasing."""
    crop_pct: float = 1.0
    """Share of the shorter side that is seen of an image: it is resized to the input's size / this, then cut."""
    format: int = FORMAT
    """Version of this passport's layout."""
    kind: str = "mae"
    """mae: encoder and decoder; encoder: no decoder, or one that is not trained; classifier and segmenter: an encoder
    with a head that was trained on labels, and no decoder."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a classifier or segmenter, in the order of its outputs."""
    head: HeadFacts = field(default_factory=HeadFacts)
    """The head of a classifier or segmenter."""
    eps: float = 1e-6
    """LayerNorm's epsilon."""
    grid: tuple[int, int] = (0, 0)
    """Patches along height and width."""
    steps: int = 0
    """Optimiser steps trained."""
    epochs: float = 0.0
    """Passes over the training data."""
    data: str = ""
    """Short name of the data."""
    fingerprint: str = ""
    """Hash of the data's names and sizes."""
    recipe: str = ""
    """Recipe that the run was started from."""
    weights_license: str = "unspecified: trained by the owner of the run"
    """Licence of the weights."""
    origin: str = ""
    """Layout and name of the foreign file that the weights come from; empty: they were trained here from scratch."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions of the run."""

    def to_metadata(self) -> dict[str, str]:
        """The header entries of a safetensors file."""
        return {"format": "pt", _KEY: json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def from_metadata(metadata: dict[str, str] | None, source: str) -> Passport:
        """The passport read back.

        Raises:
            UserError: no passport, a newer format, or values that do not fit.
        """
        text = (metadata or {}).get(_KEY)
        if text is None:
            raise UserError(f"{source}: no maekit passport in this file's header, so it is not known what it is")
        passport = from_json(Passport, text, f"{source}, passport")
        if passport.format != FORMAT:
            raise UserError(f"{source}: passport format {passport.format}, this maekit reads {FORMAT}: upgrade maekit")
        if problems := passport.problems():
            raise UserError(*(f"{source}, passport: {problem}" for problem in problems))
        if passport.model.patch_size is None:
            raise UserError(f"{source}, passport: patch_size is missing; every file has it")
        return passport

    def reading(self, data: str, **more: Any) -> PretrainConfig:
        """How data are read for this model: its size and channels, resized as in its training; more: other fields."""
        return PretrainConfig(
            data=data, img_size=self.model.size_hw, in_chans=self.model.in_chans, interpolation=self.interpolation,
            crop_pct=self.crop_pct, **more,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """All that cannot be true of a model; nothing is built to find out."""
        if too_large := size_problems(self.model):
            return too_large
        config = PretrainConfig(**vars(self.model), data="-", mean=self.mean, std=self.std)
        found = config.problems()
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.eps, self.epochs)):
            found.append("a number in it is not finite")
        if not 0 < self.crop_pct <= 1:
            found.append(f"crop_pct {self.crop_pct:g}: must lie above 0 and at most at 1")
        if not 0 < self.eps < 1:
            found.append(f"eps {self.eps:g}: must lie between 0 and 1")
        if not 0 <= self.model.drop_path < 1:
            found.append(f"--drop-path {self.model.drop_path:g}: must lie between 0 and 1")
        if len(self.versions) > _MAX_ENTRIES:
            found.append(f"{len(self.versions)} versions of packages; at most {_MAX_ENTRIES} are read")
        if len(self.classes) > MAX_CLASSES:
            found.append(f"{len(self.classes):,} classes; at most {MAX_CLASSES:,} are read")
        depth = self.model.depth or MAX_CLASSES
        if not 0 <= self.head.width <= MAX_HEAD_WIDTH or not all(0 <= block < depth for block in self.head.blocks):
            found.append("a head of impossible width, or on blocks that the encoder does not have")
        words = [self.kind, self.data, self.fingerprint, self.recipe, self.weights_license, self.origin]
        words += [self.model.model, self.head.kind, self.head.pool, *self.classes[:MAX_CLASSES]]
        # Control characters would reach the terminal, and halves of a character cannot be printed.
        if not all(word.isprintable() for word in [*words, *self.versions, *self.versions.values()]):
            found.append("a text in it is not printable")
        return found


def size_problems(config: ModelConfig) -> list[str]:
    """Sizes beyond any model, found before anything is allocated or built: a config file can claim any number."""
    sides = [*(("img_size", side) for side in config.img_size[:2])]
    found = [
        f"--{name.replace('_', '-')} {str(value)[:40]}: at most {LIMITS[name]:,}"
        for name, value in [*sides, *((name, getattr(config, name)) for name in LIMITS if name != "img_size")]
        if value is not None and not abs(value) <= LIMITS[name]
    ]
    if found:
        return found
    patch = config.patch_size or 16
    patches = math.prod(config.size_hw) // patch**2 if config.img_size and patch else 0
    if patches > MAX_PATCHES:
        found.append(f"--img-size with --patch-size {patch}: {patches:,} patches, at most {MAX_PATCHES:,}")
    width, ratio = config.embed_dim or 0, config.mlp_ratio or 4.0
    heads, narrow = (config.num_heads or 0) * (config.head_dim or 0), config.decoder_dim
    parameters = (config.depth or 0) * (4 * max(width, heads) * width + 2 * ratio * width**2)
    parameters += config.decoder_depth * 12 * narrow**2
    if config.decoder == "flat":  # its heads are as wide as it is, and one layer goes from all tokens to all pixels
        parameters += config.decoder_depth * 4 * config.decoder_heads * narrow**2
        parameters += patches**2 * patch**2 * narrow * config.in_chans
    if config.decoder == "cross":  # keys and values come from the encoder's width
        parameters += config.decoder_depth * 2 * width * config.decoder_dim
    parameters += (width + config.decoder_dim) * (patches + patch**2 * config.in_chans)
    if parameters > MAX_PARAMETERS:
        found.append(f"the sizes give about {parameters:.1e} parameters, at most {MAX_PARAMETERS:.1e} are built")
    return found
