"""Fine-tuning a classifier, and using one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from maekit.config.base import compile_problems, duration_problems, flag, spaced
from maekit.config.supervised import SupervisedConfig
from maekit.config.weights import SourceConfig

Preset = Literal["paper", "official", "small", "light"]
SMALL_SIDE = 64
"""Up to this input size, in pixels, the preset is "small" unless another is asked for."""
_POLICY = re.compile(
    r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?|-tweights)*|(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
    r"|augmix(-(m|w|d|a|b|mstd)\d+(\.\d+)?)*"
)


@dataclass(kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Train a classifier from a pretrained encoder, all of it, with labels; the test split is scored once, at the end.

    Defaults are those of --preset.
    """

    preset: Preset = "paper"
    """Which recipe the other defaults come from. paper: table 9 of He et al. 2021, ViT-B at 224 px; official: the
    released code's command for ViT-B (blr 5e-4, layer decay 0.65, random erasing); small: images of up to 64 px, a
    small encoder and a small batch; light: as small, without what must be done image by image (RandAugment), for a
    CPU. Default: small for pretraining runs of at most 64 px, else paper."""
    train_share: float = 1.0
    """Use only this share of the training images (always the same ones): how good is it with few labels?"""
    eval: bool = False
    """Train nothing: SRC is a classifier, and its score on the test split of --data is measured again."""
    score: Literal["best", "last"] = "best"
    """Which weights are scored on the test split and become the run's model.safetensors. best: those of the epoch with
    the highest top-1 accuracy on held-out training images (among equals the lower loss); last: those of the last step.
    The test split has no say in either."""
    heldout_share: float = 0.02
    """Share of the training images that is never trained on and chooses the best epoch: the same images that the
    pretraining holds out."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths. Default: the first image column, or file_name."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels. Default: the first class-label column, or label."""
    group_by: str | None = None
    """Never part the images of one patient, slide or scene: held-out and test images are whole groups. The column with
    the group's name (Parquet, tables), or a regular expression that is found in each image's path, such as
    'patient[0-9]+', or '^([^/]+)/', where the brackets name the group."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the images cannot be read. Ten are allowed in any case, up to a
    quarter of the images; 0: not one."""
    pool: Literal["mean", "cls"] = "mean"
    """What the linear layer sees. mean: the mean of the patch tokens, normalised (the paper's); cls: the class
    token."""

    # ---- augmentation ----
    crop: Literal["random-resized", "resize-crop", "pad-crop", "none"] = "random-resized"
    """random-resized: a box of --crop-scale of the area; pad-crop: the whole image, shifted by up to --pad pixels, as
    is usual at 32 px, where a box of 8 % would be 9 px wide; resize-crop: resize to --resize-to, then a random crop;
    none: the centre."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """random-resized: smallest and largest share of the image's area in a crop."""
    resize_to: int | None = None
    """resize-crop: the shorter side before the crop. Default: the longer side of the input x 9/8."""
    pad: int = 4
    """pad-crop: the largest shift in pixels, each way."""
    crop_pct: float | None = None
    """Share of the shorter side that is seen of held-out and test images: they are resized to the input size / this and
    cut at the centre. paper, official: 0.875 up to 224 px and 1 above, as the released code. Default: as the weights
    were evaluated so far; with --eval as in the run that trained them."""
    flip: bool = True
    """Mirror half of the images. Default: as in the pretraining, where SRC is a run; switch it off where a mirrored
    image is another class, as with letters."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """A policy of colour and shape changes for each image, in timm's words: rand-m9-mstd0.5-inc1 is RandAugment
    (arXiv 1909.13719) with 2 changes of magnitude 9 +- 0.5, growing stronger with it; augmix-..., original, v0, 3a;
    none: no policy. Costs about half a millisecond for an image of 32 px. Changes of colour are for 8-bit images of 1
    or 3 channels."""
    policy_parts: Literal["auto", "all", "geometric"] = "auto"
    """What of --auto-augment is done. all: everything; geometric: only its shears, shifts and rotations, which images
    of 16 bits, floats and any number of channels can take; auto: all for images of 8 bits and 1 or 3 channels, and
    geometric for others, unless --auto-augment is given, whose changes of colour are then refused for them."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this share. 0: not at all, as is usual beside RandAugment."""
    erase: float = 0.0
    """Probability with which a random box of an image is erased (arXiv 1708.04896)."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What stands in the erased box. pixel: noise; rand: one random colour; const: the mean colour."""
    erase_count: int = 1
    """Erased boxes of an image, at most; they share the area of one."""
    mixup: float = 0.8
    """Mixup's alpha (arXiv 1710.09412): images and labels of a batch are blended in pairs. 0: off."""
    cutmix: float = 1.0
    """CutMix's alpha (arXiv 1905.04899): a box of one image is pasted into another. 0: off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Smallest and largest share of CutMix's box sides, in place of --cutmix."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Whether a batch, a pair of images or an image has a blend of its own."""
    smoothing: float = 0.1
    """Label smoothing: this share of a label's weight is spread over all classes."""
    patch_drop: float = 0.0
    """Leave out this share of each image's patches in training, at random (arXiv 2208.07220): a step costs that much
    less. An encoder pretrained by masking knows such images. Scores are always of whole images."""
    clean_epochs: float = 0.0
    """In so many epochs at the end, images are whole and unmixed (no erasing, mixup, CutMix or --patch-drop), so that
    the weights settle on images as they are scored. Crops, flips and --auto-augment stay."""

    # ---- optimisation ----
    epochs: float | None = 100.0
    """Length of the run in passes over the training images (or give --steps)."""
    steps: int | None = None
    """Length of the run in optimiser steps (or give --epochs)."""
    warmup_epochs: float | None = 5.0
    """Linear warm-up in passes over the data (or give --warmup-steps)."""
    warmup_steps: int | None = None
    """Linear warm-up in optimiser steps (or give --warmup-epochs)."""
    batch_size: int = 1024
    """Images per optimiser step, over all processes and accumulation steps. Default: the preset's; for few images, the
    power of two that leaves an epoch 32 steps, from 8 on."""
    follow_images: tyro.conf.Suppress[tuple[Literal["batch_size", "lr"], ...]] = ()
    """What is still to be chosen by the number of training images, as no flag said it; no flag."""
    blr: float = 1e-3
    """Base learning rate: lr = blr x batch size / 256, at the head; each block below has --layer-decay of the next.
    Where neither rate nor batch is given, a batch that few images make smaller than 128 keeps the rate of 128."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    bias_weight_decay: bool = False
    """Weight decay on biases too."""
    norm_weight_decay: bool = False
    """Weight decay on the parameters of normalisations too."""
    ema: float | None = None
    """Keep an average of the weights that forgets with this factor a step, such as 0.9999, less so in the beginning
    (t / (t + 9) after t steps); it is what is evaluated, saved as the best and scored. Default: none."""
    compile: Literal["auto", "off", "blocks", "whole", "graphs"] = "auto"
    """torch.compile, as in maekit pretrain. auto: graphs or whole on CUDA, off elsewhere."""
    in_memory: Literal["auto", "yes", "no"] = "auto"
    """Decode all images once and keep them as uint8. auto: where they have one size and fit."""
    eval_every: float = 1.0
    """Epochs between two evaluations on the held-out images."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves, each naming the value, the rule and the flag."""
        found = super().problems()
        found += [
            f"--{flag(name)} {value:g}: must be above 0"
            for name in ("epochs", "steps", "blr", "eval_every", "erase_count", "resize_to")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        found += [
            f"--{flag(name)} {value:g}: must not be negative"
            for name in ("warmup_epochs", "warmup_steps", "clean_epochs", "mixup", "cutmix", "color_jitter", "pad")
            if (value := getattr(self, name)) is not None and not value >= 0
        ]
        found += [
            f"--{flag(name)} {value:g}: must lie between 0 and 1"
            for name in ("erase", "mixup_prob", "mixup_switch_prob", "max_bad_share")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        found += [
            f"--{flag(name)} {value:g}: must lie in [0, 1)"
            for name in ("smoothing", "patch_drop")
            if not 0 <= (value := getattr(self, name)) < 1
        ]
        if not 0 < self.train_share <= 1:
            found.append(f"--train-share {self.train_share:g}: must lie above 0 and at most at 1")
        if self.ema is not None and not 0 < self.ema < 1:
            found.append(f"--ema {self.ema:g}: must lie between 0 and 1, such as 0.9999")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            found.append(f"--crop-pct {self.crop_pct:g}: must lie above 0 and at most at 1")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            found.append(f"--crop-scale {low:g} {high:g}: needs 0 < smallest <= largest <= 1")
        if self.cutmix_minmax is not None and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            found.append(f"--cutmix-minmax {spaced(self.cutmix_minmax)}: needs 0 <= smallest < largest <= 1")
        if self.policy and not _POLICY.fullmatch(self.policy):
            found.append(
                f"--auto-augment {self.auto_augment}: no policy of timm's; such as rand-m9-mstd0.5-inc1 or none"
            )
        if self.policy_parts == "geometric" and self.policy.startswith("augmix"):
            found.append("--policy-parts geometric: nothing is left of augmix, whose blends are of colours")
        if self.from_scratch and self.eval:
            found.append("--from-scratch and --eval: there is nothing to score in weights that are thrown away")
        return found + duration_problems(self) + compile_problems(self.compile, self.accum) + self._mixing_problems()

    def adapt(self, typed: Collection[str]) -> None:
        """As for every task with labels; and unless --crop-pct is typed, what is scored again is read as it was, and
        what is trained by the size of the weights. A policy that is typed is wanted as it is."""
        super().adapt(typed)
        if "--auto-augment" in typed and "--policy-parts" not in typed:
            self.policy_parts = "all"
        if "--crop-pct" not in typed:
            self.crop_pct = None

    def seen_share(self, size_hw: tuple[int, int]) -> float | None:
        """`crop_pct` for weights of that size; None: as they were evaluated so far."""
        if self.crop_pct is None and not self.eval and PRESETS[self.preset].crop_pct is not None:
            return 1.0 if min(size_hw) > 224 else PRESETS[self.preset].crop_pct
        return self.crop_pct

    @property
    def policy(self) -> str:
        """timm's policy, empty for none."""
        return "" if self.auto_augment == "none" else self.auto_augment

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are blended with each other."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None)

    def _mixing_problems(self) -> list[str]:
        """Pairs are made within what one process takes at a time, which therefore must be even."""
        part = self.batch_size // max(1, self.accum)
        if self.mixes and self.batch_size > 0 and part % 2 and "batch_size" not in self.follow_images:
            return [
                f"--batch-size {self.batch_size} with --accum {self.accum}: mixup and CutMix pair the {part} images of "
                "a part, so it must be even (or --mixup 0 --cutmix 0)"
            ]
        return []


_FOLLOWING: Any = ("batch_size", "lr")
_SMALL: dict[str, Any] = {
    "follow_images": _FOLLOWING, "batch_size": 128, "blr": 1e-3, "layer_decay": 0.75, "crop": "pad-crop", "erase": 0.25,
}  # fmt: skip
PRESETS: dict[str, FinetuneConfig] = {
    "paper": FinetuneConfig(follow_images=_FOLLOWING, crop_pct=0.875),
    "official": FinetuneConfig(
        preset="official", follow_images=_FOLLOWING, crop_pct=0.875, blr=5e-4, layer_decay=0.65, erase=0.25
    ),
    "small": FinetuneConfig(preset="small", **_SMALL),
    "light": FinetuneConfig(preset="light", **_SMALL | {"auto_augment": "none"}),
}
"""Complete configs. paper: He et al. 2021, table 9 (ViT-B: 100 epochs, batch 1024, blr 1e-3, layer decay 0.75, drop
path 0.1, RandAugment (9, 0.5), label smoothing 0.1, mixup 0.8, cutmix 1.0, warm-up 5; RandomResizedCrop's usual 0.08).
official: FINETUNE.md of github.com/facebookresearch/mae. small: the same regularisation with the crops, random erasing
and batch of Compact Transformers on CIFAR (arXiv 2104.05704)."""


def preset_for(img_size: Sequence[int]) -> Preset:
    """Which preset suits an input size in pixels."""
    return "small" if max(img_size) <= SMALL_SIDE else "paper"


@dataclass(kw_only=True)
class PredictConfig(SourceConfig):
    """Write the classes of all images to a file: path, class, probability and the likeliest classes."""

    data: str = ""
    """What to look at: a folder, a Parquet file or folder, a .tar or .zip or a folder of them, a text file or CSV of
    paths, a known name, or hub:OWNER/NAME. Where it has labels of the classifier's classes, the accuracy is told
    too."""
    out: str = "predictions.parquet"
    """File to write; its ending says which form: .parquet or .csv."""
    part: Literal["train", "val", "test", "all"] = "all"
    """Which part of the data."""
    top: int = 5
    """How many of the likeliest classes are written for each image."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels."""
    batch_size: int = 256
    """Images per forward pass; changes speed and memory only."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, each naming the value, the rule and the flag."""
        found = [
            f"--{flag(name)} {value}: must be above 0"
            for name in ("top", "batch_size")
            if not (value := getattr(self, name)) > 0
        ]
        if not self.data:
            found.append("--data is missing: the images to look at")
        if not self.out.lower().endswith((".parquet", ".csv")):
            found.append(f"--out {self.out}: name a file that ends in .parquet or .csv")
        if self.workers is not None and self.workers < 0:
            found.append(f"--workers {self.workers}: must not be negative")
        return found
