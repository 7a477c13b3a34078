"""Everything before the first step of a segmentation run: config, weights, data, model, optimiser, checkpoint.

Shapes: K classes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from maekit.config import SourceConfig, UserError
from maekit.config.segmentation import PairsConfig, SegmentConfig, ViewConfig
from maekit.data.levels import levels_remark
from maekit.data.loader import Ids, Quarantine, SampleOrder, split_heldout
from maekit.data.pair_transforms import AugmentPlan
from maekit.data.pairs import PairPart, Pairs, PartCheck, open_checked, refuse_one_class
from maekit.data.parts import left_out_remark
from maekit.data.quarantine import allowed_bad, share_for, too_many
from maekit.data.sources import lasting, short_name
from maekit.data.workers import choose_workers
from maekit.environment import package_versions
from maekit.models.encoder import build_encoder, set_eps, use_fused_attention
from maekit.models.segmentation import Segmenter
from maekit.processes import check_batch, check_processes, start_accelerator
from maekit.runtime import Choice, choose_attention, choose_device, choose_precision
from maekit.seeding import seed_everything
from maekit.stopping import StopRequest
from maekit.terminal import counting, remark
from maekit.training.saving import never_began
from maekit.training.segmentation_inference import View
from maekit.training.segmentation_job import SegmentJob
from maekit.training.supervised import Position, SupervisedRun, claim, layer_decay_groups, seed_name
from maekit.weights.passport import Passport
from maekit.weights.segmenters import KIND, dense_encoder, head_facts
from maekit.weights.sources import read_passport
from maekit.weights.store import WEIGHTS_FILE, load_as, random_model

MIN_HELDOUT = 4
"""Held-out images at least."""
USUAL_HEAD = SegmentConfig.head
DEFAULT_LR = {"linear": 5e-3, "upernet": 1e-3, "fpn": 1e-3}
"""Peak learning rates where neither the user nor the preset says one: a linear layer alone can take more."""


def prepare(config: SegmentConfig, resuming: bool, console: Console, stop: StopRequest) -> SegmentJob:
    """Check the config, read the weights, check the data, build the model, take up a checkpoint.

    Raises:
        UserError: everything that is wrong with the config, before anything is read; then with weights and data.
    """
    if problems := config.problems():
        raise UserError(*problems)
    out = Path(config.out) if config.out else default_out(config)
    claim(out, fresh=not resuming)
    fresh = not resuming or never_began(out)
    choices = machine_for_pairs(config)
    accelerator = start_accelerator(choices["device"].value, config.trackers, out)
    world = accelerator.num_processes
    check_processes(config.processes, world)
    check_batch(config.batch_size, config.accum, world)
    encoder, source = start_encoder(config, console) if fresh else continued_encoder(out)
    pairs, checks = open_data(config, source, choices["workers"].value, console)
    check_share(config, pairs, checks["train"], resuming)
    refuse_one_class(pairs, checks["train"], config.data)
    groups_N = pairs.train.images.groups
    train_ids, heldout_ids = split_heldout(len(pairs.train), config.heldout_share, MIN_HELDOUT, groups_N)
    seed_everything(config.seed)
    model = Segmenter(encoder, config.head_config, len(pairs.class_names), source.mean, source.std)
    check_batch_norm(config, model.patch_size, config.batch_size // world // config.accum)
    use_fused_attention(model, choices["attention"].value)
    if config.grad_checkpoint:
        model.set_grad_checkpointing()
    model.to(accelerator.device)
    if world > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    config = settled(config, model, out, choices, pairs)
    position = Position(config.steps, fingerprint=pairs.train.fingerprint)
    passport = dataclasses.replace(
        source, kind=KIND, classes=tuple(pairs.class_names), head=head_facts(model), data=pairs.name, steps=0,
        fingerprint=pairs.train.fingerprint, recipe=f"segment {config.preset}", versions=package_versions(),
        origin=source.origin if not fresh else "" if config.begins_at_random else config.source,
        model=dataclasses.replace(source.model, img_size=config.crop_hw, drop_path=config.drop_path),
        grid=(config.crop_hw[0] // model.patch_size, config.crop_hw[1] // model.patch_size),
    )  # fmt: skip
    run = SupervisedRun(
        config=config, out=out, console=console, accelerator=accelerator, model=model,
        optimizer=make_optimizer(model, config), position=position, stop=stop,
        passport=lambda: dataclasses.replace(
            passport, steps=run.position.step, epochs=run.position.step * config.batch_size / len(train_ids)
        ),
    )  # fmt: skip
    if not fresh:
        run.restore()
    return SegmentJob(
        run=run, config=config, pairs=pairs, checks=checks, train_ids=train_ids, heldout_ids=heldout_ids,
        order=SampleOrder(train_ids, config.batch_size, config.seed), model=model, view=view_of(config, config.crop_hw),
        plan=AugmentPlan(config.crop_hw, config.scale_range, config.resize_to, flip=0.5 if config.flip else 0.0,
                         photometric=config.photometric, fill=tuple(source.mean)),
        weights_K=class_weights(config, pairs.train, train_ids, accelerator.device), choices=choices, fresh=fresh,
        quarantine=Quarantine(out / "quarantine.jsonl", pairs.train.images, config.max_bad_share),
    )  # fmt: skip


def default_out(config: SegmentConfig) -> Path:
    """segment-NAME (segment-NAME-linear, -scratch, -seed1 where head, start and seed are others than usual, and any of
    them together in this order) in the folder of the source's run, else here.
    """
    base = Path(config.source) if Path(config.source).is_dir() else Path()
    name = short_name(os.path.expanduser(config.data)) + ("" if config.head == USUAL_HEAD else f"-{config.head}")
    return base / f"segment-{name}{'-scratch' if config.from_scratch else ''}{seed_name(config.seed)}"


def machine_for_pairs(config: Any) -> dict[str, Choice[Any]]:
    """Device, precision, attention kernel and loader processes, each with its reason."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    return {
        "device": device,
        "precision": precision,
        "attention": choose_attention(device.value, precision.value),
        "workers": choose_workers(getattr(config, "workers", None), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    }


