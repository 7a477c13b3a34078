"""What would this recipe cost here? A dry run of a few steps, then the arithmetic of the whole run.

    maekit plan cifar10 --data cifar10
    maekit plan in1k-vit-base --images 1281167 --processes 8

Nothing is written but the plan (`--out plan.json`). Cost: under a minute for a small model; a step of a large one on a
CPU takes seconds. Forward and backward are timed on a batch of a suitable size, the update by itself: a step of the
recipe is so many of the first and one of the second.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from maekit.compiling import choose_compile
from maekit.config import PlanConfig, PretrainConfig, UserError, flag
from maekit.data.loader import Pool, SampleOrder, choose_training, open_pool, split_heldout
from maekit.data.order import MIN_HELDOUT
from maekit.data.sources import open_configured
from maekit.environment import environment
from maekit.models.encoder import flops_per_image
from maekit.models.mae import model_problems
from maekit.runtime import Choice
from maekit.terminal import counting, make_console, make_progress, print_settings, remark, short_size, short_time
from maekit.training.advice import few_steps
from maekit.training.batch import follow_images, short_run_rate
from maekit.training.capacity import LARGEST_BATCH, RAM_SHARE, check_memory, find_limit, free_bytes, least_accum
from maekit.training.optim import duration_steps
from maekit.training.prepare import choose_machine
from maekit.training.trial import Trial
from maekit.weights.passport import size_problems

NO_FLAGS = ("data", "out", "processes", "recipe", "follow_images")
"""Fields that the command at the end does not have, or names by itself."""
SUITABLE_SECONDS = 3.0
"""The batch of the dry run is doubled as long as the larger one should take less than this for its gradients."""
REPLAYS = 20
"""Steps that are replayed without a wait between them: enough for images that are augmented ahead to count."""
LOADER_SECONDS, LOADER_BATCH, LOADER_WARMUP = 5.0, 32, 3
"""The loader alone is timed for so long, in batches of so many images, after so many that are not counted."""


class Data(NamedTuple):
    """What will be trained on: counts, and where --data is given, the images and how they come."""

    name: str
    train: int
    heldout: int
    pool: Pool | None = None
    order: SampleOrder | None = None
    in_memory: Choice[bool] | None = None


class Timing(NamedTuple):
    """Seconds of each timed step: forward and backward of `batch` images, and update; and the loader's images/s."""

    batch: int
    gradients: list[float]
    updates: list[float]
    loader: float | None


class Forecast(NamedTuple):
    """The whole run: steps, images/s of all processes by what bounds them, and seconds."""

    steps: int
    step_speed: float
    speed: float
    bound: str
    training: float
    heldout: float


