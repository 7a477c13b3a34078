"""Semantic segmentation: a head on a pretrained encoder, trained on pairs of images and class maps, scored by mIoU.

    maekit segment runs/c10 --data camvid/
    maekit segment runs/c10 --data camvid/ --from-scratch --out runs/scratch
    maekit resume runs/c10/segment-camvid
    maekit segment runs/c10/segment-camvid --predict photos/ --out masks/

`main` reads: prepare everything, say what was chosen and why, train, score the validation part once. The best weights
are chosen on held-out training images. Cost: docs/segmentation.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from maekit.config import ResumeConfig, UserError, changed
from maekit.config.segmentation import SegmentConfig
from maekit.configfile import read
from maekit.data.loader import Ids
from maekit.data.pairs import VOID
from maekit.environment import environment
from maekit.keeping import keeping
from maekit.models.segmentation import pixel_loss
from maekit.seeding import seed_step
from maekit.stopping import StopRequest
from maekit.terminal import Pace, counting, make_console, make_progress, print_settings
from maekit.training import lock
from maekit.training.advice import see_report, what_next
from maekit.training.guard import Guard, backward, guarded_update, put_back
from maekit.training.saving import write_whole
from maekit.training.scorecard import CARD, scored_steps
from maekit.training.segmentation_inference import describe_view
from maekit.training.segmentation_job import (
    SegmentJob,
    evaluate,
    measure,
    measure_heldout,
    next_parts,
    open_batches,
    overlay_rows,
    scheduled_rate,
    step_denominator,
)
from maekit.training.segmentation_metrics import score, score_table
from maekit.training.segmentation_prepare import prepare
from maekit.training.supervised import BEST_FILE, mean_loss, set_scaled_rate
from maekit.viz.overlays import draw_overlays
from maekit.viz.segment_curves import draw_segment_curves
from maekit.weights.segmenters import load_segmenter
from maekit.weights.store import WEIGHTS_FILE


@lock.letting_go
def main(config: SegmentConfig, resuming: bool = False) -> int:
    """Train from the start, or from the newest checkpoint in --out on; then score the validation part.

    Returns: the exit code: 0; 128 + the signal's number when a signal stopped the run; 1 when the last checkpoint could
    not be written.

    Raises:
        UserError: everything that is wrong with the config, before anything is read; then with weights and data.
    """
    stop = StopRequest()
    with stop.listening():
        job = prepare(config, resuming, make_console(), stop)
        run, config, accelerator = job.run, job.config, job.run.accelerator
        console, position, device = run.console, run.position, accelerator.device
        print_settings(console, f"maekit segment, preset {config.preset}", {**describe(job), **job.choices})
        run.begin(job.fresh)
        step_model = accelerator.prepare_model(job.model, evaluation_mode=accelerator.num_processes == 1)
        guard = Guard(device, config.max_bad_steps, position.bad_row)
        batches = open_batches(job)
        loss_sum = torch.tensor(position.loss_sum, device=device)
        began = logged = time.monotonic()
        logged_step = first_step = position.step
        pace = Pace(position.step, config.batch_size)
        job.model.train()
        stop.patience = None  # from here on there is a checkpoint to go on from
        with make_progress(
            console, "loss {task.fields[loss]}", "held-out mIoU {task.fields[miou]}", "{task.fields[speed]} images/s"
        ) as progress:
            bar = progress.add_task("", total=config.steps, loss="-", miou="-", speed="-")
            while True:
                # ---- between two steps: what happens now and then, and never changes a weight ----
                last = position.step == config.steps
                stopping, save_due = stop.agreed(accelerator, run.clock.is_due())
                log_due = position.step != logged_step and (last or position.step % config.log_every == 0)
                if last or stopping or save_due or log_due or device.type == "cpu":
                    run.settle(guard)  # the only wait for the device
                paused = time.monotonic()  # work that the device had queued is training, so it counts
                if log_due:
                    speed = (position.step - logged_step) * config.batch_size / (paused - logged)
                    value = mean_loss(run, loss_sum)
                    run.log({"kind": "step", "loss": value, "lr": scheduled_rate(config, position.step - 1),
                             "images_per_s": speed, "seconds": paused - began})  # fmt: skip
                    loss_sum.zero_()
                    position.loss_count = 0
                    logged, logged_step = paused, position.step
                    progress.update(bar, loss=f"{value:.4f}", speed=f"{speed:,.1f}")
                progress.update(bar, completed=position.step, description=f"step {position.step:,}")
                if (
                    not stopping
                    and position.watched != position.step
                    and (last or position.step % config.eval_every == 0)
                ):
                    stopping = not (evaluate(job, pace) and draw_pictures(job))
                    if job.heldout is not None:
                        progress.update(bar, miou=f"{100 * job.heldout.miou:.2f} %")
                if last or stopping or save_due:
                    position.loss_sum = float(accelerator.reduce(loss_sum, "mean"))
                    if not run.save(urgent=last or stopping) and (last or stopping):
                        console.print(f"[bold red]the run ends at step {position.step:,} without its checkpoint[/]")
                        accelerator.end_training()
                        return 1
                if stopping:
                    accelerator.end_training()  # trackers keep lines back until then
                    console.print(f"stopped by {stop.name} after step {position.step:,}: maekit resume {run.out}")
                    return stop.exit_code
                if last:
                    break
                logged += time.monotonic() - paused  # images/s is about training alone

                # ---- one step ----
                step = position.step
                set_scaled_rate(run.optimizer, scheduled_rate(config, step))
                parts = next_parts(job, batches)
                if parts is None:  # a signal, and data that do not come: as if the step had not begun
                    continue
                seed_step(config.seed, step, accelerator.process_index)
                denominator = step_denominator(job, [labels for _, labels in parts])
                loss_of_step = torch.zeros_like(loss_sum)
                before = [buffer.clone() for buffer in job.model.buffers()]
                for number, (images, labels) in enumerate(parts, start=1):
                    # Earlier parts add up on their own process; the backward pass of the last one averages over all.
                    lonely = number < config.accum
                    with accelerator.no_sync(step_model) if lonely else contextlib.nullcontext():
                        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                            scores = step_model(images)
                        loss = pixel_loss(scores, labels, VOID, job.weights_K, denominator, config.aux_weight)
                        backward(loss)
                    loss_of_step += loss.detach()
                skip = guarded_update(job.model, run.optimizer, guard, step, config.clip_grad)
                put_back(job.model.buffers(), before, skip)  # batch norm's running statistics
                loss_sum += torch.where(skip > 0, 0.0, loss_of_step)
                position.step, position.loss_count = step + 1, position.loss_count + 1
        if not finish(job, time.monotonic() - began, first_step):
            console.print(f"stopped by {stop.name} while scoring: maekit resume {run.out}")
            accelerator.end_training()
            return stop.exit_code
        accelerator.end_training()
        return 0
    return stop.exit_code


def describe(job: SegmentJob) -> dict[str, str]:
    """The run's settings with their arithmetic, for the reader who wants to check it."""
    config, model, world = job.config, job.model, job.run.accelerator.num_processes
    parts = (model.encoder, model.head, model.auxiliary)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts if part is not None]
    val = job.pairs.val
    per_epoch = len(job.train_ids) / config.batch_size
    blocks = " ".join(str(index + 1) for index in model.block_ids)
    head = f"{config.head}, {millions[1]:.2f} M parameters, on block{'s' if ' ' in blocks else ''} {blocks}"
    frozen = " (frozen)" if model.frozen else ""
    void = sum(check.void_pixels for check in job.checks.values())
    pixels = void + sum(int(check.class_pixels.sum()) for check in job.checks.values())
    return {
        "data": f"{config.data}: {len(job.train_ids):,} images to train on, {len(job.heldout_ids):,} held out, "
        f"{0 if val is None else len(val):,} to validate",
        "classes": f"{len(job.pairs.class_names)}; {void / max(1, pixels):.1%} of the pixels are void",
        "run": str(job.run.out),
        "encoder": f"{config.source}{' (random weights)' if config.from_scratch else ''}, {millions[0]:.2f} M "
        f"parameters{frozen}",
        "head": head + (f"; auxiliary loss x {config.aux_weight:g}" if model.auxiliary is not None else ""),
        "crop": f"{config.crop_hw[0]} x {config.crop_hw[1]} px of images scaled by {config.scale_range[0]:g} to "
        f"{config.scale_range[1]:g}",
        "batch": f"{config.batch_size} = {config.batch_size // world // config.accum} images x {world} "
        f"process{'es' if world > 1 else ''} x {config.accum} accumulation step{'s' if config.accum > 1 else ''}",
        "learning rate": f"{config.lr:g}, {config.warmup_steps:,} steps of warm-up, then {config.schedule} to "
        f"{config.min_lr:g}" + ("" if model.frozen else f"; x {config.layer_decay:g} from block to block downwards"),
        "length": f"{config.steps:,} steps = {config.steps / per_epoch:.3g} epochs",
        "scored": f"{describe_view(job.view)}; {config.score} weights",
    }


