"""Numbers that are not finite: found on the device before the update, skipped there, reported, dumped and replayed.

A step is bad where its loss or its gradient has a NaN or an infinity. `backward` makes the gradient NaN where the loss
is not finite, and the processes average their gradients, so the gradient's norm alone tells every process the same.
The norm stays on the device, and so does the decision: the fused AdamW leaves out the update where `found_inf` is 1.
The host learns of it when it looks, at the next line of the log. A row of bad steps that is too long also stops the
good ones behind it, so that the weights stay those before the row however late the host looks.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maekit.config import PretrainConfig, SourceConfig, UserError
from maekit.configfile import read, to_json
from maekit.data.loader import Ids, Pool, open_pool
from maekit.data.sources import open_source
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import Choice
from maekit.training.step import part_loss
from maekit.weights.store import WEIGHTS_FILE, load_as

RECORD_FILE, CONFIG_FILE = "step.json", "config.json"
SPIKE_HISTORY, SPIKE_MINIMUM, SPIKE_DEVIATIONS = 50, 10, 6.0
"""A logged loss is a spike above the median of the last 50 (at least 10) by 6 median absolute deviations."""
_PART = 256
"""Images per forward pass of a replay."""


class Guard:
    """Finds bad steps on the device, and says on the host which they were."""

    def __init__(self, device: torch.device, limit: int, row: int = 0) -> None:
        self.limit = limit
        self._row = torch.tensor(float(row), device=device)
        self._full = torch.zeros((), device=device)
        self._unread: list[tuple[int, Tensor]] = []

    def see(self, step: int, norm: Tensor) -> Tensor:
        """1.0 on the device where this step must be skipped, else 0.0; `norm` is that of the whole gradient."""
        bad = (~norm.isfinite()).float()
        self._row = (self._row + 1) * bad
        skip = torch.maximum(bad, self._full)
        self._full = torch.maximum(self._full, (self._row >= self.limit).float())
        self._unread.append((step, torch.stack((bad, self._row))))
        return skip

    def look(self) -> tuple[list[int], int, bool]:
        """The bad steps since the last look, how many of them stand in a row at its end, and whether that is too many.

        Waits for the device. What follows a row that is too long is not told: it never happened.
        """
        bad_steps, row = [], int(self._row)
        if self._unread:
            for (step, _), (bad, row_now) in zip(
                self._unread, torch.stack([flags for _, flags in self._unread]).tolist(), strict=True
            ):
                row = int(row_now)
                if bad:
                    bad_steps.append(step)
                if row >= self.limit:
                    break
        self._unread = []
        return bad_steps, row, row >= self.limit


def backward(loss: Tensor) -> None:
    """The gradients of a loss; all of them are NaN where the loss itself is not finite (0 x infinity is NaN)."""
    loss.backward(1 + 0 * loss.detach())


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, on the device; not finite where one of them is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def update(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step of AdamW, or none where `skip` is 1: decided on the device by the fused kernels, else on the host."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
        optimizer.step()
    elif not bool(skip):
        optimizer.step()


def guarded_update(
    model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, step: int, clip_grad: float | None
) -> Tensor:
    """Use the gradients of a step (0-based), or throw them away where they are not finite; nothing waits for a GPU.

    Returns: 1.0 where the step was skipped, else 0.0, on the device.
    """
    norm = gradient_norm(model)
    skip = guard.see(step, norm)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    update(optimizer, skip)
    optimizer.zero_grad(set_to_none=True)
    return skip


def put_back(tensors: Iterable[Tensor], before: Sequence[Tensor], skip: Tensor) -> None:
    """Tensors that a forward pass has changed, as they were before it where `skip` is 1; nothing waits for a GPU."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(skip > 0, old, tensor))


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
    return part_loss(model, config, next(iter(pool.train_batches([(epoch, ids)]))), epoch)
