"""Numbers that are not finite: found on the device before the update, and skipped there.

A step is bad where its loss or its gradient has a NaN or an infinity. `backward` makes the gradient NaN where the loss
is not finite, and the processes average their gradients, so the gradient's norm alone tells every process the same.
The norm stays on the device, and so does the decision: the fused AdamW leaves out the update where `found_inf` is 1.
The host learns of it when it looks, at the next line of the log. A row of bad steps that is too long also stops the
good ones behind it, so that the weights stay those before the row however late the host looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Guard:
    """Finds bad steps on the device, and says on the host which they were."""

    def __init__(self, device: torch.device, limit: int, row: int = 0) -> None:
        self.limit = limit
        self._row = torch.tensor(float(row), device=device)
        self._full = torch.zeros((), device=device)
        self._unread: list[tuple[int, Tensor]] = []

    def judge(self, norm: Tensor) -> Tensor:
        """On the device: whether to skip this step, whether it is bad itself, and how many bad ones stand in a row.

        Its own tensors are changed in place, so a recorded step finds them again.
        """
        bad = (~norm.isfinite()).float()
        self._row.add_(1).mul_(bad)
        verdict = torch.stack((torch.maximum(bad, self._full), bad, self._row))
        self._full.copy_(torch.maximum(self._full, (self._row >= self.limit).float()))
        return verdict

    def note(self, step: int, verdict: Tensor) -> Tensor:
        """Keep what was judged of a step (0-based) for the next look; returns whether it is skipped, as `see` does."""
        self._unread.append((step, verdict))
        return verdict[0]

    def look(self) -> tuple[list[int], int, bool]:
        """The bad steps since the last look, how many of them stand in a row at its end, and whether that is too many.

        Waits for the device. What follows a row that is too long is not told: it never happened.
        """
        bad_steps, row = [], int(self._row)
        if self._unread:
            for (step, _), (_, bad, row_now) in zip(
                self._unread, torch.stack([verdict for _, verdict in self._unread]).tolist(), strict=True
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
    return guard.note(step, update_if_finite(model, optimizer, guard, clip_grad))


def update_if_finite(
    model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, clip_grad: float | None
) -> Tensor:
    """The part of `guarded_update` on the device: what the guard judges of the step, which is yet to be noted."""
    norm = gradient_norm(model)
    verdict = guard.judge(norm)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    update(optimizer, verdict[0])
    optimizer.zero_grad(set_to_none=True)
    return verdict


def put_back(tensors: Iterable[Tensor], before: Sequence[Tensor], skip: Tensor) -> None:
    """Tensors that a forward pass has changed, as they were before it where `skip` is 1; nothing waits for a GPU."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(skip > 0, old, tensor))
