"""Generators of libraries, seeded by key: an augmentation that is not ours still depends on its sample alone.

torch, NumPy and Python each have a global generator that libraries draw from; there is no other way to steer them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from maekit.rng import Purpose, random_bits


def seed_everything(seed: int) -> None:
    """Seed torch's generators: initial weights, and dropout where a model has any."""
    import torch

    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of torch, NumPy and Python for one optimiser step (0-based) of one process."""
    import torch

    bits = int(random_bits(step, 1, seed=seed, purpose=Purpose.STEP, view=rank)[0, 0])
    torch.manual_seed(bits >> 1)  # it takes 63 bits
    _seed_others(bits)


@contextmanager
def own_generators() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch (CPU) back at the end of the block."""
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@contextmanager
def sample_generators(seed: int, epoch: int, sample_id: int) -> Iterator[None]:
    """Inside the block the generators of torch, NumPy and Python belong to one sample; afterwards they go on as before.

    So a library's augmentation of it is the same in every process and after every interruption.
    """
    import torch

    with own_generators():
        bits = int(random_bits(sample_id, 1, seed=seed, purpose=Purpose.AUGMENT, epoch=epoch)[0, 0])
        torch.default_generator.manual_seed(bits >> 1)  # the CPU's alone: stochastic depth may draw on a GPU
        _seed_others(bits)
        yield


def _seed_others(bits: int) -> None:
    np.random.seed(bits & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(bits)
