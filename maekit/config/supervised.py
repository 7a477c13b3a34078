"""What training on labels is told, whatever the labels are: classes of images (finetune) or of pixels (segment)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import tyro

from maekit.config.base import flag
from maekit.config.weights import SourceConfig


@dataclass(kw_only=True)
class SupervisedConfig(SourceConfig):
    """Fields that every task with labels shares. The source of weights stands in front of the flags."""

    task: tyro.conf.Suppress[str] = ""
    """Which task wrote this config; no flag."""
    source: tyro.conf.Suppress[str] = ""
    """The source of weights; no flag."""

    data: str = ""
    """Labelled data."""
    out: str = ""
    """Folder of the run; it must not hold another one. Default: in the source's run, or here: finetune-NAME,
    scratch-NAME (--from-scratch), eval-NAME (--eval), or segment-NAME; what --train-share, --head, --from-scratch and
    --seed say beyond the usual follows, as in segment-NAME-linear-scratch-seed1."""
    or_resume: bool = False
    """Where --out holds the run that this very command began, go on with it: for jobs that are started again."""
    from_scratch: bool = False
    """Begin with random weights, the architecture being that of the source: what the pretraining is to be compared
    with."""
    heldout_share: float = 0.1
    """Share of the training images that is never trained on: the best checkpoint is chosen on them."""

    # ---- optimisation ----
    batch_size: int = 32
    """Images per optimiser step, over all processes and accumulation steps."""
    accum: int = 1
    """Gradient accumulation: each process splits its share of a batch into this many parts; the length stays."""
    lr: float | None = None
    """Peak learning rate of the head; --layer-decay says what the blocks below it have of it."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on one-dimensional parameters and tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    layer_decay: float = 0.75
    """The learning rate shrinks by this factor from each block to the one before it (BEiT, arXiv 2106.08254). 1: the
    same rate everywhere, which is the default of random weights."""
    drop_path: float = 0.1
    """Stochastic depth in the encoder: it grows from 0 at the first block to this at the last."""
    clip_grad: float | None = None
    """Clip the gradient to this norm. Default: no clipping."""
    max_bad_steps: int = 5
    """A step with a non-finite loss or gradient is skipped. After so many in a row the run stops."""

    # ---- machine ----
    seed: int = 0
    """Seed of the head's weights, the order and every augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products; the loss stays in float32."""
    workers: int | None = None
    """Processes that decode and augment images. Default: chosen from the cores."""
    grad_checkpoint: bool = False
    """Compute the encoder's blocks again in the backward pass: less memory, more time, the same numbers."""
    processes: int | None = None
    """The number of processes that you mean to run on; another number is an error."""

    # ---- monitoring and saving ----
    log_every: int = 20
    """Optimiser steps between two lines of metrics.jsonl."""
    save_minutes: float = 10.0
    """A checkpoint is written at least this often, in minutes."""
    max_unsaved_minutes: float = 60.0
    """Where checkpoints fail (a full disk), training goes on and tries again; after so many minutes it stops."""
    keep: int = 1
    """Checkpoints that are kept."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Also log there, through Accelerate. metrics.jsonl is always written."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values by themselves, each naming the value, the rule and the flag."""
        found = [
            f"--{flag(name)} {value:g}: must be above 0"
            for name in ("batch_size", "accum", "log_every", "save_minutes", "max_unsaved_minutes", "keep", "lr",
                         "clip_grad", "max_bad_steps", "processes")
            if (value := getattr(self, name)) is not None and not value > 0
        ]  # fmt: skip
        found += [
            f"--{flag(name)} {value:g}: must not be negative"
            for name in ("weight_decay", "min_lr", "workers", "seed")
            if (value := getattr(self, name)) is not None and not value >= 0
        ]
        if not self.data:
            found.append("--data is missing: what to train on, with labels")
        if not 0 < self.layer_decay <= 1:
            found.append(f"--layer-decay {self.layer_decay:g}: must lie above 0 and at most at 1")
        if not 0 <= self.drop_path < 1:
            found.append(f"--drop-path {self.drop_path:g}: must lie in [0, 1)")
        if not 0 < self.heldout_share < 1:
            found.append(f"--heldout-share {self.heldout_share:g}: must lie between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"--betas {' '.join(f'{beta:g}' for beta in self.betas)}: each must lie in [0, 1)")
        follows = "batch_size" in getattr(self, "follow_images", ())
        if self.accum > 0 and self.batch_size % self.accum and not follows:
            found.append(f"--batch-size {self.batch_size} is not divisible by --accum {self.accum}")
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
            found.append(f"--device {self.device}: choose auto, cpu, cuda or mps")
        return found

    @property
    def begins_at_random(self) -> bool:
        """Whether the encoder begins with random weights."""
        return self.from_scratch or self.source.startswith("random:")

    def adapt(self, typed: Collection[str]) -> None:
        """Random weights have no layers to be careful with, so they are trained at one rate unless --layer-decay is
        among the flags that were typed: a comparison must not handicap them.
        """
        if self.begins_at_random and "--layer-decay" not in typed:
            self.layer_decay = 1.0
