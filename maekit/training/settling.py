"""Statistics of a batch norm after a short training, for probes that are scored by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

FEW_STEPS = 100
"""After fewer, more than 3e-5 of a batch norm's first statistics (0 and 1) are left in those that ran along."""


class Normed(Protocol):
    """A probe with one batch norm, which takes a batch of its inputs."""

    norm: nn.BatchNorm1d

    def __call__(self, inputs: Tensor) -> Tensor: ...


@torch.no_grad()
def settle_statistics(probes: Sequence[Normed], batches: Iterable[Tensor]) -> None:
    """Give every batch norm the mean statistics of these batches, in the place of those that ran along.

    The probes must be in training mode.
    """
    for probe in probes:
        probe.norm.reset_running_stats()
        probe.norm.momentum = None  # torch's word for a plain mean
    for inputs in batches:
        for probe in probes:
            probe(inputs)
