"""What weight files of others do not say, and everybody who loads them must know. One table, with its sources.

Sources: [paper] He et al. 2021, arXiv 2111.06377, tables 3 and 8; [readme] the README and PRETRAIN.md of
github.com/facebookresearch/mae and its issues 3 and 8, where the files with a decoder are linked; [cross] arXiv
2401.14391 and its README; [mm] the sizes that mmpretrain names b, l and h. Facts only, no code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Target = Literal["pixels", "norm-pixels"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
META_LICENSE = "CC-BY-NC-4.0 (Meta's MAE weights: not for commercial use)"
NON_COMMERCIAL = re.compile(r"\bNC\b|\bnon-?commercial|\bnot for commercial", re.IGNORECASE)
"""Words of a licence that forbid commercial use, of the weights and of what is derived from them."""
UNKNOWN_LICENSE = "unknown: ask where the file comes from"
META_URL = "https://dl.fbaipublicfiles.com/mae"

HEADS: dict[str, dict[tuple[int, int], int]] = {
    "official": {(768, 12): 12, (1024, 24): 16, (1280, 32): 16},  # [paper] ViT-B, L, H
    "crossmae": {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16},  # [cross]
    "mmpretrain": {(768, 12): 12, (1024, 24): 16, (1280, 32): 16},  # [mm]
}
"""Attention heads of the encoder by layout, (width, depth). No other layout fixes them: solo-learn's tiny and small
have 12 heads where timm's have 3 and 6, with the same shapes."""
DECODER_HEADS = {"official": {(512, 8): 16}, "mmpretrain": {(512, 8): 16}}
"""Heads of the decoder by layout, (width, depth) [paper, appendix A.1]."""
IMAGENET_LAYOUTS = ("official", "crossmae")
"""Their training scripts normalise by ImageNet's mean and deviation, and have no flag for it [readme, cross]."""
OFFICIAL_CROP_PCT = 0.875
"""Share of the shorter side on which those scripts score images of 224 px: 224 / 256, as in main_linprobe.py and
util/datasets.py of github.com/facebookresearch/mae; timm's default for a classifier is the same."""
OFFICIAL_NAMES = {
    (768, 12, 16): "mae_vit_base_patch16",
    (1024, 24, 16): "mae_vit_large_patch16",
    (1280, 32, 14): "mae_vit_huge_patch14",
}
"""The paper's models by (width, depth, patch)."""
PLAIN_VITS = {
    192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224",
}  # fmt: skip
"""A timm model with ordinary blocks for each width; its sizes are then set from the tensors."""


@dataclass(frozen=True)
class Released:
    """What is known of a file that Meta released, by its name alone [readme]."""

    what: str
    target: Target
    epochs: float = 0.0


_RELEASED = {
    r"mae_pretrain_vit_(base|large|huge)": Released("pretrained encoder", "norm-pixels", 1600.0),
    r"mae_pretrain_vit_(base|large|huge)_full": Released("pretrained encoder and decoder", "norm-pixels", 1600.0),
    r"mae_visualize_vit_(base|large|huge)": Released("encoder and decoder for pictures", "pixels"),
    r"mae_visualize_vit_large_ganloss": Released("encoder and decoder for pictures, with a GAN loss", "pixels"),
    r"mae_finetuned_vit_(base|large|huge)": Released("encoder fine-tuned on ImageNet-1k", "norm-pixels"),
}


def released(file_name: str) -> Released | None:
    """What is known of a file with this name; only what its keys cannot tell is taken from here."""
    stem = file_name.rsplit(".", 1)[0]
    return next((known for pattern, known in _RELEASED.items() if re.fullmatch(pattern, stem)), None)


def files_with_decoder(width: int | None) -> str:
    """Where an encoder's decoder can be had, as the end of an error message."""
    size = {768: "base", 1024: "large", 1280: "huge"}.get(width or 0)
    if size is None:
        return "pretrain it here: maekit pretrain"
    return (
        f"take {META_URL}/visualize/mae_visualize_vit_{size}.pth (pixels, best for pictures) or "
        f"{META_URL}/pretrain/mae_pretrain_vit_{size}_full.pth (normalised pixels)"
    )
