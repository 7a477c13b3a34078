"""Pretraining: its data, its model, its optimisation, and what tests a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from maekit.config.base import compile_problems, duration_problems, flag, spaced

MAX_MASK_RATIO = 0.95
"""Above this share of hidden patches a ViT-B/16 sees fewer than ten patches of a 224 px image."""


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are read."""

    data: str = ""
    """What to train on: photos, digits, cifar10, cifar100, a folder, a Parquet file or folder, a .tar or .zip (not
    compressed as a whole), a folder in one (photos.zip/train), a folder of them such as WebDataset's shards, a text
    file of paths, a CSV or TSV with a column of paths (file_name) and if you like of labels and parts (split), or a
    data set of the Hugging Face hub: hub:OWNER/NAME, with @REVISION or /CONFIGURATION behind if need be. Labels are
    not needed. Where there are parts (train/, val/, test/), only the training part is trained on."""
    out: str = ""
    """Folder of the run. It must not hold another run. Default: runs/RECIPE."""
    or_resume: bool = False
    """Where --out holds the run that this very command began, go on with it: for jobs that are started again."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths. Default: the first image column, or file_name."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels. Default: the first class-label column, or label."""
    group_by: str | None = None
    """Never part the images of one patient, slide or scene: the held-out images are whole groups. The column with the
    group's name (Parquet, tables), or a regular expression that is found in each image's path, such as 'patient[0-9]+',
    or '^([^/]+)/', where the brackets name the group."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of the pixels in 0..1. Default: measured on up to 10,000 training images."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation of the pixels in 0..1. Default: measured together with the mean."""
    heldout_share: float = 0.02
    """Share of the training images that is never trained on: held-out loss, panels and online probes use it."""
    train_images: int | None = None
    """Train on so many of the images that are not held out: those with the lowest hash of their id, so a larger number
    adds to a smaller one and every run takes the same. Default: all."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the images cannot be read. Ten are allowed in any case, up to a
    quarter of the images; 0: not one."""


