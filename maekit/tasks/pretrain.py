"""Pretrain by masked autoencoding: one job, one file, from the config to the last checkpoint.

    maekit pretrain cifar10 --data cifar10 --out runs/c10
    maekit resume runs/c10
    torchrun --nproc_per_node 2 -m maekit pretrain cifar10 --data cifar10 --out runs/c10

`main` reads: prepare everything, say what was chosen and why, train, say what to type next.
Cost and expected numbers: see the recipes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from maekit.compiling import compile_or_eager, uncompiled
from maekit.config import PretrainConfig, ResumeConfig, UserError, changed
from maekit.configfile import read
from maekit.data.loader import lowest_hash
from maekit.rng import Purpose
from maekit.stopping import StopRequest
from maekit.terminal import Pace, make_console, make_progress, print_settings
from maekit.training import lock
from maekit.training.advice import images_seen, low_skill, see_report, what_next
from maekit.training.checkpoint import latest
from maekit.training.guard import Guard, backward, guarded_update
from maekit.training.monitor import PANEL_IMAGES, heldout_masks, reconstruct, statistics_note
from maekit.training.optim import learning_rate, set_learning_rate
from maekit.training.prepare import prepare
from maekit.training.replayed import Replayed
from maekit.training.run import (
    Job,
    advise_on_loading,
    due,
    evaluate,
    log_training,
    next_part,
    open_parts,
    probe,
    say_heldout,
    settle,
)
from maekit.training.run_state import restore_rng, rng_tensors
from maekit.training.saving import SaveClock, begin, give_up, never_began, roll_back, save
from maekit.training.step import part_loss, whole_step
from maekit.viz.panels import compose, draw
from maekit.viz.plots import draw_curves
from maekit.weights.store import WEIGHTS_FILE


@lock.letting_go
def main(config: PretrainConfig, resume_from: Path | None = None, again: bool = False) -> int:
    """Train from the start, or from a checkpoint's folder on; `again`: in the folder of a run that never began.

    Returns: the exit code: 0; 128 + the signal's number when a signal stopped the run; 1 when the last checkpoint could
    not be written, or when steps stayed non-finite after going back once.

    Raises:
        UserError: everything that is wrong with the config, before any data is read; then what is wrong with the data.
    """
    stop = StopRequest()
    with stop.listening():  # a signal ends this block at once as long as there is nothing to save
        job = prepare(config, resume_from, make_console(), again)
        job.stop = stop
        config, model, position, accelerator = job.config, job.model, job.position, job.accelerator
        if position.step == position.watched == position.total_steps:
            job.console.print(
                f"the run is finished; --epochs or --steps makes it longer: maekit resume {job.out} --epochs N"
            )
            return 0
        begin(job, fresh=resume_from is None)
        step_model = accelerator.prepare_model(model, evaluation_mode=accelerator.num_processes == 1)
        forward = compile_or_eager(step_model, job.choices["compile"].value, job.console.print)
        clock = SaveClock(config.save_minutes, config.max_unsaved_minutes)
        guard = Guard(accelerator.device, config.max_bad_steps, position.bad_row)
        replayed = replayed_step(job, guard, forward)
        parts = open_parts(job)
        loss_sum = torch.tensor(position.loss_sum, device=accelerator.device)
        began = logged = time.monotonic()
        logged_step = first_step = position.step
        pace = Pace(position.step, config.batch_size)
        lr = 0.0
        model.train()
        # The first step compiles, which may take minutes; it gets some seconds, since its checkpoint stands already.
        stop.patience = stop.GRACE
        with make_progress(
            job.console,
            "loss {task.fields[loss]}",
            "skill {task.fields[skill]}",
            "{task.fields[speed]} images/s",
        ) as progress:
            bar = progress.add_task("", total=position.total_steps, loss="-", skill="-", speed="-")
            while True:
                # ---- between two steps: what happens now and then, and never changes a weight ----
                last = position.step == position.total_steps
                stopping, save_due = stop.agreed(accelerator, clock.is_due())
                log_due = position.step != logged_step and (last or position.step % config.log_every == 0)
                if last or stopping or save_due or log_due or accelerator.device.type == "cpu" or due(job):
                    hopeless = settle(job, guard)  # the only wait for the device
                    if hopeless is not None:
                        if not roll_back(job, hopeless):
                            give_up(job, hopeless, lr)
                            accelerator.end_training()
                            return 1
                        position, guard = job.position, Guard(accelerator.device, config.max_bad_steps)
                        first_step = min(first_step, position.step)
                        replayed = replayed_step(job, guard, forward)  # the optimiser's state is another one
                        parts = open_parts(job)
                        loss_sum.fill_(position.loss_sum)
                        logged, logged_step = time.monotonic(), position.step
                        continue
                paused = time.monotonic()  # work that the device had queued is training, so it counts
                if log_due:
                    images = (position.step - logged_step) * config.batch_size
                    speed = images / (paused - logged)
                    value, skill = log_training(job, loss_sum, lr, speed, paused - began)
                    advise_on_loading(job, images // accelerator.num_processes, paused - logged)
                    loss_sum.zero_()
                    logged, logged_step = paused, position.step
                    progress.update(bar, loss=f"{value:.4f}", skill=f"{skill:.3f}", speed=f"{speed:,.0f}")
                epochs_begun = position.step // job.order.steps_per_epoch + 1
                progress.update(bar, completed=position.step, description=f"epoch {epochs_begun}")
                if not stopping:
                    with uncompiled():
                        stopping = not watch(job, pace)
                if last or stopping or save_due or (position.step > first_step and "save" in due(job)):
                    position.loss_sum = float(accelerator.reduce(loss_sum, "mean"))
                    saved = save(job, clock, urgent=last or stopping)
                    if not saved and (last or stopping):
                        job.console.print(f"[bold red]the run ends at step {position.step:,} without its checkpoint[/]")
                        accelerator.end_training()
                        return 1
                if stopping:
                    accelerator.end_training()  # trackers keep lines back until then
                    job.console.print(f"stopped by {stop.name} after step {position.step:,}: maekit resume {job.out}")
                    return stop.exit_code
                if last:
                    break
                logged += time.monotonic() - paused  # images/s is about training alone

                # ---- one step ----
                step = position.step
                lr = position.lr_scale * learning_rate(
                    step, position.total_steps, job.warmup_steps, job.peak_lr, config.min_lr, position.schedule_start
                )
                set_learning_rate(job.optimizer, lr, encoder_waits=step < job.decoder_only)
                loss_of_step = torch.zeros_like(loss_sum)
                rng = rng_tensors(accelerator.process_index) if config.accum > 1 else {}
                for part_number in range(config.accum):
                    part = next_part(job, parts, begun=part_number > 0)
                    if part is None:
                        break
                    pixels, masks = part.batch.images, part.masks
                    if part.batch.bad:
                        job.quarantine.report(part.batch.bad, job.console)
                    if replayed is not None:  # the whole step at once: it has this part only
                        loss_of_step, verdict = replayed(pixels, masks.ids_keep_BV, masks.ids_masked_BM)
                        skip = guard.note(step, verdict.clone())
                        continue
                    # Earlier parts add up on their own process; the backward pass of the last one averages over all.
                    lonely = part_number < config.accum - 1
                    with accelerator.no_sync(step_model) if lonely else contextlib.nullcontext():
                        loss = part_loss(model, config, pixels, masks, forward) / config.accum
                        backward(loss)
                    loss_of_step += loss.detach()
                if part is None:  # a signal, and data that do not come: as if the step had not begun
                    job.optimizer.zero_grad(set_to_none=True)
                    restore_rng(rng, accelerator.process_index)
                    continue
                if replayed is None:
                    skip = guarded_update(model, job.optimizer, guard, step, config.clip_grad)
                loss_sum += torch.where(skip > 0, 0.0, loss_of_step)
                position.step, position.loss_count = step + 1, position.loss_count + 1
                stop.patience = None  # from here on there is something to save
        accelerator.end_training()
        finish(job, first_step, time.monotonic() - began)
        return 0
    return stop.exit_code


def replayed_step(job: Job, guard: Guard, forward: Callable[..., Any]) -> Replayed | None:
    """The step as a CUDA graph, where one was chosen."""
    if job.choices["compile"].value != "graphs":
        return None
    return Replayed(whole_step(job.model, job.config, job.optimizer, guard, forward), job.optimizer, job.console.print)


def watch(job: Job, pace: Pace) -> bool:
    """Held-out loss, probes and pictures that are due; False where a signal cut them short.

    Then nothing of them is kept, and a resumed run does them again: the metrics are those of a run left alone.
    """
    if job.position.watched == job.position.step:
        return True
    written, names = job.metrics.position, due(job)
    whole = "eval" not in names or evaluate(job)
    if whole and "eval" in names:
        say_heldout(job, pace)
    whole = whole and ("probe" not in names or probe(job))
    whole = whole and ("panel" not in names or draw_pictures(job) is not False)
    if whole:
        job.position.watched = job.position.step
    elif job.accelerator.is_main_process and job.metrics.position > written:
        job.metrics.truncate(written)
    return whole


def draw_pictures(job: Job) -> bool:
    """The panel of the same held-out images and masks, and the curves, by the first process; a full disk stops nothing.

    Returns: False where a signal cut it short.
    """

    def draw_both() -> bool:
        if not job.accelerator.is_main_process:
            return True
        ids = lowest_hash(job.heldout_ids, PANEL_IMAGES, Purpose.HELDOUT_SPLIT)
        batch = next(iter(job.pool.eval_batches(ids, PANEL_IMAGES)))
        keep, masked = heldout_masks(job.model, ids)
        shown = reconstruct(job.model, batch.images, keep, masked, "true-patch")
        rows = [compose(r.image_HWC, r.ids_masked_M, r.pred_MP, job.model.patch_size) for r in shown]
        path = job.out / "panels" / panel_name(job.position.step, job.order.steps_per_epoch)
        title = f"{job.out.name}: held-out images after {job.epochs_done:.4g} epochs"
        if job.heldout is not None and job.heldout_step == job.position.step:
            title += f", skill {job.heldout.skill:.3f}"
        try:
            draw(rows, path, title=title, note=statistics_note(job.model, "true-patch"))
            draw_curves(job.metrics.read(), job.out / "curves.png", title=f"{job.out.name} ({job.config.recipe})")
        except (OSError, UserError) as error:
            job.console.print(f"[red]the pictures cannot be written:[/red] {error}; training goes on")
        return True

    job.model.eval()
    done = job.stop.unless_stopped(job.accelerator, draw_both)
    job.model.train()
    return done is not None


def panel_name(step: int, steps_per_epoch: int) -> str:
    """A panel's file: epoch-0005.png after whole epochs, else with the step: names sort as the panels were drawn."""
    epoch, rest = divmod(step, steps_per_epoch)
    return f"epoch-{epoch:04d}" + (f"_step-{step:08d}" if rest else "") + ".png"


