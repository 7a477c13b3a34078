"""What is written down of losses that are out of place: steps that are not finite, a dump to do one again, spikes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from maekit.config import PretrainConfig, SourceConfig, UserError
from maekit.configfile import read, to_json
from maekit.data.loader import Ids, Pool, open_pool
from maekit.data.sources import open_source
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import Choice
from maekit.training.guard import backward, gradient_norm
from maekit.training.step import masks_ahead, part_loss
from maekit.weights.store import WEIGHTS_FILE, load_as

RECORD_FILE, CONFIG_FILE = "step.json", "config.json"
SPIKE_HISTORY, SPIKE_MINIMUM, SPIKE_DEVIATIONS = 50, 10, 6.0
"""A logged loss is a spike above the median of the last 50 (at least 10) by 6 median absolute deviations."""
_PART = 256
"""Images per forward pass of a replay."""


def is_spike(before: Sequence[float], value: float) -> bool:
    """Whether a logged loss stands far above those before it."""
    if len(before) < SPIKE_MINIMUM:
        return False
    median = statistics.median(before)
    deviation = statistics.median(abs(loss - median) for loss in before)
    return value > median + SPIKE_DEVIATIONS * deviation and value > 1.001 * median


def note_bad_steps(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add bad steps to nonfinite.jsonl; those that a resumed run repeats stand there already.

    Raises:
        OSError: the disk is full or fails.
    """
    known = set(path.read_text().splitlines()) if path.exists() else set()
    lines = [line for record in records if (line := json.dumps(record)) not in known]
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def dump(
    folder: Path,
    model: MaskedAutoencoder,
    config: PretrainConfig,
    record: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    """Write down a bad step: weights before it, config, and its step, epoch, sample ids and learning rate.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    (folder / CONFIG_FILE).write_text(to_json(config))
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")


class Replay(NamedTuple):
    """What a bad step gives when it is done again: loss, norm of the gradient, and the samples with a bad loss."""

    loss: float
    gradient_norm: float
    bad_ids: list[int]


def replay(folder: str | Path, device: str = "cpu") -> Replay:
    """Do the step of a dump (`RUN/nonfinite/step-N`) again: the same weights, images, crops, flips and masks.

    The images are read anew from where the run's config says. Paths that --drop-path drops are drawn anew.

    Raises:
        UserError: no dump there, or other data than the run had.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        config = read(PretrainConfig, folder / CONFIG_FILE)
        epoch, ids = int(record["epoch"]), np.array(record["ids"], np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: holds no dump of a step ({error})") from None
    part = open_source(
        config.data, in_chans=config.in_chans, image_column=config.image_column, label_column=config.label_column
    ).train
    if part.fingerprint != record.get("fingerprint"):
        raise UserError(f"{config.data}: not the images that the run of {folder} was trained on")
    pool, _ = open_pool(part, config, torch.device(device), Choice(0, "one step only"))
    model = load_as(folder, SourceConfig(), device).train()
    total, bad_ids = 0.0, []
    for start in range(0, len(ids), _PART):
        some = ids[start : start + _PART]
        loss = _loss(model, config, pool, some, epoch)
        backward(loss * len(some) / len(ids))
        total += float(loss.detach()) * len(some) / len(ids)
        if not bool(loss.isfinite()):
            with torch.no_grad():
                alone = [float(_loss(model, config, pool, some[i : i + 1], epoch)) for i in range(len(some))]
            bad_ids += [int(one) for one, value in zip(some, alone, strict=True) if not np.isfinite(value)]
    return Replay(total, float(gradient_norm(model)), bad_ids)


def _loss(model: MaskedAutoencoder, config: PretrainConfig, pool: Pool, ids: Ids, epoch: int) -> Tensor:
    """The training loss of these samples in this epoch."""
    images = next(iter(pool.train_batches([(epoch, ids)]))).images
    return part_loss(model, config, images, next(masks_ahead(model, config, [(epoch, ids)], images.device)))