def start_encoder(config: SegmentConfig, console: Console) -> tuple[Any, Passport]:
    """The source's encoder at the crop's size, or one of its architecture with random weights; and its passport."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)}
    loaded = load_as(config.source, SourceConfig(**{**given, "encoder_only": True}))
    passport: Passport = loaded.passport
    if config.from_scratch:
        loaded = random_model(loaded.config, tuple(passport.mean), tuple(passport.std), seed=config.seed)
        # As images are read for the source, but nobody else's weights: neither their licence nor their origin.
        passport = dataclasses.replace(
            loaded.passport, interpolation=passport.interpolation, crop_pct=passport.crop_pct, grid=passport.grid
        )
        console.print("the encoder begins with random weights (--from-scratch)")
    else:
        remark(console, loaded.key_report.remarks())
    return dense_encoder(loaded, config.crop_hw, config.drop_path), passport


def continued_encoder(out: Path) -> tuple[Any, Passport]:
    """An encoder of the architecture that the run's own weights speak of, to be filled from a checkpoint."""
    passport = read_passport(out / WEIGHTS_FILE)
    encoder: Any = build_encoder(passport.model)
    set_eps(encoder, passport.eps)
    return encoder, passport


def open_data(
    config: PairsConfig, weights: Passport, workers: int, console: Console, data: str = ""
) -> tuple[Pairs, dict[str, PartCheck]]:
    """The pairs of --data, every annotation checked; prints what a user should know of them."""
    where, in_chans = data or getattr(config, "data", ""), weights.model.in_chans
    with counting(console, "checking annotations") as progress:
        pairs, checks = open_checked(where, config, in_chans=in_chans, workers=workers, on_progress=progress)
    images = [part.images for part in pairs.parts.values()]
    remark(console, [*pairs.notes, *left_out_remark(images), *levels_remark(images, weights.mean, weights.std)])
    for what, check in checks.items():
        if check.bad_images:
            index, reason = check.bad_images[0]
            console.print(f"[yellow]unreadable:[/yellow] {len(check.bad_images):,} images of {what}, such as "
                          f"{escape(pairs.parts[what].name(index))}: {escape(reason)}")  # fmt: skip
        if check.turned:
            console.print(f"[yellow]turned by EXIF:[/yellow] {check.turned:,} images of {what}; their annotations are "
                          "taken as drawn on the upright image, unless their size says otherwise")  # fmt: skip
    absent = [name for name, count in zip(pairs.class_names, checks["train"].class_pixels, strict=True) if not count]
    if absent:
        console.print(f"[yellow]in no training pixel:[/yellow] {escape(', '.join(absent[:12]))}")
    return pairs, checks