def draw_pictures(job: SegmentJob) -> bool:
    """Curves and a sheet of held-out images; False where a signal cut it short. A full disk stops nothing."""
    run = job.run
    title = f"held-out images after {run.position.step:,} steps"

    def draw() -> bool:
        if run.accelerator.is_main_process:
            if job.config.overlays:
                draw_sheet(job, job.pairs.train, "heldout.png", title, job.heldout_ids)
            try:
                draw_segment_curves(run.metrics.read(), run.out / "curves.png", run.out.name)
            except (OSError, UserError) as error:
                run.console.print(f"[red]curves.png cannot be written:[/red] {error}; training goes on")
        return True

    return run.stop.unless_stopped(run.accelerator, draw) is not None


def draw_sheet(job: SegmentJob, part: Any, name: str, title: str, ids: Ids | None = None) -> None:
    """Image | truth | prediction | error of a few images of a part."""
    rows = overlay_rows(job, part, job.config.overlays, ids)
    if not rows:
        return
    try:
        draw_overlays(rows, job.run.out / name, job.pairs.class_names, f"{job.run.out.name}: {title}")
    except OSError as error:
        job.run.console.print(f"[red]{name} cannot be written:[/red] {error}; the run goes on")


def finish(job: SegmentJob, seconds: float, first_step: int) -> bool:
    """Score the validation part once, print the table, write card.json and overlays.png; False where a signal came."""
    run, config, console = job.run, job.config, job.run.console
    if scored_steps(run.out) == first_step == config.steps:
        console.print(f"the run is finished: {run.out / CARD}; maekit segment {run.out} --eval scores it again")
        return True
    if job.heldout is None and not measure_heldout(job):  # stopped after it was measured, and resumed
        return False
    assert job.heldout is not None
    which, step = choose_weights(job)
    if job.pairs.val is not None:
        part, ids, what = job.pairs.val, np.arange(len(job.pairs.val)), "validation"
    else:
        console.print("the data have no validation part: the score is that of the held-out training images")
        part, ids, what = job.pairs.train, job.heldout_ids, "held-out"
    with counting(console, f"scoring {what} images") as progress:
        found = measure(job, part, ids, progress)
    if found is None:
        return False
    matrix_KK, unreadable = found
    result = score(matrix_KK)
    if run.accelerator.is_main_process:
        card = {
            "data": job.pairs.name, "fingerprint": job.pairs.train.fingerprint, "part": what,
            "weights": which, "step": step, "steps": config.steps, "best_step": run.position.best_step,
            "best_heldout_miou": run.position.best if run.position.best_step else None,
            "last_heldout": job.heldout.to_json(job.pairs.class_names),
            "images": {"train": len(job.train_ids), "held-out": len(job.heldout_ids), what: len(ids)},
            "unreadable": unreadable, "view": dataclasses.asdict(job.view),
            "score": result.to_json(job.pairs.class_names),
            "confusion": matrix_KK.tolist(), "seconds": seconds, "config": dataclasses.asdict(config),
            "environment": environment(run.accelerator.device),
        }  # fmt: skip
        with keeping(run.out / CARD, console, "overlays.png"):
            write_whole(run.out / CARD, json.dumps(card, indent=1) + "\n")
            if config.overlays:
                draw_sheet(job, part, "overlays.png", f"{what} images, mIoU {100 * result.miou:.2f} %", ids)
    title = f"{job.run.out.name}: {len(ids) - unreadable:,} {what} images, {which} weights"
    console.print(score_table(result, job.pairs.class_names, title))
    steps = run.position.step - first_step
    print_settings(console, "done", {
        "trained": f"{steps:,} steps in {seconds:,.0f} s, evaluation and saving included",
        "card": str(run.out / CARD), "weights": f"{run.out / WEIGHTS_FILE}; best on held-out images: {BEST_FILE}",
        "pictures": f"{run.out / 'overlays.png'}; {see_report(str(run.out))}",
        **what_next("segment", str(run.out)),
    })  # fmt: skip
    return True


def choose_weights(job: SegmentJob) -> tuple[str, int]:
    """Put the weights that --score names into the model; which they are, and the step after which they stood."""
    run = job.run
    if job.config.score == "best":
        try:
            best, passport = load_segmenter(run.out / BEST_FILE, run.accelerator.device)
        except UserError as error:
            run.console.print(f"[red]the last weights are scored:[/red] {escape(str(error))}")
        else:
            job.model.load_state_dict(best.state_dict(), strict=False)  # the auxiliary head is not in it
            return "best", passport.steps
    return "last", run.position.step


@lock.letting_go
def resume(folder: str, changes: ResumeConfig) -> int:
    """Continue the run in a folder from its newest whole checkpoint.

    Raises:
        UserError: no segmentation run there, or a change that would alter the numbers.
    """
    out = Path(folder)
    config = read(SegmentConfig, out / "config.json")
    if changes.epochs is not None or changes.steps is not None:
        raise UserError("--steps, --epochs: the schedule of a segmentation run ends where it was said; start a new run")
    return main(changed(config, changes, folder), resuming=True)
