"""How large a batch fits into this machine: tried on a GPU, estimated elsewhere, where trying would make it swap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from rich.console import Console

from maekit.config import PretrainConfig, UserError
from maekit.failures import out_of_memory
from maekit.models.mae import MaskedAutoencoder
from maekit.terminal import make_progress
from maekit.training.trial import Trial, state_bytes

RAM_SHARE = 0.8
"""Share of the free memory that a run may count on; the rest is for the loader, temporary tensors and the system."""
LARGEST_BATCH = 16384
"""The search for the largest batch on a GPU ends here."""


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or the machine's within the limit of its container."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(counts.get("inactive_file", 0))  # files that were read, and that make room for whoever needs it
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdigit() else free


def check_memory(config: PretrainConfig, free: int) -> None:
    """Refuse a model whose weights alone do not fit, before they are made and the machine swaps."""
    with torch.device("meta"):
        needed = state_bytes(MaskedAutoencoder(config, (0.5,) * config.in_chans, (0.5,) * config.in_chans))
    if needed > RAM_SHARE * free:
        raise UserError(
            f"--model {config.model}: weights, gradients and AdamW's moments take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free here: take a smaller model"
        )


def find_limit(trial: Trial, free: int, console: Console) -> tuple[int, int]:
    """The largest batch of one process, and bytes for each of its images: tried on CUDA, elsewhere estimated.

    The estimate is what a forward pass keeps for the backward pass: 83 MB an image for ViT-B at 224 px in float32,
    where the peak of the process really grew by 71 MB an image.
    """
    small, large = (trial.saved_bytes(batch) for batch in (1, 3))
    per_image = max(1, (large - small) // 2)
    if trial.device.type != "cuda":
        return max(0, int((RAM_SHARE * free - trial.state_bytes) / per_image)), per_image

    def fits(batch: int) -> bool:
        progress.update(bar, description=f"does a batch of {batch:,} fit?")
        try:
            trial.step(*trial.images(batch))
            trial.wait()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            trial.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    with make_progress(console) as progress:
        bar = progress.add_task("", total=None)
        largest = search(fits, LARGEST_BATCH)
        if largest:
            torch.cuda.reset_peak_memory_stats(trial.device)
            still = torch.cuda.memory_allocated(trial.device) + trial.state_bytes // 4  # no gradients are there yet
            trial.step(*trial.images(largest))
            per_image = max(1, (torch.cuda.max_memory_allocated(trial.device) - still) // largest)
    return largest, per_image


def search(fits: Callable[[int], bool], cap: int) -> int:
    """The largest batch that fits, to about 6 %: by doubling, then by halving the gap; 0 where not even 1 does."""
    low, high = 0, 1
    while high <= cap and fits(high):
        low, high = high, 2 * high
    while low and high <= cap and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least_accum(share: int, fits: int, at_least: int = 1) -> int | None:
    """The fewest equal parts, but at least so many, of a process's share that fit; None where not even 1 image does."""
    parts = (n for n in range(at_least, share + 1) if share % n == 0 and share // n <= fits)
    return next(parts, None)
