"""The host never waits for the device inside a training step: every read of a value is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from maekit.config import PretrainConfig
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import to_device
from maekit.training.guard import Guard, backward, guarded_update
from maekit.training.optim import make_optimizer
from maekit.training.step import masks_ahead, part_loss

WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
}
"""Operations whose result the host needs, by value or by size, before it can go on."""


class Syncs(TorchDispatchMode):
    """Counts them; on a CPU they do not wait, but they are called all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1] or ()
        )
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change", [{}, {"clip_grad": 1.0}, {"drop_path": 0.1}, {"target": "pixels"}, {"precision": "bf16"}]
)
def test_a_step_waits_for_nothing(change: dict[str, Any]) -> None:
    """Masks, forward, backward, the look for non-finite numbers and the update by the fused kernels that GPUs use."""
    config = PretrainConfig(**(TINY | {"precision": "fp32", "data": "-"} | change))
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).train()
    optimizer = make_optimizer(model, config, 1e-3)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    guard = Guard(torch.device("cpu"), 5, 0)
    images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    masks = masks_ahead(model, config, ((0, np.arange(4)) for _ in range(2)), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.encode(model.normalize(images))  # on a CPU the first floats of all are looked at, whoever trains
    with Syncs() as syncs:
        for step in range(2):
            loss = part_loss(model, config, images, next(masks))
            backward(loss)
            guarded_update(model, optimizer, guard, step, config.clip_grad)
    assert syncs.seen == []
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with Syncs() as syncs:
        float(loss.detach())
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(syncs.seen) >= 2, "nothing is counted"


@pytest.mark.gpu
def test_a_step_waits_for_nothing_on_cuda() -> None:
    """CUDA's own watch raises at the first wait."""
    device = torch.device("cuda")
    config = PretrainConfig(**(TINY | {"precision": "bf16", "data": "-"}))
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).to(device).train()
    optimizer, guard = make_optimizer(model, config, 1e-3), Guard(device, 5, 0)
    images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8, device=device)
    masks = masks_ahead(model, config, ((epoch, np.arange(4)) for epoch in range(3)), device)
    for step in range(3):  # the first allocates
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        backward(part_loss(model, config, images, next(masks)))
        guarded_update(model, optimizer, guard, step, 1.0)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_only_cuda_copies_without_waiting(device: str, waits: bool) -> None:
    """A copy to MPS that is still to be made would read what took a temporary's place."""
    asked: list[bool] = []
    values = SimpleNamespace(
        to=lambda _, non_blocking: asked.append(non_blocking), nbytes=100, device=torch.device("cpu")
    )
    to_device(values, torch.device(device))  # type: ignore[arg-type]
    assert asked == [not waits]


@pytest.mark.parametrize(
    ("device", "size", "pinned"), [("cuda", 10**6, True), ("cuda", 100, False), ("mps", 10**6, False)]
)
def test_large_copies_are_pinned(device: str, size: int, pinned: bool) -> None:
    """CUDA's driver would wait for the device before it copies much memory that is not."""
    asked: list[str] = []
    values: Any = SimpleNamespace(nbytes=size, device=torch.device("cpu"), to=lambda *_, **__: asked.append("copied"))
    values.pin_memory = lambda: asked.append("pinned") or values  # type: ignore[func-returns-value]
    to_device(values, torch.device(device))
    assert asked == ["pinned", "copied"][not pinned :]
