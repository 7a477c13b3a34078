"""Measuring and looking at pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maekit.config.weights import SourceConfig


@dataclass(kw_only=True)
class ProbeConfig(SourceConfig):
    """Measure frozen features by linear probe and k-NN, beside random weights and raw pixels."""

    data: str
    """Labelled images: a known name, a folder with one folder per class, or a Parquet file or folder."""
    out: str | None = None
    """Folder for card.json. Default: RUN/probe-NAME for a run, ./probe-NAME otherwise."""
    pool: Literal["cls", "mean"] | None = None
    """Which tokens are the features. Default: both are tried, the held-out part decides."""
    image_column: str | None = None
    """Parquet: the column with the images."""
    label_column: str | None = None
    """Parquet: the column with the labels."""
    baselines: bool = True
    """Also measure the same encoder with random weights, and raw pixels."""
    batch_size: int = 256
    """Images per forward pass; changes speed and memory, never the features."""
    seed: int = 0
    """Seed of the random-weights encoder."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the feature extraction."""


@dataclass(kw_only=True)
class ReconstructConfig(SourceConfig):
    """Draw original, masked image, reconstruction and both pasted together, for any image."""

    image: tuple[str, ...]
    """One or more image files."""
    out: str = "panel.png"
    """PNG to write."""
    mask: Literal["random", "block", "grid"] | None = None
    """Which patches are hidden. Default: as in the pretraining."""
    mask_ratio: float | None = None
    """Share of hidden patches. Default: the one of the pretraining."""
    seed: int = 0
    """Seed of the masks."""
    statistics: Literal["true-patch", "visible", "none"] = "true-patch"
    """Normalised targets only: whose mean and deviation bring the prediction back to pixels. true-patch: those of
    the hidden patch itself (the panel says so); visible: of the nearest visible patches; none: shown as predicted."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
