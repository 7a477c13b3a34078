"""Everything before the first step of fine-tuning: weights read, labels checked, data opened, classifier built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from rich.console import Console
from timm.layers import PatchDropout
from timm.utils import ModelEmaV3
from torch import Tensor

from maekit.config import FinetuneConfig, PretrainConfig, SourceConfig, UserError
from maekit.data.labelled import Splits, open_augmented, split_labelled
from maekit.data.levels import remarks_for
from maekit.data.loader import Ids, Pool, Quarantine, SampleOrder
from maekit.data.sources import Source, lasting, open_configured, short_name
from maekit.environment import package_versions
from maekit.models.classifier import Classifier
from maekit.models.encoder import EPS, set_eps, use_fused_attention
from maekit.processes import near_batches
from maekit.runtime import Choice
from maekit.seeding import seed_everything, seed_step
from maekit.stopping import StopRequest
from maekit.terminal import counting, remark
from maekit.training import checkpoint as checkpoints
from maekit.training import supervised
from maekit.training.augmenting import choose_augment
from maekit.training.batch import finetuning_rate, follow_images
from maekit.training.mixing import Mixing
from maekit.training.optim import duration_steps
from maekit.training.prepare import open_machine
from maekit.training.saving import never_began
from maekit.training.supervised import Position, SupervisedRun, seed_name
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.sources import read_passport
from maekit.weights.store import load_as


@dataclass(frozen=True)
class Start:
    """What a run begins with: what the encoder is, and its weights (None: at random)."""

    passport: Passport
    encoder: Mapping[str, Tensor] | None
    origin: str = ""
    license: str = ""


@dataclass
class FinetuneJob:
    """A fine-tuning that is ready to step."""

    config: FinetuneConfig
    run: SupervisedRun
    model: Classifier
    source: Source
    splits: Splits
    pool: Pool
    order: SampleOrder
    mixing: Mixing
    quarantine: Quarantine
    choices: dict[str, Choice[Any]]
    peak_lr: float
    warmup_steps: int
    clean_from: int
    """Steps done when the last --clean-epochs begin."""
    labels: Tensor
    """Class ids of all images of the training part, on the device."""
    averaged: ModelEmaV3 | None
    """The average of the weights, where one is kept."""
    fresh: bool
    """Whether the run begins at step 0."""

    @property
    def evaluated(self) -> Classifier:
        """The model that is measured and kept: the averaged one where there is one."""
        if self.averaged is None:
            return self.model
        model: Classifier = self.averaged.module
        return model

    @property
    def epochs_done(self) -> float:
        """Passes over the training images so far."""
        return self.run.position.step / self.order.steps_per_epoch

    def begin_step(self) -> None:
        """Seed what the next step draws at random, and leave its images whole and unmixed if it is a clean one.

        The step's number decides, so a resumed run does the same.
        """
        step = self.run.position.step
        seed_step(self.config.seed, step, self.run.accelerator.process_index)
        self.mixing.is_off = step >= self.clean_from
        if self.config.patch_drop:
            self.model.encoder.patch_drop.prob = 0.0 if self.mixing.is_off else self.config.patch_drop


def prepare(config: FinetuneConfig, out: Path, console: Console, stop: StopRequest, resumed: bool) -> FinetuneJob:
    """Check the config, take the folder, read the weights, open the data, build the model; then take up a checkpoint.

    Raises:
        UserError: everything that is wrong with the config, before anything is read; then what is wrong with the rest.
    """
    if problems := config.problems():
        raise UserError(*problems)
    supervised.claim(out, fresh=not resumed)
    fresh = not resumed or never_began(out)
    if resumed and fresh:
        console.print("killed before its first checkpoint: the run begins at step 0")
    choices, accelerator = open_paired_machine(config, out)
    start = load_start(config, console) if fresh else start_of_run(out)
    model_config = start.passport.model
    config = dataclasses.replace(config, crop_pct=config.seen_share(model_config.size_hw))
    check_boxes(config, model_config.size_hw)
    source = open_configured(config, model_config.in_chans)
    remark(console, remarks_for(source, start.passport.mean, start.passport.std))
    splits = split_labelled(source, config.data, config.heldout_share, config.train_share)
    if not fresh and splits.classes != start.passport.classes:
        raise UserError(f"--data {config.data}: labels of other classes than {out} was trained on")
    config, order = with_order(config, splits.train_ids, accelerator.num_processes, console)
    reading = reading_config(config, start.passport)
    config, augment = choose_augment(config, splits, reading.size_hw, start.passport.mean, console)
    with counting(console, "reading images") as progress:
        pool, choices["in memory"] = open_augmented(
            splits.train, reading, accelerator.device, choices["workers"], augment, progress
        )
    config = settled(config, out, choices)
    model = build_model(config, start, splits.classes, accelerator.device)
    use_fused_attention(model, choices["attention"].value)
    model.set_grad_checkpointing(config.grad_checkpoint)
    averaged = ema_of(model, config.ema) if config.ema is not None else None
    total = duration_steps(config.epochs, config.steps, order.steps_per_epoch)
    warmup = duration_steps(config.warmup_epochs, config.warmup_steps, order.steps_per_epoch)
    peak = config.lr if config.lr is not None else config.blr * config.batch_size / 256
    run = SupervisedRun(
        config=config, out=out, console=console, accelerator=accelerator, model=model,
        optimizer=make_optimizer(model, config, peak), position=Position(total, fingerprint=splits.train.fingerprint),
        passport=lambda: passport_of(job, start), stop=stop, ema=None if averaged is None else averaged.module,
    )  # fmt: skip
    assert splits.train.labels is not None
    job = FinetuneJob(
        config=config, run=run, model=model, source=source, splits=splits, pool=pool, order=order,
        mixing=Mixing(config, len(splits.classes), accelerator.device),
        quarantine=Quarantine(out / "quarantine.jsonl", splits.train, config.max_bad_share), choices=choices,
        peak_lr=peak, warmup_steps=min(warmup, total),
        clean_from=total - round(config.clean_epochs * order.steps_per_epoch),
        labels=torch.tensor(splits.train.labels, device=accelerator.device), averaged=averaged,
        fresh=fresh,
    )  # fmt: skip
    if not fresh:
        run.restore()
    return job


def with_order(
    config: FinetuneConfig, train_ids: Ids, world: int, console: Console
) -> tuple[FinetuneConfig, SampleOrder]:
    """The config with the batch and rate that follow from the number of images, and which of them each step sees."""
    parts = world * (2 if config.mixes else 1)  # pairs are mixed within a process
    config = follow_images(config, len(train_ids), parts, finetuning_rate, console)
    return config, SampleOrder(train_ids, config.batch_size, config.seed)


def ema_of(model: Classifier, decay: float) -> ModelEmaV3:
    """timm's average of a model's weights; its memory grows with the run, to a ninth of the steps done, up to `decay`.

    timm's own exponent would reach 0.9999 after a million steps only.
    """
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


def open_paired_machine(config: FinetuneConfig, out: Path) -> tuple[dict[str, Choice[Any]], Accelerator]:
    """`open_machine`, where mixup and CutMix also need an even number of images on each process.

    Raises:
        UserError: another number of processes than was asked for, or a batch that they cannot share.
    """
    unit = 2 if config.mixes else 1
    choices, accelerator = open_machine(config, out, unit)
    world = accelerator.num_processes
    part = config.batch_size // (world * config.accum)
    if part % unit and "batch_size" not in config.follow_images:
        raise UserError(
            f"--batch-size {config.batch_size}: {world} processes x --accum {config.accum} take {part} images at a "
            f"time, and mixup and CutMix pair them: it must be even, as of "
            f"{near_batches(config.batch_size, unit * world * config.accum)} (or --mixup 0 --cutmix 0)"
        )
    return choices, accelerator


def check_boxes(config: FinetuneConfig, size_hw: tuple[int, int]) -> None:
    """Refuse shares of a side that timm, which takes whole pixels from the smaller up to below the larger, cannot draw.

    Raises:
        UserError: they are the same number of pixels.
    """
    if config.cutmix_minmax is None:
        return
    low, high = config.cutmix_minmax
    for side in size_hw:
        if int(side * low) >= int(side * high):
            raise UserError(
                f"--cutmix-minmax {low:g} {high:g}: both are {int(side * low)} of {side} pixels; "
                "take them further apart"
            )


def load_start(config: FinetuneConfig, console: Console) -> Start:
    """The encoder that the source holds, or its architecture alone where the run is to begin from scratch.

    Raises:
        UserError: no such source, or weights that do not fit.
    """
    given = SourceConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)})
    given.encoder_only = not config.source.startswith("random:")
    model = load_as(config.source, given)
    passport: Passport = model.passport
    if not config.begins_at_random:
        report = model.key_report  # its decoder has no place in a classifier, which needs no word
        report.missing = [name for name in report.missing if not name.startswith("decoder.")]
        report.unused = [name for name in report.unused if not name.startswith("decoder.")]
        remark(console, report.remarks())
    if config.begins_at_random:
        return Start(dataclasses.replace(passport, eps=EPS), None)
    return Start(passport, model.encoder.state_dict(), config.source, passport.weights_license)


def start_of_run(out: Path) -> Start:
    """What a run that goes on is, from the passport in its newest checkpoint: its source is not needed again.

    Raises:
        UserError: no whole checkpoint.
    """
    path, _ = checkpoints.latest(out / "checkpoints")
    if path is None:
        raise UserError(f"{out}: no whole checkpoint; start again with maekit finetune into another folder")
    passport = read_passport(path / checkpoints.MODEL)
    if passport.kind != "classifier":
        raise UserError(f"{path}: holds no classifier but a {passport.kind!r}")
    return Start(passport, None, passport.origin, passport.weights_license)


def build_model(config: FinetuneConfig, start: Start, classes: tuple[str, ...], device: torch.device) -> Classifier:
    """The classifier with the encoder's weights, a new linear layer, and this run's stochastic depth and patches."""
    passport = start.passport
    seed_everything(config.seed)
    sized = dataclasses.replace(passport.model, drop_path=config.drop_path)
    model = Classifier(sized, classes, passport.mean, passport.std, config.pool)
    if start.encoder is not None:
        model.take_encoder(start.encoder)
    set_eps(model, passport.eps)
    if config.patch_drop:
        model.encoder.patch_drop = PatchDropout(config.patch_drop, num_prefix_tokens=model.num_prefix)
    return model.to(device)


def make_optimizer(model: Classifier, config: FinetuneConfig, peak_lr: float) -> torch.optim.AdamW:
    """AdamW with a learning rate for each layer, weight decay on matrices, and where it is asked for on the rest."""
    groups = supervised.layer_decay_groups(model, model.encoder, config.weight_decay, config.layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    split: list[dict[str, Any]] = []
    for group in groups:
        more = [p for p in group["params"] if p.ndim <= 1 and _wants_decay(names[id(p)], config)]
        rest = [p for p in group["params"] if not any(p is other for other in more)]
        split += [{**group, "params": more, "weight_decay": config.weight_decay}] if more else []
        split += [{**group, "params": rest}] if rest else []
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
    return torch.optim.AdamW(split, lr=peak_lr, betas=config.betas, fused=fused)


def _wants_decay(name: str, config: FinetuneConfig) -> bool:
    """Whether weight decay is asked for on a one-dimensional parameter."""
    is_norm = any(word.endswith("norm") or word.startswith("norm") for word in name.split(".")[:-1])
    return config.norm_weight_decay if is_norm else config.bias_weight_decay and name.endswith(".bias")


def reading_config(config: FinetuneConfig, passport: Passport) -> PretrainConfig:
    """What the pools of images must know, in the words of a pretraining."""
    names = ("crop", "crop_scale", "resize_to", "pad", "flip", "seed", "heldout_share", "max_bad_share", "in_memory")
    reading = passport.reading(config.data, **{name: getattr(config, name) for name in names})
    return reading if config.crop_pct is None else dataclasses.replace(reading, crop_pct=config.crop_pct)


def settled(config: FinetuneConfig, out: Path, choices: dict[str, Choice[Any]]) -> FinetuneConfig:
    """The config with every choice that touches the numbers fixed, since a resume must not choose anew."""
    return dataclasses.replace(
        config,
        task="finetune",
        data=lasting(config.data),
        out=str(out),
        precision=choices["precision"].value,
        in_memory="yes" if choices["in memory"].value else "no",
    )


def passport_of(job: FinetuneJob, start: Start) -> Passport:
    """What the weights at this position say about themselves."""
    model = job.model
    passport = Passport(
        model=model.config, mean=tuple(start.passport.mean), std=tuple(start.passport.std), kind="classifier",
        interpolation=start.passport.interpolation, classes=model.classes,
        crop_pct=reading_config(job.config, start.passport).crop_pct,
        head=HeadFacts(kind="linear", pool=model.pool), eps=start.passport.eps,
        grid=model.grid_hw, steps=job.run.position.step, epochs=job.epochs_done, data=job.source.name,
        fingerprint=job.splits.train.fingerprint, recipe=f"finetune, {job.config.preset}", origin=start.origin,
        versions=package_versions(),
    )  # fmt: skip
    if start.license:
        passport.weights_license = start.license
    return passport


def describe(job: FinetuneJob) -> dict[str, str | Choice[Any]]:
    """The run's settings with their arithmetic, for the reader who wants to check it."""
    config, splits, run = job.config, job.splits, job.run
    world, total, per_epoch = run.accelerator.num_processes, run.position.total_steps, job.order.steps_per_epoch
    model, depth = job.model, len(job.model.encoder.blocks)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rate = f"{job.peak_lr:.3g}" + ("" if config.lr else f" = {config.blr:g} x {config.batch_size} / 256")
    changes = [f"{config.crop} crops" + (f" of {config.crop_scale[0]:g} to {config.crop_scale[1]:g}"
                                         if config.crop == "random-resized" else "")]  # fmt: skip
    changes += ["flips"] if config.flip else []
    only = " (of it shears, shifts and rotations)" if config.policy_parts == "geometric" else ""
    changes += [config.policy + only] if config.policy else []
    changes += [f"colour jitter {config.color_jitter:g}"] if config.color_jitter else []
    changes += [f"erasing {config.erase:g}"] if config.erase else []
    changes += [f"{config.patch_drop:g} of the patches left out"] if config.patch_drop else []
    if config.mixes:
        changes.append(f"mixup {config.mixup:g}, CutMix {config.cutmix:g}")
    if config.clean_epochs:
        changes.append(f"images whole and unmixed in the last {config.clean_epochs:g} epochs")
    return {
        "data": f"{config.data}: {len(splits.train_ids):,} images to train on, {len(splits.heldout_ids):,} held out, "
        f"{len(splits.classes)} classes",
        "report": f"{splits.test_what}: {len(splits.test_ids):,} images, scored once, at the end",
        "run": str(run.out),
        "begins with": "random weights" if config.begins_at_random else config.source,
        "model": f"{model.config.model}, {millions:.2f} M parameters, pooling by "
        f"{'the mean' if model.pool == 'mean' else 'the class token'}, drop path {config.drop_path:g}",
        "preset": config.preset,
        "augmentation": ", ".join(changes) + f"; label smoothing {config.smoothing:g}",
        "batch": f"{config.batch_size} = {config.batch_size // world // config.accum} images x {world} "
        f"process{'es' if world > 1 else ''} x {config.accum} accumulation step{'s' if config.accum > 1 else ''}",
        "learning rate": f"{rate} at the head, x {config.layer_decay:g} for each block below: "
        f"{job.peak_lr * config.layer_decay ** (depth + 1):.2g} at the patches; {job.warmup_steps:,} steps of warm-up, "
        f"then a cosine to {config.min_lr:g}",
        "length": f"{total:,} steps = {total / per_epoch:.4g} epochs x {per_epoch:,} steps",
        **job.choices,
    }


def labels_in(part_labels: npt.NDArray[np.int64], mapping: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A part's labels as a classifier's class ids; -1 stays."""
    return np.where(part_labels >= 0, mapping[np.maximum(part_labels, 0)], -1).astype(np.int64)


def default_out(source: str, config: FinetuneConfig) -> Path:
    """finetune-NAME (scratch-NAME, eval-NAME) in the source's run, else here; a share of the labels and a seed other
    than 0, which are what one experiment varies, have their own: finetune-NAME-share0.1-seed1.
    """
    base = Path(source).expanduser()
    verb = "eval" if config.eval else "scratch" if config.from_scratch else "finetune"
    share = f"-share{config.train_share:g}" if config.train_share != 1 and not config.eval else ""
    name = f"{short_name(os.path.expanduser(config.data))}{share}{seed_name(0 if config.eval else config.seed)}"
    return (base if base.is_dir() else Path()) / f"{verb}-{name}"