def finish(job: Job, first_step: int, seconds: float) -> None:
    """What was done and what to type next."""
    heldout, out, batch = job.heldout, job.out, job.config.batch_size
    world = job.accelerator.num_processes
    assert heldout is not None
    images, since = job.position.step * batch, (job.position.step - first_step) * batch
    trivial = min(heldout.trivial)
    done = {
        "images seen": images_seen(images, since, f"{seconds:,.0f} s, evaluation and saving included"),
        "held-out loss": f"{heldout.loss:.4f}; a predictor that learns nothing: {trivial:.4f}",
        "skill": f"{heldout.skill:.3f} (0: no better than that, 1: perfect)",
        **low_skill(job.config, heldout.skill, job.position.step, job.order.steps_per_epoch, job.peak_lr, world),
        "weights": str(out / WEIGHTS_FILE),
        "pictures": f"{out / 'panels'}, {out / 'curves.png'}; {see_report(str(out))}",
        **what_next("pretrain", str(out), job.config.data, job.part.labels is not None),
    }
    print_settings(job.console, "done", done)


@lock.letting_go
def resume(folder: str, changes: ResumeConfig) -> int:
    """Continue the run in a folder from its newest whole checkpoint.

    Raises:
        UserError: no run there, no whole checkpoint, or a change that would alter the numbers.
    """
    out = Path(folder)
    path = out / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no run (no config.json); runs are started by maekit pretrain")
    config = read(PretrainConfig, path)
    config = changed(config, changes, str(out))
    console = make_console()
    lock.take(out)
    newest, messages = latest(out / "checkpoints")
    for message in messages:
        console.print(f"[red]damaged checkpoint:[/red] {escape(message)}")
    if newest is None and not messages and never_began(out):
        console.print("killed before its first checkpoint: the run begins at step 0")
        return main(config, again=True)
    if newest is None:
        raise UserError(f"{folder}: no whole checkpoint; start again with maekit pretrain into another folder")
    return main(config, resume_from=newest)
