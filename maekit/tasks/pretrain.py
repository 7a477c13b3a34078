"""Pretrain by masked autoencoding: one job, one file, from the config to the last checkpoint.

    maekit pretrain cifar10 --data cifar10 --out runs/c10
    maekit resume runs/c10
    torchrun --nproc_per_node 2 -m maekit pretrain cifar10 --data cifar10 --out runs/c10

`main` reads: prepare everything, say what was chosen and why, train, say what to type next.
Cost and expected numbers: see the recipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from maekit.config import PretrainConfig, ResumeConfig, UserError
from maekit.configfile import from_json, to_json
from maekit.data.loader import (
    Quarantine,
    SampleOrder,
    channel_statistics,
    choose_workers,
    lowest_hash,
    open_pool,
    split_heldout,
)
from maekit.data.sources import open_source
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder, model_problems
from maekit.rng import Purpose
from maekit.runtime import (
    Choice,
    StopRequest,
    check_processes,
    choose_attention,
    choose_compile,
    choose_device,
    choose_precision,
    compile_or_eager,
    environment,
    seed_everything,
    start_accelerator,
)
from maekit.terminal import counting, make_console, make_progress, print_settings
from maekit.training.checkpoint import latest
from maekit.training.metrics import MetricsLog
from maekit.training.monitor import PANEL_IMAGES, heldout_masks, reconstruct, statistics_note
from maekit.training.optim import (
    duration_steps,
    learning_rate,
    make_optimizer,
    peak_learning_rate,
    set_learning_rate,
)
from maekit.training.run import (
    Job,
    Position,
    evaluate,
    log_training,
    measure_trivial,
    probe,
    report_unreadable,
    restore,
    save,
)
from maekit.viz.panels import compose, draw
from maekit.viz.plots import draw_curves
from maekit.weights.store import WEIGHTS_FILE


def main(config: PretrainConfig, resume_from: Path | None = None) -> int:
    """Train from the start, or from a checkpoint's folder on.

    Returns: the exit code: 0, or 128 + the signal's number when a signal stopped the run.

    Raises:
        UserError: everything that is wrong with the config, before any data is read; then what is wrong with the data.
    """
    job = prepare(config, resume_from, make_console())
    config, model, position, accelerator = job.config, job.model, job.position, job.accelerator
    if position.step == position.total_steps:
        job.console.print(
            f"the run is finished; --epochs or --steps makes it longer: maekit resume {job.out} --epochs N"
        )
        return 0
    step_model = accelerator.prepare_model(model, evaluation_mode=accelerator.num_processes == 1)
    forward = compile_or_eager(step_model, job.console.print) if job.choices["compile"].value else step_model.__call__
    bf16 = job.choices["precision"].value == "bf16"
    every = {
        name: max(1, round(epochs * job.order.steps_per_epoch)) if epochs > 0 else 0
        for name, epochs in (("eval", config.eval_every), ("probe", config.probe_every),
                             ("panel", config.panel_every), ("save", config.save_every))
    }  # fmt: skip
    if resume_from is None:
        measure_trivial(job)
    steps = range(position.step, position.total_steps)
    batches = job.pool.train_batches(
        job.order.micro_batches(steps, accelerator.process_index, accelerator.num_processes, config.accum)
    )
    loss_sum = torch.tensor(position.loss_sum, device=accelerator.device)
    stop = StopRequest()
    began = saved = logged = time.monotonic()
    logged_step = first_step = position.step
    model.train()
    with (
        stop.listening(),
        make_progress(
            job.console,
            "loss {task.fields[loss]:.4f}",
            "skill {task.fields[skill]:.3f}",
            "{task.fields[speed]} images/s",
        ) as progress,
    ):
        bar = progress.add_task("epoch 1", total=position.total_steps, loss=math.nan, skill=math.nan, speed="-")
        for step in steps:
            lr = learning_rate(
                step, position.total_steps, job.warmup_steps, job.peak_lr, config.min_lr, position.schedule_start
            )
            set_learning_rate(job.optimizer, lr)
            epoch = step // job.order.steps_per_epoch
            for part_number in range(config.accum):
                batch = next(batches)
                if batch.bad:
                    report_unreadable(job, batch.bad)
                masks = model.draw_masks(batch.sample_ids, seed=config.seed, epoch=epoch).to(accelerator.device)
                images = model.normalize(batch.images)
                # Earlier parts add up on their own process; the backward pass of the last one averages over all.
                lonely = part_number < config.accum - 1
                with accelerator.no_sync(step_model) if lonely else contextlib.nullcontext():
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                        output = forward(images, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM)
                    loss = output.loss / config.accum
                    loss.backward()
                loss_sum += loss.detach()
            if config.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            job.optimizer.step()
            job.optimizer.zero_grad(set_to_none=True)
            position.step, position.loss_count = step + 1, position.loss_count + 1

            # ---- the step is done; what follows happens now and then, and never changes a weight ----
            last = position.step == position.total_steps
            if position.step % config.log_every == 0 or last:
                now = time.monotonic()
                speed = (position.step - logged_step) * config.batch_size / (now - logged)
                value, skill = log_training(job, loss_sum, lr, speed, now - began)
                loss_sum.zero_()
                position.loss_count, logged, logged_step = 0, now, position.step
                progress.update(bar, loss=value, skill=skill, speed=f"{speed:,.0f}")
            progress.update(bar, completed=position.step, description=f"epoch {epoch + 1}")
            paused = time.monotonic()
            if position.step % every["eval"] == 0 or last:
                evaluate(job)
                say_heldout(job, first_step, paused - began)
            if every["probe"] and (position.step % every["probe"] == 0 or last):
                probe(job)
            if last or (every["panel"] and position.step % every["panel"] == 0):
                draw_pictures(job)
            stopping, due = stop.agreed(accelerator, position.step, paused - saved > 60 * config.save_minutes)
            if last or stopping or due or position.step % every["save"] == 0:
                position.loss_sum = float(accelerator.reduce(loss_sum, "mean"))
                save(job)
                saved = time.monotonic()
            logged += time.monotonic() - paused  # images/s is about training alone
            if stopping and not last:
                job.console.print(f"stopped by {stop.name} after step {position.step:,}: maekit resume {job.out}")
                return stop.exit_code
    accelerator.end_training()
    finish(job, first_step, time.monotonic() - began)
    return 0


def prepare(config: PretrainConfig, resume_from: Path | None, console: Console) -> Job:
    """Check the config, open the data, build the model, print what was chosen, and start the run's folder."""
    out = check(config, resume_from)
    choices, accelerator = open_machine(config, out)
    source = open_source(
        config.data, in_chans=config.in_chans, image_column=config.image_column, label_column=config.label_column
    )
    part = source.train
    train_ids, heldout_ids = split_heldout(len(part), config.heldout_share)
    order = SampleOrder(train_ids, config.batch_size, config.seed)
    with counting(console, "reading images") as progress:
        pool, choices["in memory"] = open_pool(part, config, accelerator.device, choices["workers"], progress)
    if config.mean is None or config.std is None:
        with counting(console, "measuring mean and deviation") as progress:
            mean, std = channel_statistics(pool, train_ids, progress)
        config = dataclasses.replace(config, mean=tuple(mean), std=tuple(std))
    assert config.mean is not None and config.std is not None

    seed_everything(config.seed)
    model = MaskedAutoencoder(config, config.mean, config.std).to(accelerator.device)
    use_fused_attention(model, choices["attention"].value)
    config = settled(config, model, out, choices)
    peak_lr, peak_reason = peak_learning_rate(config)
    total = duration_steps(config.epochs, config.steps, order.steps_per_epoch)
    warmup = duration_steps(config.warmup_epochs, config.warmup_steps, order.steps_per_epoch)
    job = Job(
        config=config, out=out, console=console, accelerator=accelerator, data_name=source.name, part=part, pool=pool,
        train_ids=train_ids, heldout_ids=heldout_ids, order=order, model=model,
        optimizer=make_optimizer(model, config, peak_lr), peak_lr=peak_lr, warmup_steps=min(warmup, total),
        position=Position(total, fingerprint=part.fingerprint), metrics=MetricsLog(out / "metrics.jsonl"),
        quarantine=Quarantine(out / "quarantine.jsonl", part, config.max_bad_share), choices=choices,
    )  # fmt: skip
    if resume_from is not None:
        restore(job, resume_from)
    print_settings(console, f"maekit pretrain {config.recipe}", {**describe(job, peak_reason), **choices})
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(to_json(config))
        (out / "env.json").write_text(json.dumps(environment(accelerator.device), indent=2) + "\n")
    accelerator.wait_for_everyone()
    if config.trackers:
        accelerator.init_trackers("maekit", config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    return job


def check(config: PretrainConfig, resume_from: Path | None) -> Path:
    """Refuse whatever is wrong with the config or the output folder, all at once; returns the folder."""
    problems = config.problems() + model_problems(config)
    out = Path(config.out or f"runs/{config.recipe}")
    if resume_from is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(
            f"--out {out}: is not empty: maekit resume {out} continues the run in it; else name another one"
        )
    if problems:
        raise UserError(*problems)
    return out


def open_machine(config: PretrainConfig, out: Path) -> tuple[dict[str, Choice[Any]], Accelerator]:
    """Device, precision, kernels and processes, each chosen with its reason."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    choices: dict[str, Choice[Any]] = {
        "device": device,
        "precision": precision,
        "attention": choose_attention(device.value, precision.value),
        "compile": choose_compile(config.compile, device.value),
        "workers": choose_workers(config.workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    }
    accelerator = start_accelerator(device.value, config.trackers, out)
    world = accelerator.num_processes
    check_processes(config.processes, world)
    if config.batch_size % (world * config.accum):
        raise UserError(
            f"--batch-size {config.batch_size} is not divisible by {world} processes x --accum {config.accum}: it "
            "counts the images of one optimiser step over all of them"
        )
    return choices, accelerator


def settled(
    config: PretrainConfig, model: MaskedAutoencoder, out: Path, choices: dict[str, Choice[Any]]
) -> PretrainConfig:
    """The config with every choice that touches the numbers fixed, since a resume must not choose anew."""
    place = os.path.expanduser(config.data)
    return dataclasses.replace(
        config,
        **{f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)},
        data=os.path.abspath(place) if os.path.exists(place) else config.data,
        out=str(out),
        precision=choices["precision"].value,
        in_memory="yes" if choices["in memory"].value else "no",
    )


def describe(job: Job, peak_reason: str) -> dict[str, str]:
    """The run's settings with their arithmetic, for the reader who wants to check it."""
    config, model, world = job.config, job.model, job.accelerator.num_processes
    total, per_epoch = job.position.total_steps, job.order.steps_per_epoch
    millions = [sum(p.numel() for p in room.parameters()) / 1e6 for room in (model.encoder, model.decoder)]
    hidden = model.num_patches - model.num_visible
    return {
        "data": f"{config.data}: {len(job.train_ids):,} images to train on, {len(job.heldout_ids):,} held out",
        "run": str(job.out),
        "model": f"{config.model}, encoder {millions[0]:.2f} M, decoder {millions[1]:.2f} M parameters",
        "masking": f"{config.mask}: {hidden} of {model.num_patches} patches of {config.patch_size} px are hidden",
        "target": config.target,
        "batch": f"{config.batch_size} = {config.batch_size // world // config.accum} images x {world} "
        f"process{'es' if world > 1 else ''} x {config.accum} accumulation step{'s' if config.accum > 1 else ''}",
        "learning rate": f"{peak_reason}, {job.warmup_steps:,} steps of warm-up, then a cosine to {config.min_lr:g}",
        "length": f"{total:,} steps = {total / per_epoch:.4g} epochs x {per_epoch:,} steps",
    }


def draw_pictures(job: Job) -> None:
    """The panel of the same held-out images and masks, and the curves, by the first process."""
    if job.accelerator.is_main_process:
        job.model.eval()
        ids = lowest_hash(job.heldout_ids, PANEL_IMAGES, Purpose.HELDOUT_SPLIT)
        batch = next(iter(job.pool.eval_batches(ids, PANEL_IMAGES)))
        keep, masked = heldout_masks(job.model, ids)
        shown = reconstruct(job.model, batch.images, keep, masked, "true-patch")
        rows = [compose(r.image_HWC, r.ids_masked_M, r.pred_MP, job.model.patch_size) for r in shown]
        path = job.out / "panels" / f"epoch-{round(job.epochs_done):04d}.png"
        title = f"{job.out.name}: held-out images after {job.epochs_done:.4g} epochs"
        draw(rows, path, title=title, note=statistics_note(job.model, "true-patch"))
        draw_curves(job.metrics.read(), job.out / "curves.png", title=f"{job.out.name} ({job.config.recipe})")
        job.model.train()
    job.accelerator.wait_for_everyone()


def say_heldout(job: Job, first_step: int, seconds: float) -> None:
    """One line after each held-out pass, which is all that a log file without a terminal shows."""
    assert job.heldout is not None
    speed = (job.position.step - first_step) * job.config.batch_size / max(seconds, 1e-9)
    left = (job.position.total_steps - job.position.step) * job.config.batch_size / max(speed, 1e-9)
    job.console.print(
        f"epoch {job.epochs_done:.4g}  step {job.position.step:,}  held-out loss {job.heldout.loss:.4f}  "
        f"skill {job.heldout.skill:.3f}  {speed:,.0f} images/s  {left / 60:,.0f} min left"
    )


def finish(job: Job, first_step: int, seconds: float) -> None:
    """What was done and what to type next."""
    heldout, out = job.heldout, job.out
    assert heldout is not None
    images = (job.position.step - first_step) * job.config.batch_size
    trivial = min(heldout.trivial)
    done = {
        "images seen": f"{images:,} in {seconds:,.0f} s, evaluation and saving included",
        "held-out loss": f"{heldout.loss:.4f}; a predictor that learns nothing: {trivial:.4f}",
        "skill": f"{heldout.skill:.3f} (0: no better than that, 1: perfect)",
        "weights": str(out / WEIGHTS_FILE),
        "pictures": f"{out / 'panels'}, {out / 'curves.png'}",
        "next": f"maekit reconstruct {out} --image photo.jpg --out panel.png",
    }
    if job.part.labels is not None:
        done["and"] = f"maekit probe {out} --data {job.config.data}"
    print_settings(job.console, "done", done)


def resume(folder: str, changes: ResumeConfig) -> int:
    """Continue the run in a folder from its newest whole checkpoint.

    Raises:
        UserError: no run there, no whole checkpoint, or a change that would alter the numbers.
    """
    out = Path(folder)
    path = out / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no run (no config.json); runs are started by maekit pretrain")
    config = from_json(PretrainConfig, path.read_text(), path)
    given = {key: value for key, value in dataclasses.asdict(changes).items() if value is not None}
    if "epochs" in given and "steps" in given:
        raise UserError("give the length of the run either as --epochs or as --steps")
    if "epochs" in given or "steps" in given:
        given = {"epochs": None, "steps": None} | given
    config = dataclasses.replace(config, out=str(out), **given)
    console = make_console()
    newest, messages = latest(out / "checkpoints")
    for message in messages:
        console.print(f"[red]damaged checkpoint:[/red] {message}")
    if newest is None:
        raise UserError(f"{folder}: no whole checkpoint; start again with maekit pretrain into another folder")
    return main(config, resume_from=newest)
