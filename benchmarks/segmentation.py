"""A training step of maekit segment at full size, on generated images: seconds and peak memory.

    python -m benchmarks.segmentation                         # the ade20k preset, ViT-B, 512 px, batch 2, 150 classes
    python -m benchmarks.segmentation --preset small --model vit_tiny_patch16_224 --batch-size 8 --classes 11

All that a run does is in it: augmentation, forward and backward pass, AdamW; scoring and saving are not.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.timing import show, spread, write_json
from maekit.config.segmentation import preset
from maekit.data.pairs import VOID
from maekit.models.segmentation import pixel_loss
from maekit.seeding import seed_step
from maekit.stopping import StopRequest
from maekit.terminal import make_console
from maekit.training.guard import Guard, backward, guarded_update
from maekit.training.segmentation_job import next_parts, open_batches, scheduled_rate, step_denominator
from maekit.training.segmentation_prepare import prepare
from maekit.training.supervised import set_scaled_rate


@dataclass
class SegmentationConfig:
    """Seconds and peak memory of a segmentation step."""

    preset: str = "ade20k"
    """The preset that is timed."""
    model: str = "mae_vit_base_patch16"
    """Architecture of the encoder, with random weights."""
    classes: int = 150
    """Classes of the generated annotations."""
    batch_size: int = 2
    """Images in a step."""
    steps: int = 2
    """Steps that are timed, after one that is not."""
    device: str = "auto"
    """auto, cpu or cuda."""
    grad_checkpoint: bool = False
    """Compute the encoder's blocks again in the backward pass."""
    json: str | None = None
    """File for all numbers."""


def generate(folder: Path, classes: int, count: int = 12, size_hw: tuple[int, int] = (512, 683)) -> Path:
    """Images of blocks of colour with noise, and their annotations: values 1 to `classes`, 0 for void."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (classes + 1, 3))
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
    for index in range(count):
        coarse = random.integers(0, classes + 1, (8, 10))
        truth = coarse.repeat(64, axis=0).repeat(69, axis=1)[: size_hw[0], : size_hw[1]].astype(np.uint8)
        image = colours[truth] + random.integers(-30, 31, (*size_hw, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / "training" / f"{index}.png")
        Image.fromarray(truth).save(folder / "annotations" / "training" / f"{index}.png")
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(1, classes + 1)))
    return folder


def measure(config: SegmentationConfig, folder: Path) -> dict[str, Any]:
    """Seconds of each step, and the peak memory in GiB: the process's on a CPU, the allocator's on a GPU."""
    settings = dataclasses.replace(
        preset(config.preset), source=f"random:{config.model}", out=str(folder / "run"), batch_size=config.batch_size,
        data=str(generate(folder / "data", config.classes)), workers=1, device=config.device, heldout_share=0.1,
        grad_checkpoint=config.grad_checkpoint, steps=config.steps + 1, warmup_steps=1,
    )  # fmt: skip
    job = prepare(settings, False, make_console(), StopRequest())
    device, seconds = job.run.accelerator.device, []
    batches, guard = open_batches(job), Guard(device, 5)
    job.run.stop.patience = None
    job.model.train()
    for step in range(config.steps + 1):
        began = time.perf_counter()
        set_scaled_rate(job.run.optimizer, scheduled_rate(job.config, step))
        parts = next_parts(job, batches)
        assert parts is not None
        seed_step(0, step, 0)
        denominator = step_denominator(job, [labels for _, labels in parts])
        for images, labels in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
                scores = job.model(images)
            backward(pixel_loss(scores, labels, VOID, job.weights_K, denominator, job.config.aux_weight))
        guarded_update(job.model, job.run.optimizer, guard, step, None)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    millions = sum(parameter.numel() for parameter in job.model.parameters()) / 1e6
    return {"seconds": seconds[1:], "gib": peak, "parameters_m": millions, "precision": job.config.precision}


def main(config: SegmentationConfig) -> int:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, Path(folder))
    row = [
        f"{config.preset}, {config.model}, {config.classes} classes", str(config.batch_size), found["precision"],
        f"{found['parameters_m']:.1f}", str(spread(found["seconds"])), f"{found['gib']:.1f}",
    ]  # fmt: skip
    columns = ("preset", "batch", "precision", "M parameters", "s a step: median (quartiles)", "peak GiB")
    show("maekit segment, one training step", columns, [row])
    write_json(config.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SegmentationConfig)))
