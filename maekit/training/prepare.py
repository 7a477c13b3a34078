"""Everything before the first step: config and folder checked, machine chosen, data opened, model built."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from rich.console import Console

from maekit.compiling import choose_compile
from maekit.config import PretrainConfig, UserError
from maekit.data.levels import levels_remark
from maekit.data.loader import (
    Ids,
    Pool,
    Quarantine,
    SampleOrder,
    channel_statistics,
    choose_training,
    open_pool,
    split_heldout,
)
from maekit.data.sources import lasting, open_configured
from maekit.data.speed import worker_images_per_second
from maekit.data.workers import choose_workers
from maekit.models.blocks import start_as_keras
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder, model_problems
from maekit.processes import check_batch, check_processes, start_accelerator
from maekit.runtime import Choice, choose_attention, choose_device, choose_precision
from maekit.seeding import seed_everything, seed_step
from maekit.terminal import counting, print_settings, remark
from maekit.training import lock
from maekit.training.advice import few_steps
from maekit.training.batch import follow_images, short_run_rate
from maekit.training.initial import load_start, take_over, with_start
from maekit.training.metrics import MetricsLog
from maekit.training.optim import duration_steps, make_optimizer, peak_learning_rate
from maekit.training.run import Job, Position, describe
from maekit.training.saving import restore
from maekit.weights.passport import size_problems


def prepare(config: PretrainConfig, resume_from: Path | None, console: Console, again: bool = False) -> Job:
    """Check the config, open the data, build the model, take up a checkpoint, print what was chosen."""
    into_new = resume_from is None and not again
    out = check(config, into_new)
    lock.take(out, fresh=into_new)
    choices, accelerator = open_machine(config, out, goes_on=not into_new)
    start = load_start(config) if config.init and resume_from is None else None
    source = open_configured(config, config.in_chans)
    remark(console, source.remarks())
    part = source.train
    train_ids, heldout_ids = split_heldout(len(part), config.heldout_share, groups_N=part.groups)
    train_ids = choose_training(train_ids, config.train_images)
    config = follow_images(config, len(train_ids), accelerator.num_processes, short_run_rate, console)
    order = SampleOrder(train_ids, config.batch_size, config.seed)
    with counting(console, "reading images") as progress:
        pool, choices["in memory"] = open_pool(part, config, accelerator.device, choices["workers"], progress)
    if start is not None:
        config = with_start(config, start, order.steps_per_epoch)
        remark(console, levels_remark([part], config.mean or (), config.std or ()))
    loader_speed = 0.0 if choices["in memory"].value else worker_images_per_second(part, config)
    mean, std = statistics(config, pool, train_ids, console)
    config = dataclasses.replace(config, mean=mean, std=std)
    seed_everything(config.seed)
    model = MaskedAutoencoder(config, mean, std).to(accelerator.device)
    if config.first_values == "keras":
        start_as_keras(model)
    if start is not None:
        take_over(model, start, console)
    use_fused_attention(model, choices["attention"].value)
    model.set_grad_checkpointing(config.grad_checkpoint)
    config = settled(config, model, out, choices)
    peak_lr, peak_reason = peak_learning_rate(config)
    total = duration_steps(config.epochs, config.steps, order.steps_per_epoch)
    decoder_only = duration_steps(config.decoder_warmup_epochs, None, order.steps_per_epoch)
    if decoder_only >= total > 1:
        raise UserError(
            f"--decoder-warmup-epochs {config.decoder_warmup_epochs:g}: the decoder alone for {decoder_only:,} of "
            f"{total:,} steps, so the encoder would never be trained"
        )
    warmup = duration_steps(config.warmup_epochs, config.warmup_steps, order.steps_per_epoch)
    job = Job(
        config=config, out=out, console=console, accelerator=accelerator, data_name=source.name, part=part, pool=pool,
        train_ids=train_ids, heldout_ids=heldout_ids, order=order, model=model,
        optimizer=make_optimizer(model, config, peak_lr), peak_lr=peak_lr, warmup_steps=min(warmup, total),
        decoder_only=decoder_only,
        position=Position(total, fingerprint=part.fingerprint), metrics=MetricsLog(out / "metrics.jsonl"),
        quarantine=Quarantine(out / "quarantine.jsonl", part, config.max_bad_share), choices=choices,
        loader_speed=loader_speed,
    )  # fmt: skip
    if accelerator.process_index:  # all began with the same weights; what --drop-path drops must differ
        seed_step(config.seed, 0, accelerator.process_index)
    if resume_from is not None:
        restore(job, resume_from)
    print_settings(console, f"maekit pretrain {config.recipe}", {**describe(job, peak_reason), **choices})
    if resume_from is None:
        remark(console, few_steps(config, total, order.steps_per_epoch, accelerator.num_processes))
    return job


def statistics(
    config: PretrainConfig, pool: Pool, train_ids: Ids, console: Console
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel: those of the config, or measured."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    with counting(console, "measuring mean and deviation") as progress:
        mean, std = channel_statistics(pool, train_ids, progress)
    return tuple(mean), tuple(std)


def check(config: PretrainConfig, into_new: bool) -> Path:
    """Refuse whatever is wrong with the config or the output folder, all at once; returns the folder."""
    problems = size_problems(config) or config.problems() + model_problems(config)
    out = Path(config.out or f"runs/{config.recipe}")
    if into_new and not lock.is_free(out):
        problems.append(
            f"--out {out}: is not empty: maekit resume {out} continues the run in it; else name another one"
        )
    if problems:
        raise UserError(*problems)
    return out


class MachineConfig(Protocol):
    """A config that says how a run uses a machine."""

    device: str
    precision: Literal["auto", "fp32", "bf16"]
    compile: Literal["auto", "off", "blocks", "whole", "graphs"]
    workers: int | None
    processes: int | None
    batch_size: int
    accum: int
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...]
    follow_images: tuple[Any, ...]


def choose_machine(config: MachineConfig, local_processes: int, world: int = 1) -> dict[str, Choice[Any]]:
    """Device, precision, kernels and loader processes, each with its reason; so many trainers share the cores.

    world: processes of the whole run.
    """
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    return {
        "device": device,
        "precision": precision,
        "attention": choose_attention(device.value, precision.value),
        "compile": choose_compile(config.compile, device.value, alone=world * config.accum == 1),
        "workers": choose_workers(config.workers, local_processes),
    }


def open_machine(
    config: MachineConfig, out: Path, unit: int = 1, goes_on: bool = False
) -> tuple[dict[str, Choice[Any]], Accelerator]:
    """What was chosen of this machine, and Accelerate's handle on the processes of the run.

    unit: what the images that a process takes at a time must be a multiple of. A batch that is yet to follow the number
    of images is left to `follow_images`.
    goes_on: the run is resumed, and so keeps its batch.
    """
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    choices = choose_machine(config, local, world)
    accelerator = start_accelerator(choices["device"].value, config.trackers, out)
    check_processes(config.processes, accelerator.num_processes)
    if "batch_size" not in config.follow_images:
        check_batch(config.batch_size, config.accum, accelerator.num_processes, unit, goes_on)
    return choices, accelerator


def settled(
    config: PretrainConfig, model: MaskedAutoencoder, out: Path, choices: dict[str, Choice[Any]]
) -> PretrainConfig:
    """The config with every choice that touches the numbers fixed, since a resume must not choose anew."""
    return dataclasses.replace(
        config,
        **{f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)},
        data=lasting(config.data),
        out=str(out),
        precision=choices["precision"].value,
        in_memory="yes" if choices["in memory"].value else "no",
    )