def check_share(config: SegmentConfig, pairs: Pairs, check: PartCheck, resuming: bool) -> None:
    """Stop where more training images than are allowed cannot be read, as their headers tell.

    Raises:
        UserError: their number, the first ones, and what to do.
    """
    bad, images = len(check.bad_images), len(pairs.train)
    if bad > allowed_bad(config.max_bad_share, images):
        lines = (f"{pairs.train.name(index)}: {reason}" for index, reason in check.bad_images)
        begin = "begin a new run" if resuming else "try again"
        way_out = (
            f"Mend them, or remove them with their annotations, and {begin}; --max-bad-share "
            f"{share_for(bad, images)} goes on without them"
        )
        raise UserError(f"--data {config.data}: {too_many(bad, images, config.max_bad_share, lines, way_out)}")


def check_batch_norm(config: SegmentConfig, patch: int, images: int) -> None:
    """Refuse a batch whose coarsest map has a single value a channel: batch norm has nothing to average there.

    Raises:
        UserError: one image of so few patches on a process.
    """
    rows, columns = (side // patch for side in config.crop_hw)
    if config.head != "linear":
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    if images * rows * columns < 2:
        raise UserError(
            f"--crop {' '.join(map(str, config.crop))}: with one image on a process, batch norm needs a larger crop "
            f"(at least {3 * patch} px), a larger --batch-size, or a lower --accum"
        )


def settled(
    config: SegmentConfig, model: Segmenter, out: Path, choices: dict[str, Choice[Any]], pairs: Pairs
) -> SegmentConfig:
    """The config with every choice that touches the numbers fixed, since a resume must not choose anew."""
    void = pairs.numbering.void
    return dataclasses.replace(
        config,
        void="none" if void is None else str(void),
        class_values=pairs.numbering.values,
        task="segment",
        data=lasting(config.data),
        out=str(out),
        precision=choices["precision"].value,
        blocks=tuple(index + 1 for index in model.block_ids),
        lr=DEFAULT_LR[config.head] if config.lr is None else config.lr,
    )


def view_of(config: ViewConfig, crop_hw: tuple[int, int], run: ViewConfig | None = None) -> View:
    """How images are looked at: as the config says, else as the run was scored, else whole; windows like the crop."""

    def said(name: str) -> Any:
        value = getattr(config, name)
        return getattr(run, name) if value is None and run is not None else value

    slides = said("inference") == "slide" or config.window is not None or config.stride is not None
    side = said("window")
    window = ((side, side) if side else crop_hw) if slides and config.inference != "whole" else None
    short = said("short_side") or getattr(run or config, "resize_to", None)
    return View(window, said("stride") if window else None, short, config.scales, config.flip_test)


def make_optimizer(model: Segmenter, config: SegmentConfig) -> torch.optim.AdamW:
    """AdamW with layer decay in the encoder; a frozen encoder has no part in it."""
    groups = layer_decay_groups(model, model.encoder, config.weight_decay, config.layer_decay)
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused)


def class_weights(config: SegmentConfig, train: PairPart, ids: Ids, device: torch.device) -> Tensor | None:
    """Weights [K] of the classes in the loss: mean 1 over the pixels of these ids; classes without pixels get 1."""
    if config.class_weights == "none":
        return None
    pixels_K = train.class_pixels(ids)
    share_K = pixels_K / max(1, pixels_K.sum())
    weights_K = np.ones(len(share_K))
    weights_K[share_K > 0] = share_K[share_K > 0] ** -0.5
    weights_K[share_K > 0] /= (share_K * weights_K).sum()
    return torch.tensor(weights_K, dtype=torch.float32, device=device)
