"""Train a classifier from a pretrained encoder, with labels: one job, one file, from the weights to the score.

    maekit finetune runs/c10 --data cifar10
    maekit resume runs/c10/finetune-cifar10
    maekit finetune runs/c10/finetune-cifar10 --data cifar10 --eval

The recipe is the paper's (He et al. 2021, appendix A.1 and table 9): all layers are trained, the lower ones slower.
Held-out training images choose the best epoch; the test split is scored once, when all is over.
Cost: one forward and backward pass over all patches for each image and epoch: three to four times a pretraining's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors.torch import load_file
from torch import Tensor

from maekit.compiling import compile_or_eager, uncompiled
from maekit.config import FinetuneConfig, ResumeConfig, UserError, changed
from maekit.configfile import read
from maekit.data.labelled import labels_of, take_good_slots
from maekit.data.loader import Batch, open_pool
from maekit.keeping import keeping
from maekit.runtime import to_device
from maekit.stopping import StopRequest
from maekit.terminal import Pace, counting, make_console, make_progress, print_settings, remark, short_time
from maekit.training import lock
from maekit.training.advice import few_heldout, images_seen, missed_classes, see_report, what_next
from maekit.training.finetuning import FinetuneJob, default_out, describe, prepare, reading_config
from maekit.training.guard import Guard, backward, guarded_update, update_if_finite
from maekit.training.imbalance import TestClasses
from maekit.training.interval import in_words
from maekit.training.mixing import soft_loss
from maekit.training.optim import learning_rate
from maekit.training.replayed import Replayed
from maekit.training.scorecard import CARD, CONFUSION, print_score, scored_steps, with_interval, write_card
from maekit.training.scoring import EVAL_BATCH, Score, answer, of_all, score
from maekit.training.supervised import BEST_FILE, mean_loss, set_scaled_rate
from maekit.viz.confusion import draw_training, picture_confusion
from maekit.weights.store import WEIGHTS_FILE
from maekit.weights.written import write_weights

DRAW_SECONDS = 60.0
"""curves.png is drawn anew not more often than this, and at the end."""


@lock.letting_go
def main(source: str, config: FinetuneConfig, resumed: bool = False) -> int:
    """Train from the start, or from the newest checkpoint in `config.out` on; then score the test split.

    Returns: the exit code: 0; 128 + the signal's number when a signal stopped the run; 1 when the last checkpoint could
    not be written.

    Raises:
        UserError: everything that is wrong with the config, before anything is read; then what is wrong with weights
            or data.
    """
    if config.eval:
        raise UserError("--eval trains nothing: it is maekit.tasks.finetune_score.main that scores a classifier again")
    console = make_console()
    out = Path(config.out) if config.out else default_out(source, config)
    config = dataclasses.replace(config, source=source)
    stop = StopRequest()
    with stop.listening():  # a signal ends this block at once as long as there is nothing to save
        job = prepare(config, out, console, stop, resumed)
        config, run, model, position = job.config, job.run, job.model, job.run.position
        accelerator, total = run.accelerator, position.total_steps
        if position.step == position.watched == total and scored_steps(out) == total:
            console.print(f"the run is finished: {out / CARD}; --epochs or --steps of maekit resume makes it longer")
            return 0
        print_settings(console, f"maekit finetune {escape(source)}", describe(job))
        splits = job.splits
        remark(console, few_heldout(config.score, len(splits.heldout_ids)))
        labels_N = labels_of(splits.train, config.data)
        kinds = labels_N[splits.train_ids], labels_N[splits.heldout_ids]
        remark(console, missed_classes(config.score, *kinds, splits.classes))
        run.begin(job.fresh)
        step_model = accelerator.prepare_model(model, evaluation_mode=accelerator.num_processes == 1)
        forward = compile_or_eager(step_model, job.choices["compile"].value, console.print)
        guard = Guard(accelerator.device, config.max_bad_steps, position.bad_row)
        replayed = replayed_step(job, guard, forward)
        batches = open_batches(job)
        loss_sum = torch.tensor(position.loss_sum, device=accelerator.device)
        began = logged = time.monotonic()
        logged_step = first_step = position.step
        pace = Pace(position.step, config.batch_size)
        drawn, lr = began, 0.0
        eval_steps = max(1, round(config.eval_every * job.order.steps_per_epoch))
        model.train()
        stop.patience = stop.GRACE  # the first step may compile for minutes; its checkpoint stands already
        with make_progress(console, "loss {task.fields[loss]}", "{task.fields[speed]} images/s") as progress:
            bar = progress.add_task("", total=total, loss="-", speed="-")
            while True:
                # ---- between two steps: what happens now and then, and never changes a weight ----
                last = position.step == total
                stopping, save_due = stop.agreed(accelerator, run.clock.is_due())
                eval_due = position.watched != position.step and (last or position.step % eval_steps == 0)
                log_due = position.step != logged_step and (last or position.step % config.log_every == 0)
                if last or stopping or save_due or log_due or eval_due or accelerator.device.type == "cpu":
                    run.settle(guard)  # the only wait for the device
                paused = time.monotonic()  # work that the device had queued is training, so it counts
                if log_due:
                    speed = (position.step - logged_step) * config.batch_size / (paused - logged)
                    loss = mean_loss(run, loss_sum)
                    run.log({"kind": "step", "epoch": job.epochs_done, "loss": loss, "lr": lr, "images_per_s": speed,
                             "seconds": paused - began})  # fmt: skip
                    loss_sum.zero_()
                    position.loss_count = 0
                    logged, logged_step = paused, position.step
                    progress.update(bar, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")
                progress.update(bar, completed=position.step, description=f"epoch {job.epochs_done:.0f}")
                if eval_due and not stopping:
                    with uncompiled():
                        stopping = not watch(job, pace)
                    if last or time.monotonic() - drawn > DRAW_SECONDS:
                        draw_curves(job)
                        drawn = time.monotonic()
                if last or stopping or save_due:
                    position.loss_sum = float(accelerator.reduce(loss_sum, "mean"))
                    if not run.save(urgent=last or stopping) and (last or stopping):
                        console.print(f"[bold red]the run ends at step {position.step:,} without its checkpoint[/]")
                        accelerator.end_training()
                        return 1
                if stopping:
                    accelerator.end_training()  # trackers keep lines back until then
                    console.print(f"stopped by {stop.name} after step {position.step:,}: maekit resume {out}")
                    return stop.exit_code
                if last:
                    break
                logged += time.monotonic() - paused  # images/s is about training alone

                # ---- one step ----
                step = position.step
                lr = learning_rate(step, total, job.warmup_steps, job.peak_lr, config.min_lr, position.schedule_start)
                set_scaled_rate(run.optimizer, lr)
                if step == job.clean_from:  # images and perhaps the number of patches are others from here on
                    replayed = replayed_step(job, guard, forward)
                job.begin_step()
                loss_of_step = torch.zeros_like(loss_sum)
                for part_number in range(config.accum):
                    batch = next_batch(job, batches, begun=part_number > 0)
                    if batch is None:
                        break
                    job.quarantine.report(batch.bad, job.run.console, "another image")
                    images, ids, any_good = take_good_slots(batch, job.pool.unreadable)
                    labels = job.labels[to_device(torch.from_numpy(ids), accelerator.device)]
                    images, targets = job.mixing(model.normalize(images), labels)
                    if not any_good:  # every slot is unreadable: stand-ins with labels that are not theirs
                        targets = torch.zeros_like(targets)
                    if replayed is not None:  # the rest of the step at once: it has this part only
                        loss_of_step, verdict = replayed(images, targets)
                        skip = guard.note(step, verdict.clone())
                        continue
                    # Earlier parts add up on their own process; the backward pass of the last one averages over all.
                    lonely = part_number < config.accum - 1
                    with accelerator.no_sync(step_model) if lonely else contextlib.nullcontext():
                        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                            logits = forward(images)
                        loss_of_part = soft_loss(logits, targets) / config.accum
                        backward(loss_of_part)
                    loss_of_step += loss_of_part.detach()
                if batch is None:  # a signal, and data that do not come: as if the step had not begun
                    run.optimizer.zero_grad(set_to_none=True)
                    continue
                if replayed is None:
                    skip = guarded_update(model, run.optimizer, guard, step, config.clip_grad)
                if job.averaged is not None:
                    job.averaged.update(model, step=step + 1)
                loss_sum += torch.where(skip > 0, 0.0, loss_of_step)
                position.step, position.loss_count = step + 1, position.loss_count + 1
                stop.patience = None  # from here on there is something to save
        with uncompiled():
            finished = finish(job, first_step, time.monotonic() - began)
        if not finished:
            console.print(f"stopped by {stop.name} while scoring: maekit resume {out}")
            accelerator.end_training()
            return stop.exit_code
        accelerator.end_training()
        return 0
    return stop.exit_code


def replayed_step(job: FinetuneJob, guard: Guard, forward: Callable[..., Any]) -> Replayed | None:
    """The step from mixed images and targets on as a CUDA graph, where one was chosen."""
    if job.choices["compile"].value != "graphs":
        return None

    def step(images_BCHW: Tensor, targets_BK: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
            logits = forward(images_BCHW)
        loss = soft_loss(logits, targets_BK)
        backward(loss)
        return loss.detach(), update_if_finite(job.model, job.run.optimizer, guard, job.config.clip_grad)

    return Replayed(step, job.run.optimizer, job.run.console.print)


def open_batches(job: FinetuneJob) -> Iterator[Batch]:
    """This process's parts of all steps from the run's position on."""
    run = job.run
    steps = range(run.position.step, run.position.total_steps)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    return job.pool.train_batches(job.order.micro_batches(steps, rank, world, job.config.accum))


def next_batch(job: FinetuneJob, batches: Iterator[Batch], begun: bool) -> Batch | None:
    """The next part of a step; None where a signal came and it does not: at once, or soon where the step was begun."""
    stop = job.run.stop
    return stop.unless_stopped(job.run.accelerator, lambda: next(batches), stop.GRACE if begun else 0.0)


def watch(job: FinetuneJob, pace: Pace) -> bool:
    """Score the held-out images, and keep the weights where they are the best so far; False where a signal came."""
    found = score_heldout(job)
    if found is None:
        return False
    run, position = job.run, job.run.position
    run.log({"kind": "heldout", "epoch": job.epochs_done, "loss": found.loss, "top1": found.top1, "top5": found.top5})
    is_best = run.keep_best(found.rank)
    position.watched = position.step
    speed = pace.told(position.step, position.total_steps)
    top5 = f"  top-5 {found.top5:.1%}" if len(job.splits.classes) > 5 else ""
    run.console.print(
        f"epoch {job.epochs_done:.4g}  step {position.step:,}  held-out top-1 {found.top1:.1%}{top5}"
        f"  loss {found.loss:.4f}{speed}" + ("  best so far" if is_best else "")
    )
    return True


def score_heldout(job: FinetuneJob) -> Score | None:
    """The score on the held-out images, of which every process takes its share; None where a signal cut it short."""
    run, splits, model = job.run, job.splits, job.evaluated
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    assert splits.train.labels is not None
    ids, labels = splits.heldout_ids[rank::world], splits.train.labels
    model.eval()
    found = run.stop.unless_stopped(
        run.accelerator, lambda: answer(model, job.pool, ids, labels, EVAL_BATCH, job.config.precision)
    )
    job.model.train()
    if found is None:
        return None
    answers = of_all(run.accelerator, found)
    if not len(answers.labels):
        raise UserError(f"--data {job.config.data}: none of the {len(splits.heldout_ids)} held-out images can be read")
    return score(answers, len(splits.classes))


def draw_curves(job: FinetuneJob) -> None:
    """curves.png by the first process; a full disk stops nothing."""
    if not job.run.accelerator.is_main_process:
        return
    path = job.run.out / "curves.png"
    scores = {"top1": "top-1"} | ({"top5": "top-5"} if len(job.splits.classes) > 5 else {})
    try:
        draw_training(job.run.metrics.read(), path, title=f"{job.run.out.name} ({job.config.preset})", scores=scores)
    except (OSError, UserError) as error:
        job.run.console.print(f"[red]{path} cannot be drawn:[/red] {error}")


# ---- when all is trained ----


def finish(job: FinetuneJob, first_step: int, seconds: float) -> bool:
    """Choose the weights, score the test split once, write the card; False where a signal came."""
    run, config, splits = job.run, job.config, job.splits
    which, step = choose_weights(job)
    model = job.evaluated
    labels = labels_of(splits.test, config.data)
    pool = job.pool
    if splits.test is not splits.train:
        reading = dataclasses.replace(reading_config(config, run.passport()), in_memory="auto")
        with counting(run.console, "reading test images") as progress:
            pool, _ = open_pool(splits.test, reading, run.accelerator.device, job.choices["workers"], progress)
    model.eval()
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    with counting(run.console, "scoring the test split") as progress:
        ids = splits.test_ids[rank::world]
        mine = run.stop.unless_stopped(
            run.accelerator, lambda: answer(model, pool, ids, labels, EVAL_BATCH, config.precision, progress)
        )
    if mine is None:
        return False
    answers = of_all(run.accelerator, mine)
    if not len(answers.labels):
        raise UserError(f"--data {config.data}: none of the test images ({splits.test_what}) can be read")
    found = score(answers, len(splits.classes))
    if not run.accelerator.is_main_process:
        return True
    epoch = step / job.order.steps_per_epoch
    facts = {
        "task": "finetune", "source": config.source, "from_scratch": config.from_scratch, "preset": config.preset,
        "data": job.source.name, "fingerprint": splits.train.fingerprint, "training_images": len(splits.train_ids),
        "heldout_images": len(splits.heldout_ids), "weights": which, "epoch": epoch, "step": step,
        "epochs": job.epochs_done, "steps": run.position.step, "seed": config.seed,
    }  # fmt: skip
    unreadable = len(splits.test_ids) - found.images
    title = f"{run.out.name}: {splits.test_what}, top-1 {found.top1:.1%}"
    assert splits.train.labels is not None
    classes = TestClasses.of(splits.train.labels[splits.train_ids], answers.labels, splits.classes)
    print_score(run.console, found, classes, title)
    with keeping(run.out / CARD, run.console, CONFUSION):  # of the run before it was lengthened
        write_card(run.out, facts, found, classes, splits.test_what, unreadable, run.accelerator.device)
        picture_confusion(found.confusion_KK, model.classes, run.out / CONFUSION, title, run.console.print)
    batch, steps = config.batch_size, run.position.step
    heldout: dict[str, Any] = next(
        (r for r in reversed(run.metrics.read()) if r.get("kind") == "heldout" and r["step"] == step), {}
    )
    done = {
        "images seen": images_seen(batch * steps, batch * (steps - first_step), short_time(seconds)),
        "weights": f"{run.out / WEIGHTS_FILE}: of epoch {epoch:.4g} ({which}"
        + (f"; held-out top-1 {heldout['top1']:.1%})" if heldout else ")"),
        "test top-1": with_interval(found),
        **({"test top-5": in_words(found.top5, found.images)} if len(model.classes) > 5 else {}),
        "card": f"{run.out / CARD}, {run.out / CONFUSION}, {run.out / 'curves.png'}; {see_report(str(run.out))}",
        **what_next("finetune", str(run.out)),
    }
    print_settings(run.console, "done", done)
    return True


def choose_weights(job: FinetuneJob) -> tuple[str, int]:
    """Put the weights that --score names into the evaluated model and the run's model.safetensors.

    Returns: which they are, and the step after which they stood.
    """
    run, model = job.run, job.evaluated
    run.accelerator.wait_for_everyone()
    best, weights, position = run.out / BEST_FILE, run.out / WEIGHTS_FILE, run.position
    if job.config.score == "best" and position.best_step and best.is_file():
        model.load_state_dict(load_file(best))
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            temporary = weights.with_name(f".{weights.name}.best.tmp")
            shutil.copyfile(best, temporary)
            temporary.replace(weights)
        return "best", position.best_step
    if job.config.score == "best":
        run.console.print(f"[red]{best} is not there:[/red] the last weights are scored")
    if run.accelerator.is_main_process:
        write_weights(weights, model, run.passport())
    return "last", position.step


@lock.letting_go
def resume(folder: str, changes: ResumeConfig) -> int:
    """Continue the fine-tuning in a folder from its newest whole checkpoint.

    Raises:
        UserError: no whole checkpoint, or a change that would alter the numbers.
    """
    config = read(FinetuneConfig, Path(folder) / "config.json")
    return main(config.source, changed(config, changes, folder), resumed=True)