def main(config: PlanConfig, base: PretrainConfig, name: str) -> int:
    """Dry run, forecast, and what to type next; `base` is the recipe that was called by `name`.

    Raises:
        UserError: everything that is wrong with the config; then unusable data, or a model that does not fit.
    """
    problems = size_problems(config) or config.problems() + model_problems(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("maekit plan runs in one process: tell it by --processes how many the run will have")
    if config.out and Path(config.out).expanduser().is_dir():
        problems.append(f"--out {config.out}: is a folder; name a file for the plan, such as plan.json")
    if problems:
        raise UserError(*problems)
    console = make_console()
    choices = choose_machine(config, config.processes or 1, config.processes or 1)
    device, precision = choices["device"], choices["precision"]
    config, data = open_data(config, choices, console)
    if data.in_memory is not None:
        choices["in memory"] = data.in_memory
    free = free_bytes(device.value)
    check_memory(config, free)
    trial = Trial(config, device.value, precision=precision.value, fused_attention=choices["attention"].value)
    share = config.batch_size // (config.processes or 1)
    fits, per_image = find_limit(trial, free, console)
    accum = least_accum(share, fits, config.accum)
    if accum is None:
        raise UserError(
            f"--model {config.model}: not even one image fits beside its weights into the {short_size(free)} that are "
            "free: take a smaller model or smaller images"
        )
    if accum > 1:
        choices["compile"] = choose_compile(config.compile, device.value, alone=False)
    trial.compile(choices["compile"].value, console.print)
    batch = suitable_batch(trial, min(share // accum, data.train))
    timing = time_run(trial, config, data, batch, console)
    forecast = predict(config, data, timing, shares_cores=device.value.type != "cuda")
    command = next_command(config, base, name, accum)
    result = {
        "recipe": name,
        "config": dataclasses.asdict(config),
        "environment": environment(device.value),
        "choices": {key: [str(choice.value), choice.reason] for key, choice in choices.items()},
        "images": {"train": data.train, "heldout": data.heldout},
        "timing": timing._asdict(),
        "memory": {"free": free, "state": trial.state_bytes, "per_image": per_image, "largest_batch": fits,
                   "measured": device.value.type == "cuda"},
        "accum": accum,
        "forecast": forecast._asdict(),
        "command": command,
    }  # fmt: skip
    if config.out:
        write(Path(config.out).expanduser(), result)
    title = f"maekit plan {name}"
    print_settings(console, title, {**choices, **describe(config, data, trial, timing, forecast)})
    print_settings(console, "memory", describe_memory(config, trial, free, fits, per_image, accum))
    remark(console, few_steps(config, forecast.steps, data.train // config.batch_size, config.processes or 1))
    console.print(f"next: {command}", soft_wrap=True, markup=False)
    return 0


def open_data(config: PlanConfig, choices: dict[str, Choice[Any]], console: Console) -> tuple[PlanConfig, Data]:
    """Open --data as the trainer does, or count --images; with the batch and rate that follow from their number."""
    world = config.processes or 1
    if config.images is not None:
        held = max(MIN_HELDOUT, round(config.heldout_share * config.images))
        data = Data(f"{config.images:,} images", min(config.images - held, config.train_images or config.images), held)
        return follow_images(config, max(0, data.train), world, short_run_rate, console), data
    source = open_configured(config, config.in_chans)
    remark(console, source.remarks())
    train, heldout = split_heldout(len(source.train), config.heldout_share, groups_N=source.train.groups)
    train = choose_training(train, config.train_images)
    config = follow_images(config, len(train), world, short_run_rate, console)
    with counting(console, "reading images") as progress:
        pool, in_memory = open_pool(source.train, config, choices["device"].value, choices["workers"], progress)
    order = SampleOrder(train, 1, config.seed)
    return config, Data(config.data, len(train), len(heldout), pool, order, in_memory)


def suitable_batch(trial: Trial, most: int) -> int:
    """A batch that takes a moment: doubled from 1 as long as twice as many images should stay below the limit."""
    if trial.device.type == "cuda":
        return most  # it was found to fit, and another size would be compiled anew
    batch = 1
    trial.step(*trial.images(1))  # makes the moments, and wakes kernels up
    while batch < most:
        gradients, _ = timed_step(trial, lambda: trial.images(batch))  # noqa: B023 # called at once
        if 2 * gradients > SUITABLE_SECONDS:
            break
        batch = min(2 * batch, most)
    return batch


def timed_step(trial: Trial, draw: Callable[[], tuple[Any, Any]]) -> tuple[float, float]:
    """One step: the seconds of drawing, forward and backward, and those of the update."""
    trial.wait()
    start = time.perf_counter()
    images, ids = draw()
    trial.gradients(images, ids)
    trial.wait()
    middle = time.perf_counter()
    trial.update()
    trial.wait()
    return middle - start, time.perf_counter() - middle


def timed_replays(trial: Trial, draw: Callable[[], tuple[Any, Any]]) -> tuple[float, float]:
    """Seconds of a step that is replayed as a whole, so that nothing is left for an update: of several in a row, as
    images are drawn for several at once.
    """
    trial.wait()
    start = time.perf_counter()
    for _ in range(REPLAYS):
        trial.step(*draw())
    trial.wait()
    return (time.perf_counter() - start) / REPLAYS, 0.0


def time_run(trial: Trial, config: PlanConfig, data: Data, batch: int, console: Console) -> Timing:
    """Time the steps, on the data where they are in memory and so part of the step; then the loader where it is not."""
    draw: Callable[[], tuple[Any, Any]]
    if data.pool is not None and data.in_memory is not None and data.in_memory.value:
        batches = data.pool.train_batches(shares(data, batch))
        draw = lambda: next(batches)[:2]  # noqa: E731
    else:
        noise = trial.images(batch)
        draw = lambda: noise  # noqa: E731
    timed, each = (timed_step, 1) if trial.replayed is None else (timed_replays, REPLAYS)
    timed(trial, draw)  # compiles, and records
    gradients: list[float] = []
    updates: list[float] = []
    with make_progress(console) as progress:
        bar = progress.add_task("timing steps", total=config.dry_steps)
        while len(gradients) < config.dry_steps:
            if len(gradients) >= 2 and each * (sum(gradients) + sum(updates)) > config.dry_seconds:
                break
            forth, update = timed(trial, draw)
            gradients.append(forth)
            updates.append(update)
            progress.update(bar, completed=len(gradients))
    loader = None
    if data.pool is not None and data.in_memory is not None and not data.in_memory.value:
        with make_progress(console) as progress:
            progress.add_task("timing the loader", total=None)
            loader = loader_speed(data)
    return Timing(batch, gradients, updates, loader)


def shares(data: Data, batch: int) -> Iterator[tuple[int, Any]]:
    """Batches of any size in the order of training, without end."""
    assert data.order is not None
    order = SampleOrder(data.order.train_ids, batch, data.order.seed)
    step = 0
    while True:
        yield order.step_ids(step)
        step += 1


def loader_speed(data: Data) -> float:
    """Images/s of the loader with nobody else at work."""
    assert data.pool is not None
    batches = data.pool.train_batches(shares(data, min(LOADER_BATCH, data.train)))
    for _ in range(LOADER_WARMUP):
        next(batches)
    start, images = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < LOADER_SECONDS:
        images += len(next(batches).sample_ids)
    return images / seconds if images else 0.0


def predict(config: PlanConfig, data: Data, timing: Timing, *, shares_cores: bool) -> Forecast:
    """The whole run from its pieces.

    A step of one process takes share / batch x (forward and backward of a batch) + update. The loader works beside
    a GPU, so the slower of the two counts; on a CPU both want the same cores, so their times add up.
    """
    world = config.processes or 1
    share = config.batch_size // world
    seconds = share / timing.batch * statistics.median(timing.gradients) + statistics.median(timing.updates)
    step_speed = speed = config.batch_size / seconds
    bound = "the step"
    if timing.loader is not None:
        if shares_cores:
            speed, bound = 1 / (1 / step_speed + 1 / timing.loader), "step and loader, which share the cores"
        elif timing.loader * world < step_speed:
            speed, bound = timing.loader * world, "the loader"
    per_epoch = data.train // config.batch_size
    steps = duration_steps(config.epochs, config.steps, per_epoch)
    # A held-out pass is a forward pass: about a third of a step for each image.
    passes = math.ceil(steps / per_epoch / config.eval_every) + 1
    return Forecast(
        steps, step_speed, speed, bound, steps * config.batch_size / speed, passes * data.heldout / 3 / speed
    )


def next_command(config: PlanConfig, base: PretrainConfig, name: str, accum: int) -> str:
    """What starts the run: the recipe, every field that differs from it, and the accumulation that fits."""
    count = config.processes or 1
    here = max(1, torch.cuda.device_count())
    nodes = count // here if here > 1 and count > here and count % here == 0 else 1
    launcher = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(count // nodes)]
    words = [*launcher, "-m"] if count > 1 else []
    words += ["maekit", "pretrain", name, "--data", config.data or "FOLDER"]
    for field in dataclasses.fields(PretrainConfig):
        value = getattr(config, field.name)
        if field.name == "accum":
            value = accum
        if value == getattr(base, field.name) or field.name in NO_FLAGS:
            continue
        if field.type == "bool":
            words.append(f"--{'' if value else 'no-'}{flag(field.name)}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [
                f"--{flag(field.name)}",
                *(shortest(one) if isinstance(one, float) else str(one) for one in values),
            ]
    return shlex.join([*words, "--out", f"runs/{config.recipe}"])


def shortest(value: float) -> str:
    """A number with as few digits as give it back exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def long_time(seconds: float) -> str:
    """As `short_time`, with days and years where hours say little."""
    days = seconds / 86400
    if days < 2:
        return short_time(seconds)
    return f"{days:.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def rate(images_per_s: float) -> str:
    """A speed with as many digits as mean something."""
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 100 else f"{images_per_s:.3g} images/s"


def describe(config: PlanConfig, data: Data, trial: Trial, timing: Timing, forecast: Forecast) -> dict[str, str]:
    """Speed and length in words."""
    forth, update = statistics.median(timing.gradients), statistics.median(timing.updates)
    cost = config.masks_per_image * flops_per_image(trial.model.config, trial.model.num_visible)
    world, count = config.processes or 1, len(timing.gradients)
    here = timing.batch / forth
    in_memory = data.in_memory is not None and data.in_memory.value
    what = f"image{'s' if timing.batch > 1 else ''} {'from memory' if in_memory else 'of noise'}"
    finish = time.localtime(time.time() + min(forecast.training + forecast.heldout, 3e9))
    spread = f"{min(timing.gradients):.3g} to {max(timing.gradients):.3g} s"
    work = "forward and backward"
    steps = f"{forth:.3g} s (median; {spread}), update {update:.3g} s"
    if trial.replayed is not None:
        work, steps = "forward, backward and update", f"{forth:.3g} s (median; {spread})"
    said = {
        "data": f"{data.name}: {data.train:,} to train on, {data.heldout:,} held out",
        "dry run": f"{count} step{'s' if count > 1 else ''} of {timing.batch} {what}: {work} {steps}",
        "step": f"{rate(forecast.step_speed)} with batches of {config.batch_size:,}"
        + (f" on {world} processes as quick as this one" if world > 1 else "")
        + f"; here {here * cost / 1e12:.3g} TFLOP/s in {work}",
    }
    if count < config.dry_steps:
        said["dry run"] += f"; stopped after {config.dry_seconds:g} s instead of {config.dry_steps} steps"
    if timing.loader is not None:
        said["loader"] = f"{rate(timing.loader)} alone"
    elif data.pool is None:
        said["loader"] = "not timed: --data is needed for that"
    said["bound by"] = f"{forecast.bound}: {rate(forecast.speed)}"
    per_epoch = data.train // config.batch_size
    said["length"] = f"{forecast.steps:,} steps = {forecast.steps / per_epoch:.4g} epochs x {per_epoch:,} steps"
    said["time"] = f"{long_time(forecast.training)} of training, {long_time(forecast.heldout)} of held-out passes; "
    said["time"] += "probes, panels and checkpoints come on top"
    said["finished"] = time.strftime("%A %d %B %Y, %H:%M", finish) + ", if it is started now"
    return said


def describe_memory(
    config: PlanConfig, trial: Trial, free: int, fits: int, per_image: int, accum: int
) -> dict[str, str]:
    """Memory and the batch in words."""
    measured = trial.device.type == "cuda"
    world = config.processes or 1
    capped = "at least " if measured and fits >= LARGEST_BATCH else ""
    said = {
        "needed": f"{short_size(trial.state_bytes)} of weights, gradients and moments, and {short_size(per_image)} "
        f"an image ({'measured' if measured else 'estimated from what a forward pass keeps'})",
        "fits": f"{capped}{fits:,} images a process at once, in {short_size(free)} that are free"
        + (
            " (tried)"
            if measured
            else f" (estimated, counting on {RAM_SHARE:.0%} of it; not tried: nothing shall swap)"
        ),
    }
    share = config.batch_size // world
    said["batch"] = f"{config.batch_size:,} = {share // accum} images x {world} process{'es' if world > 1 else ''} "
    said["batch"] += f"x --accum {accum}"
    return said


def write(path: Path, result: dict[str, Any]) -> None:
    """The plan as JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None
