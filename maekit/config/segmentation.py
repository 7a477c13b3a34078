"""Semantic segmentation: training a head (and the encoder) on pairs of images and class maps, scoring, predicting."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from maekit.config.base import UserError, did_you_mean, flag, spaced
from maekit.config.supervised import SupervisedConfig


@dataclass(frozen=True)
class HeadConfig:
    """What stands on the encoder: all that is needed to build it again."""

    kind: Literal["upernet", "fpn", "linear"] = "upernet"
    width: int = 512
    blocks: tuple[int, ...] | None = None
    """Counted from 1."""
    auxiliary: bool = False
    fuse_kernel: int = 3


@dataclass(kw_only=True)
class ViewConfig:
    """How an image is looked at when it is scored or predicted."""

    inference: Literal["whole", "slide"] | None = None
    """whole: the image at once, padded to a multiple of the patch; slide: windows, averaged where they overlap.
    Default: as the run was scored at its end; for a new run what its preset says."""
    window: int | None = None
    """slide: side of the window in pixels. Default: the training crop."""
    stride: int | None = None
    """slide: pixels from window to window. Default: two thirds of the window."""
    short_side: int | None = None
    """Resize images to this shorter side before they are scored; classes are still counted at the annotations' own
    size. Default: as in training (--resize-to)."""
    scales: tuple[float, ...] = (1.0,)
    """See each image at these relative sizes, and average; such as 0.75 1 1.25. Costs a pass for each."""
    flip_test: bool = False
    """Also see its mirror image. Doubles the cost."""

    def view_problems(self) -> list[str]:
        """What is wrong with these values, each naming the value, the rule and the flag."""
        found = [
            f"--{flag(name)} {value}: must be above 0"
            for name in ("window", "stride", "short_side")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            found.append(f"--scales {spaced(self.scales)}: give one or more numbers above 0, at most 16")
        if self.window is not None and self.stride is not None and self.stride > self.window > 0:
            found.append(f"--stride {self.stride}: is larger than --window {self.window}, so pixels would be left out")
        if self.inference == "whole" and (self.window is not None or self.stride is not None):
            found.append("--window and --stride belong to --inference slide")
        return found


@dataclass(kw_only=True)
class PairsConfig:
    """Which pairs of image and annotation, and how they are read."""

    classes: str | None = None
    """File of class names, one a line; or a table (CSV) with the columns name and value, or name, r, g and b for
    annotations that are pictures of colours. Default: classes.txt, class_dict.csv or _classes.csv beside the data, else
    the numbers themselves."""
    void: str | None = None
    """The value of pixels that belong to no class, in annotations as they are on disk. 0: values 1, 2, ... are the
    classes (ADE20K); 255: values 0, 1, ... are; none: every pixel has a class. Void counts in no loss and no score.
    Default: 0, but masks that are black and white (0 and 255, 65535 or 1, and no other value) have two classes and no
    void; with --eval what the run says, as for the flags below."""
    class_values: tuple[int, ...] | None = None
    """The values of the classes in annotations as they are on disk, in the order of --classes, where they do not count
    up by one: --class-values 0 128 255. Any other value but --void (here none by default) is a mistake. Default: as
    --void says; 0 and 255 for masks that are black and white."""
    image_pattern: str | None = None
    """Pairs by pattern: images relative to the data's folder, {} standing for the name that both files share, {part}
    for train, val or test, such as {part}/photos/{}.jpg."""
    annotation_pattern: str | None = None
    """Pairs by pattern: annotations, such as {part}/truth/{}_ids.png."""
    image_column: str | None = None
    """Parquet and tables: the column with the images."""
    annotation_column: str | None = None
    """Parquet and tables: the column with the annotations."""
    group_by: str | None = None
    """Never part the images of one patient, slide or scene: held-out images are whole groups. The column with the
    group's name (Parquet, tables), or a regular expression that is found in each image's path, such as 'patient[0-9]+',
    or '^([^/]+)/', where the brackets name the group."""

    def pair_problems(self) -> list[str]:
        """What is wrong with these values, each naming the value, the rule and the flag."""
        found = []
        values = self.class_values
        if values is not None and (
            len(values) < 2 or len({*values}) < len(values) or min(values) < 0 or max(values) > 65_535
        ):
            found.append(f"--class-values {spaced(values)}: give two or more different values from 0 to 65535")
        is_number = self.void is not None and self.void.isascii() and self.void.isdigit() and int(self.void) <= 65_535
        if self.void not in (None, "none") and not is_number:
            found.append(f"--void {self.void}: give a pixel value from 0 to 65535, or none")
        return found

    @property
    def void_value(self) -> int | None:
        """The value on disk of pixels without a class."""
        return None if self.void == "none" else int(self.void or 0)


@dataclass(kw_only=True)
class SegmentConfig(PairsConfig, ViewConfig, SupervisedConfig):
    """Train semantic segmentation on top of a pretrained encoder, and score it by mIoU.

    Of a finished run: maekit segment RUN --predict --help, and maekit segment RUN --eval --help.
    The best weights are chosen on a held-out part of the training images; the validation part is scored once, at the
    end.
    """

    preset: Literal["small", "ade20k"] = "small"
    """Where the defaults come from; any flag overrides them. small: hundreds of images, light enough for a CPU; ade20k:
    the paper's settings for ViT-B on 20,000 images (UperNet, 512 px, 160,000 iterations of 16 images)."""

    # ---- model ----
    head: Literal["upernet", "fpn", "linear"] = "upernet"
    """upernet: pyramid pooling and a feature pyramid on four blocks (the paper's); fpn: a light pyramid on the last
    block; linear: batch norm and one linear layer on the last block, encoder frozen: how good are the features?"""
    head_width: int = 512
    """Channels of upernet and fpn; the cost grows with its square."""
    blocks: tuple[int, ...] | None = None
    """Blocks whose outputs the head reads, counted from 1. Default: the last one; for upernet those at 1/3, 1/2, 2/3
    and the end of the depth (4 6 8 12 of 12, which others, who count from 0, call 3, 5, 7, 11)."""
    fuse_kernel: Literal[3, 1] = 3
    """upernet: kernel of the convolution that fuses the four levels. 3 is the paper's and 70 % of the head's cost; 1
    mixes them place by place, for little."""
    aux_weight: float = 0.4
    """upernet: weight of the loss of an auxiliary head on the third block, in training only. 0: no such head."""

    # ---- augmentation ----
    crop: tuple[int, ...] = (240,)
    """Training crop in pixels: one number, or height and width; multiples of the patch."""
    resize_to: int | None = None
    """Shorter side that images are resized to before everything else. Default: their own size."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Each training image is resized by a random factor between these before the crop."""
    flip: bool = True
    """Mirror half of the training images, with their annotations."""
    photometric: bool = True
    """Change brightness, saturation and hue of training images at random, as SSD does."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the images cannot be read. Ten are allowed in any case, up to a
    quarter of the images; 0: not one."""
    class_weights: Literal["none", "sqrt"] = "none"
    """sqrt: a pixel counts in the loss by 1 over the root of its class's share of the training pixels, so that rare
    classes are heard; their mean over the pixels is 1."""

    # ---- length ----
    steps: int = 1000
    """Length in optimiser steps (iterations). Accumulation does not change it."""
    warmup_steps: int = 100
    """Linear warm-up in optimiser steps. A shorter run than the preset's keeps the share."""
    schedule: Literal["poly", "cosine"] = "poly"
    """After the warm-up: poly falls linearly to --min-lr (power 1, as in the paper's transfer); cosine: half a wave."""

    # ---- scoring ----
    eval_every: int = 250
    """Optimiser steps between two scores on the held-out images, which decide what best.safetensors is."""
    score: Literal["last", "best"] = "last"
    """Which weights are scored on the validation part at the end: the last ones, or the best on held-out images."""
    overlays: int = 6
    """Images in overlays.png."""

    @property
    def head_config(self) -> HeadConfig:
        """The head alone."""
        auxiliary = self.head == "upernet" and self.aux_weight > 0
        return HeadConfig(self.head, self.head_width, self.blocks, auxiliary, self.fuse_kernel)

    @property
    def crop_hw(self) -> tuple[int, int]:
        """Height and width of the training crop."""
        return (self.crop[0], self.crop[-1])

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves, each naming the value, the rule and the flag."""
        found = super().problems() + self.pair_problems() + self.view_problems()
        found += [
            f"--{flag(name)} {value}: must be above 0"
            for name in ("head_width", "steps", "eval_every", "resize_to")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        found += [
            f"--{flag(name)} {value:g}: must not be negative"
            for name in ("warmup_steps", "aux_weight", "overlays")
            if not (value := getattr(self, name)) >= 0
        ]
        if not 1 <= len(self.crop) <= 2 or min(self.crop, default=0) < 1:
            found.append(f"--crop {spaced(self.crop)}: give one size, or height and width, above 0")
        if self.warmup_steps > self.steps > 0:
            found.append(f"--warmup-steps {self.warmup_steps} is longer than the run (--steps {self.steps})")
        low, high = self.scale_range
        if not 0 < low <= high <= 16:
            found.append(f"--scale-range {low:g} {high:g}: needs 0 < smallest <= largest <= 16")
        if not 0 <= self.max_bad_share <= 1:
            found.append(f"--max-bad-share {self.max_bad_share:g}: must lie between 0 and 1")
        if self.head == "linear" and self.grad_checkpoint:
            found.append("--grad-checkpoint: the encoder is frozen under --head linear, so there is nothing to spare")
        return found


PRESETS: dict[str, dict[str, Any]] = {
    # For 367 images of 360 x 480 and a ViT-Tiny of 6 blocks: 21 minutes of one CPU core (RESULTS.md, CamVid).
    "small": {
        "head_width": 128, "fuse_kernel": 1, "crop": (192,), "batch_size": 8, "steps": 700, "warmup_steps": 70,
        "layer_decay": 0.8, "drop_path": 0.1, "inference": "slide", "eval_every": 350, "overlays": 6,
        "class_weights": "sqrt",
    },
    # arXiv 2111.06377, appendix A.3 and table 5 (48.1 mIoU), with what its reproduction in MMSegmentation (48.13) adds:
    # width 768, layer decay 0.65, learning rate 1e-4, 1500 steps of warm-up, windows of 512 px every 341.
    "ade20k": {
        "head_width": 768, "crop": (512,), "resize_to": 512, "batch_size": 16, "steps": 160_000, "warmup_steps": 1500,
        "lr": 1e-4, "layer_decay": 0.65, "drop_path": 0.1, "weight_decay": 0.05, "inference": "slide", "window": 512,
        "stride": 341, "eval_every": 16_000, "heldout_share": 0.02, "log_every": 50,
    },
}  # fmt: skip
"""Values of the presets, where they differ from the defaults of the fields."""


def preset(name: str) -> SegmentConfig:
    """The complete config that a preset stands for.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: no such preset; {did_you_mean(name, PRESETS)}")
    values: dict[str, Any] = {"task": "segment", "preset": name, **PRESETS[name]}
    return SegmentConfig(**values)