@dataclass(kw_only=True)
class ModelConfig:
    """What the model is and what it learns: all that is needed to build it again, as the passport stores it."""

    model: str = "mae_vit_base_patch16"
    """mae_vit_base_patch16, mae_vit_large_patch16, mae_vit_huge_patch14, or any timm VisionTransformer by name."""
    img_size: tuple[int, ...] = (224,)
    """Input size in pixels: one number, or height and width."""
    in_chans: int = 3
    """Channels of the input. With 3, grayscale images are replicated."""
    patch_size: int | None = None
    """Side of a patch in pixels. Default: the model's own."""
    embed_dim: int | None = None
    """Width of the encoder. Default: the model's own."""
    depth: int | None = None
    """Blocks of the encoder. Default: the model's own."""
    num_heads: int | None = None
    """Attention heads of the encoder. Default: the model's own."""
    mlp_ratio: float | None = None
    """Width of the encoder's MLP over its own width. Default: the model's own."""
    head_dim: int | None = None
    """Width of each attention head of the encoder, whatever its number of heads. Default: --embed-dim / --num-heads."""
    mlp_act: Literal["between", "both"] = "between"
    """Where the encoder's MLP has its GELU. between: between its two layers (ViT); both: after each of them (the Keras
    tutorial), which keeps the branch from taking much away from its input."""
    class_token: bool | None = None
    """Whether the encoder has a class token. Default: as the model has it."""
    reg_tokens: int | None = None
    """Register tokens of the encoder (arXiv 2309.16588). Default: as the model has it."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """Position embedding of the encoder: fixed 2-D sine-cosine as in the paper, or learned."""
    drop_path: float = 0.0
    """Stochastic depth in the encoder. The paper pretrains without."""
    decoder: Literal["self", "cross", "flat"] = "self"
    """self: self-attention over visible and mask tokens (the paper); cross: mask tokens read the encoder's blocks by
    cross-attention and not each other (CrossMAE, arXiv 2401.14391): less work, and less still with --predict-share;
    flat: the Keras tutorial's, which writes the whole image with one layer from all tokens in shuffled order."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    predict_share: float | None = None
    """cross only: share of all patches that is predicted and scored in training, at most --mask-ratio; a random part
    of the hidden ones, anew each time. CrossMAE takes 0.25. Default: all hidden patches."""

    mask: Literal["random", "block", "grid"] = "random"
    """Which patches are hidden: at random (the paper), in blocks, or all but a regular grid."""
    mask_ratio: float = 0.75
    """Share of the patches that is hidden from the encoder, 0 to 0.95."""
    target: Literal["pixels", "norm-pixels", "norm-pixels-highpass", "norm-pixels-whitened"] = "norm-pixels"
    """What the decoder predicts: pixels; norm-pixels: normalised by each patch's own mean and deviation;
    norm-pixels-highpass: these without the patch's lowest frequencies, which hold most of the variance and little of
    what tells things apart (arXiv 2402.11337); norm-pixels-whitened: each frequency times itself, as natural images
    have about its inverse."""
    target_cut: int = 2
    """norm-pixels-highpass only: frequencies (row + column of the patch's discrete cosine transform) below this number
    are left out. 1: the mean of each channel; 2: its slopes as well, which leaves 27 % of the variance of CIFAR-10's
    patches of 4 px."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return (self.img_size[0], self.img_size[-1])


@dataclass(kw_only=True)
class PretrainConfig(ModelConfig, DataConfig):
    """Pretrain a vision transformer by masked autoencoding (He et al. 2021, arXiv 2111.06377)."""

    recipe: tyro.conf.Suppress[str] = "custom"
    """Name of the recipe that the defaults come from; no flag."""

    # ---- what it begins with ----
    init: str = ""
    """Weights to begin with, of any source that maekit reads, with a schedule of their own (to go on with a run:
    maekit resume). Mean and deviation are then theirs, unless the recipe or a flag says others. Default: random
    weights."""
    first_values: Literal["xavier", "keras"] = "xavier"
    """Random weights. xavier: as in the paper; keras: as Keras has them, with attention's smaller (its fans are those
    of a three-dimensional kernel) and learned positions uniform within 0.05."""
    init_decoder: bool = True
    """Take the decoder along where --init has one."""
    decoder_warmup_epochs: float | None = None
    """Epochs in which the decoder alone is trained. Default: a twentieth of the run where --init has no decoder."""
    weights_license: tyro.conf.Suppress[str] = ""
    """Licence that comes with --init; no flag."""

    # ---- augmentation ----
    crop: Literal["random-resized", "resize-crop", "pad-crop", "none"] = "random-resized"
    """random-resized: the paper's (bicubic); resize-crop: resize to --resize-to, then a random crop; pad-crop: the
    whole image, shifted by up to --pad pixels, its edge mirrored (usual at 32 px); none: the centre, resized."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """random-resized: smallest and largest share of the image's area in a crop."""
    resize_to: int | None = None
    """resize-crop: the shorter side before the crop. Default: the longer side of the input x 9/8."""
    pad: int = 4
    """pad-crop: the largest shift in pixels, each way."""
    flip: bool = True
    """Mirror half of the images."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized, in training and on held-out images; antialiased where they shrink."""
    crop_pct: float = 1.0
    """Share of the shorter side that is seen of held-out images, and later by all that reads images for these weights:
    they are resized to the input size / this, and cut at the centre. 0.875 at 224 px is the official code's (256)."""

    masks_per_image: int = 1
    """Masked views of each image in a batch, for where reading images is the limit: they are decoded and cropped once,
    and the model works so many times. --batch-size and the learning rate go on counting images."""

    # ---- optimisation ----
    epochs: float | None = 800.0
    """Length of the run in passes over the data (or give --steps)."""
    steps: int | None = None
    """Length of the run in optimiser steps (or give --epochs)."""
    warmup_epochs: float | None = 40.0
    """Linear warm-up in passes over the data (or give --warmup-steps)."""
    warmup_steps: int | None = None
    """Linear warm-up in optimiser steps (or give --warmup-epochs)."""
    batch_size: int = 4096
    """Images per optimiser step, over all processes and accumulation steps. Recipe folder, without this flag: few
    images take the power of two that leaves an epoch 32 steps, from 8 on, and --lr 5e-4 with it."""
    accum: int = 1
    """Gradient accumulation: each process splits its share of a batch into this many parts."""
    follow_images: tyro.conf.Suppress[tuple[Literal["batch_size", "lr"], ...]] = ()
    """What is still to be chosen by the number of training images, as no flag said it; no flag."""
    blr: float = 1.5e-4
    """Base learning rate: lr = blr x batch size / 256, and x predicted share / mask ratio with --predict-share."""
    lr: float | None = None
    """Peak learning rate itself; overrides --blr."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on one-dimensional parameters and tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    adam_eps: float = 1e-8
    """AdamW's epsilon: a weight whose gradient is not far above it moves less than the others."""
    clip_grad: float | None = None
    """Clip the gradient to this norm. The paper does not clip."""
    max_bad_steps: int = 5
    """A step with a non-finite loss or gradient is skipped. After so many in a row the run goes back to a checkpoint
    and halves the learning rate; the next time it stops."""

    # ---- machine ----
    seed: int = 0
    """Seed of weights, order, crops, flips and masks."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products; loss and normalisation stay in float32."""
    compile: Literal["auto", "off", "blocks", "whole", "graphs"] = "auto"
    """torch.compile. blocks: each block by itself, quick to compile; whole: the model; graphs: the model, and
    each step replayed as one CUDA graph, for one process without --accum. auto: graphs or whole on CUDA, else off."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores. Not used where the data fit in memory."""
    grad_checkpoint: bool = False
    """Compute the blocks of encoder and decoder again in the backward pass: less memory, about a third more time, the
    same numbers."""
    in_memory: Literal["auto", "yes", "no"] = "auto"
    """Keep all images on the device as uint8. auto: where they have one size and fit."""
    processes: int | None = None
    """The number of processes that you mean to run on; another number is an error."""

    # ---- monitoring and saving ----
    log_every: int = 20
    """Optimiser steps between two lines of metrics.jsonl."""
    eval_every: float = 1.0
    """Epochs between two held-out losses."""
    probe_every: float = 5.0
    """Epochs between two online probes (k-NN, linear; needs labels) and feature ranks. 0: never."""
    panel_every: float = 5.0
    """Epochs between two panels of reconstructions. 0: only at the end."""
    save_every: float = 1.0
    """Epochs between two checkpoints."""
    save_minutes: float = 10.0
    """A checkpoint is written at least this often, in minutes."""
    max_unsaved_minutes: float = 60.0
    """Where checkpoints fail (a full disk), training goes on and tries again; after so many minutes it stops."""
    keep: int = 2
    """Checkpoints that are kept."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Also log there, through Accelerate. metrics.jsonl is always written."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves, each naming the value, the rule and the flag."""
        found = [
            f"--{flag(name)} {value:g}: must be above 0"
            for name in ("epochs", "steps", "batch_size", "accum", "log_every", "eval_every", "save_every", "keep",
                         "save_minutes", "max_unsaved_minutes", "max_bad_steps", "decoder_dim", "decoder_heads",
                         "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "head_dim", "mlp_ratio", "blr",
                         "lr", "clip_grad", "resize_to", "processes", "masks_per_image", "train_images", "target_cut",
                         "adam_eps")
            if (value := getattr(self, name)) is not None and not value > 0
        ]  # fmt: skip
        found += [
            f"--{flag(name)} {value:g}: must not be negative"
            for name in ("warmup_epochs", "warmup_steps", "workers", "weight_decay", "min_lr", "drop_path",
                         "decoder_depth", "reg_tokens", "decoder_warmup_epochs", "probe_every", "panel_every", "seed",
                         "pad")
            if (value := getattr(self, name)) is not None and not value >= 0
        ]  # fmt: skip
        found += self._choice_problems() + duration_problems(self) + self._decoder_problems()
        found += compile_problems(self.compile, self.accum)
        if not self.data:
            found.append(
                "--data is missing: a folder of images, a Parquet file, a .tar or .zip, a text file of paths, "
                "hub:OWNER/NAME, or a "
                "known name"
            )
        if not 0 <= self.mask_ratio <= MAX_MASK_RATIO:
            found.append(f"--mask-ratio {self.mask_ratio:g}: must lie between 0 and {MAX_MASK_RATIO}")
        if not 0 < self.crop_pct <= 1:
            found.append(f"--crop-pct {self.crop_pct:g}: must lie above 0 and at most at 1")
        if not 1 <= len(self.img_size) <= 2 or min(self.img_size, default=0) < 1:
            found.append(f"--img-size {spaced(self.img_size)}: give one size, or height and width, above 0")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            found.append(f"--crop-scale {low:g} {high:g}: needs 0 < smallest <= largest <= 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"--betas {spaced(self.betas)}: each must lie in [0, 1)")
        if not 0 < self.heldout_share < 1:
            found.append(f"--heldout-share {self.heldout_share:g}: must lie between 0 and 1")
        if not 0 <= self.max_bad_share <= 1:
            found.append(f"--max-bad-share {self.max_bad_share:g}: must lie between 0 and 1")
        if (self.mean is None) != (self.std is None):
            found.append("--mean and --std go together: give both or neither")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                found.append(f"--{name} has {len(values)} values, but --in-chans is {self.in_chans}")
        if self.std is not None and min(self.std, default=1.0) <= 0:
            found.append(f"--std {spaced(self.std)}: must be above 0")
        if self.decoder_warmup_epochs and self.epochs is not None and self.decoder_warmup_epochs >= self.epochs:
            found.append(f"--decoder-warmup-epochs {self.decoder_warmup_epochs:g} is as long as the run")
        if self.accum > 0 and self.batch_size % self.accum and "batch_size" not in self.follow_images:
            found.append(f"--batch-size {self.batch_size} is not divisible by --accum {self.accum}")
        if self.crop == "resize-crop" and self.resize_to is not None and self.resize_to < max(self.img_size):
            found.append(f"--resize-to {self.resize_to} is smaller than --img-size {spaced(self.img_size)}")
        if self.crop == "pad-crop" and self.pad >= min(self.img_size, default=1) > 0:
            found.append(f"--pad {self.pad}: must be smaller than --img-size {spaced(self.img_size)}")
        return found

    def _decoder_problems(self) -> list[str]:
        found, share = [], self.predict_share
        if self.decoder == "flat":
            found += self._flat_problems()
        elif self.decoder_heads > 0 and self.decoder_dim % self.decoder_heads:
            found.append(f"--decoder-dim {self.decoder_dim} is not divisible by --decoder-heads {self.decoder_heads}")
        if self.decoder != "flat" and self.decoder_dim % 4:
            found.append(f"--decoder-dim {self.decoder_dim}: 2-D sine-cosine positions need a multiple of 4")
        if self.decoder in ("self", "cross") and self.decoder_depth == 0:
            found.append(
                f"--decoder-depth 0: a --decoder {self.decoder} without blocks never reads the encoder; give at least 1"
            )
        if share is not None and self.decoder != "cross":
            found.append(
                f"--predict-share {share:g}: in --decoder {self.decoder} every hidden patch helps to predict the rest, "
                "so none may be left out; take --decoder cross, or leave --predict-share away"
            )
        if share is not None and not 0 < share <= self.mask_ratio:
            found.append(
                f"--predict-share {share:g}: must be above 0 and at most --mask-ratio {self.mask_ratio:g}, since only "
                "hidden patches are predicted; it is a share of all patches"
            )
        return found

    def _flat_problems(self) -> list[str]:
        found = []
        if self.target != "pixels":
            found.append(f"--target {self.target}: --decoder flat ends in a sigmoid, so give --target pixels")
        if set(self.mean or ()) != {0.0} or set(self.std or ()) != {1.0}:
            zeros, ones = (" ".join([value] * max(1, self.in_chans)) for value in "01")
            found.append(f"--decoder flat gives pixels in 0..1: it needs --mean {zeros} --std {ones}")
        return found

    def _choice_problems(self) -> list[str]:
        device = self.device.split(":")[0]
        if device not in ("auto", "cpu", "cuda", "mps"):
            return [f"--device {self.device}: choose auto, cpu, cuda or mps"]
        return []


@dataclass(kw_only=True)
class SelftestConfig:
    """Prove on this machine that a stopped run continues exactly: stop, resume, and compare every bit."""

    data: str = ""
    """What to train on. Default: the recipe's."""
    steps: int = 24
    """Optimiser steps of each run. A very small model needs more, for the signal to come in time."""
    stops: int = 3
    """How many runs are stopped and resumed, at evenly spaced steps."""
    batch_size: int | None = None
    """Images per optimiser step. Default: the recipe's."""
    accum: int | None = None
    """Gradient accumulation. Default: the recipe's."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products."""
    device: str = "auto"
    """auto, cpu, cuda or mps. Bit-equality is promised on a CPU."""
    out: str | None = None
    """Folder in which the runs stay. Default: a temporary one, removed at the end."""


@dataclass(kw_only=True)
class DemoConfig:
    """Pretrain on bundled photographs, evaluate, draw a panel: two minutes on two CPU cores, no network."""

    out: str = "runs/demo"
    """Folder of the run; runs/demo-2 and so on where it holds one already."""
    epochs: float | None = None
    """Length of the pretraining. Default: the recipe's."""
