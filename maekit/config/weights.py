"""Weights of others: what their files cannot say, and the shape in which they are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class SourceConfig:
    """What may be said of a source of weights, where its file does not say it, and the shape that is wanted."""

    img_size: tuple[int, ...] | None = None
    """Take the weights at this input size, one number or height and width: positions are resized."""
    patch_size: int | None = None
    """Take the weights at this patch size: the patch embedding is resized (FlexiViT's pseudo-inverse)."""
    in_chans: int | None = None
    """Take the weights for this number of channels: the patch embedding is summed to one, or repeated for more."""
    crop_pct: float | None = None
    """Share of an image's shorter side that is seen where nothing is augmented: it is resized to the input size / this
    and cut at the centre. Default: as the weights were evaluated so far; 0.875 for the official code's at 224 px."""
    model: str | None = None
    """Foreign files: timm's name of the architecture, where the shapes cannot tell it."""
    num_heads: int | None = None
    """Foreign files: attention heads of the encoder; shapes cannot tell them."""
    decoder_heads: int | None = None
    """Foreign files: attention heads of the decoder."""
    target: Literal["pixels", "norm-pixels"] | None = None
    """Foreign files: what the decoder was trained to predict."""
    mean: tuple[float, ...] | None = None
    """Foreign files: per-channel mean, of pixels in 0..1, that the training normalised by."""
    std: tuple[float, ...] | None = None
    """Foreign files: per-channel standard deviation, of pixels in 0..1, that the training normalised by."""
    grid: tuple[int, int] | None = None
    """Foreign files: patches along height and width at which the positions were trained. Default: a square."""
    encoder_only: bool = False
    """Leave the decoder out: then its heads and its target need not be known."""


FILE_FACTS = ("model", "num_heads", "decoder_heads", "target", "mean", "std", "grid")
"""The settings that say what a foreign file does not."""


@dataclass(kw_only=True)
class InfoConfig(SourceConfig):
    """Tell what a source of weights is, what it can be used for, and which command to type next."""

    json: bool = False
    """Print one JSON object instead of a table."""