def preset_of(words: Sequence[str]) -> str:
    """The preset that a command line names, `small` where it names none."""
    for index, word in enumerate(words):
        if word == "--preset" and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--preset="):
            return word.partition("=")[2]
    return "small"


def adapted(config: SegmentConfig, typed: Collection[str]) -> SegmentConfig:
    """What the flags that were typed mean for the preset's other values.

    A shorter run keeps the share of its warm-up, and a linear head its own rate.
    """
    base = PRESETS[config.preset]
    config.adapt(typed)
    if config.inference == "whole" and not {"--window", "--stride"} & set(typed):
        config.window = config.stride = None
    if "--window" in typed and "--stride" not in typed:
        config.stride = None
    if "--warmup-steps" not in typed and config.steps < base["steps"]:
        config.warmup_steps = int(base["warmup_steps"] / base["steps"] * config.steps)
    if config.head == "linear" and "--lr" not in typed:
        config.lr = None  # a preset's is for all layers
    return config


@dataclass(kw_only=True)
class SegmentPredictConfig(ViewConfig):
    """Predict the class of each pixel of images of any size, with the weights of a segmentation run."""

    predict: tuple[str, ...]
    """Image files, or folders of images."""
    out: str
    """Folder for NAME.png (class numbers with a palette) and NAME-overlay.png of each image; new or empty. Value 1 is
    the first class and 0 never occurs, whatever --void was: subtract 1 to compare with annotations that begin at 0.
    Of a run on masks of 0 and 255, or with --class-values, they are masks of these values."""
    score: Literal["last", "best"] = "last"
    """Which weights of the run: the last ones, or the best on its held-out images."""
    overlays: bool = True
    """Also write the overlays."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves."""
        return self.view_problems() + ([] if self.predict else ["--predict: name at least one image or folder"])


@dataclass(kw_only=True)
class SegmentScoreConfig(PairsConfig, ViewConfig):
    """Score the weights of a segmentation run again: with windows, flips or scales, or on other data."""

    eval: tyro.conf.Suppress[bool] = True
    """What chose this command; no flag of its own."""
    data: str | None = None
    """Pairs of image and annotation. Default: the run's."""
    part: Literal["validation", "heldout"] = "validation"
    """validation: the validation part, for a report; heldout: the training images that the run held out, for
    choices."""
    score: Literal["last", "best"] = "last"
    """Which weights of the run: the last ones, or the best on its held-out images."""
    out: str | None = None
    """File for the scores (JSON). Default: RUN/score.json."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves."""
        found = self.view_problems() + self.pair_problems()
        if self.workers is not None and self.workers < 0:
            found.append(f"--workers {self.workers}: must not be negative")
        return found
