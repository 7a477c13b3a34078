"""One process or several: how many were asked for, what a batch must be for them, and Accelerate's handle on them."""

from __future__ import annotations

import os
import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from maekit.config import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

PATIENCE = timedelta(minutes=30)
"""So long processes wait for one that does something for all of them, such as saving a large model on a slow disk: NCCL
by itself would kill them after ten minutes. One that died is told by its launcher, much sooner."""


def start_accelerator(device: torch.device, trackers: tuple[str, ...], out: Path) -> Accelerator:
    """Accelerate's handle on processes, and the trackers that were asked for.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if device.type == "cuda" and device.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"--device {device}: several processes take a GPU each; choose by CUDA_VISIBLE_DEVICES")
        import torch

        torch.cuda.set_device(device)  # Accelerate takes the current one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=", UserWarning)  # said below, with what to type
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="no",  # the tasks say themselves where autocast begins and ends
                log_with=list(trackers) or None,
                project_dir=str(out),
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=PATIENCE),
                ],
            )
    except (ImportError, ValueError) as error:
        if trackers:
            raise UserError(f"--trackers {' '.join(trackers)}: {error}") from None
        raise
    ready = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing := [name for name in trackers if name not in ready]:  # Accelerate drops them without a word
        raise UserError(f"--trackers {' '.join(missing)}: not installed; pip install {' '.join(missing)}")
    return accelerator


def check_processes(expected: int | None, actual: int) -> None:
    """Refuse to run on another number of processes than was asked for.

    `accelerate launch --num_processes 2` starts a single process on a machine without GPUs, without a word.

    Raises:
        UserError: the numbers differ; says how to start that many.
    """
    asked = expected if expected is not None else _asked_of_launcher()
    if asked is not None and asked != actual:
        raise UserError(
            f"{asked} processes were asked for, but {actual} started: on a machine without GPUs use "
            f"torchrun --nproc_per_node {asked} -m maekit ..., which starts them (accelerate launch does not)"
        )


def refuse_several(command: str) -> None:
    """Refuse a command that one process does where a launcher has started several: each would write the same files.

    Raises:
        UserError: several were started.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and "LOCAL_RANK" in os.environ:  # some clusters set the former for every job
        raise UserError(
            f"maekit {command} runs in one process, and {world} were started: start it without torchrun or accelerate "
            "launch"
        )


def check_batch(batch_size: int, accum: int, world: int, unit: int = 1, goes_on: bool = False) -> None:
    """Refuse a batch that the processes and accumulation steps cannot share evenly.

    unit: what each part must be a multiple of, for what is named instead.
    goes_on: a resumed run keeps its batch.

    Raises:
        UserError: names the numbers, and batches near to it, or fewer processes.
    """
    if batch_size % (world * accum):
        fewer = next((n for n in range(world, 1, -1) if batch_size % (n * accum * unit) == 0), 1)
        raise UserError(
            f"--batch-size {batch_size} is not divisible by {world} processes x --accum {accum}: it "
            "counts the images of one optimiser step over all of them; "
            + (f"a run that goes on keeps it: start {fewer} process{'es' if fewer > 1 else ''}" if goes_on
               else f"such as {near_batches(batch_size, world * accum * unit)}")
        )  # fmt: skip


def near_batches(batch_size: int, unit: int) -> str:
    """The flag with the multiples of a unit that are next to a batch: --batch-size 63 or 66."""
    lower = batch_size // unit * unit
    return "--batch-size " + " or ".join(str(one) for one in (lower, lower + unit) if one)


def _asked_of_launcher() -> int | None:
    """`--num_processes N` in the command line of the parent process, if that is accelerate's launcher."""
    try:
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        words = psutil.Process(os.getppid()).cmdline()
    except Exception:
        return None
    if not any("accelerate" in word for word in words) or "launch" not in words:
        return None
    text = " ".join(words)
    found = re.search(r"--num[_-]processes[ =](\d+)", text)
    return int(found.group(1)) if found else None
