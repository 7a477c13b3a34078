"""Helpers that several test files share: the smallest model that can go wrong, and where the shared data lie."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from maekit.config import ModelConfig
from maekit.data.workers import start_context

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Data sets and notes beside the checkout; a fresh clone has none."""

NEEDS_FORK = pytest.mark.skipif(
    start_context().get_start_method() != "fork",
    reason="what the test puts in place reaches workers only where they are forked, which they are not on macOS",
)

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "img_size": (16, 24),  # not square: a grid of 4 x 6, so that rows and columns cannot be confused
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_a_backward_pass_first() -> None:
    """For the runs of module fixtures, which come before the fixture of a test.

    And a first backward pass: after anything was compiled or exported, torch would count a GPU that is not there when
    it first looks for devices to go back on, and refuse backward passes in every process that is forked from then on.
    """
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors on one thread: quicker, and the same sums whatever the machine."""
    torch.set_num_threads(1)


def tiny_config(**changes: Any) -> ModelConfig:
    """A model that trains in milliseconds, with any field changed."""
    return ModelConfig(**{**TINY, **changes})


def shared_data(name: str) -> Path:
    """The path of something under the shared data; without it the test is skipped."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"needs shared/data/{name} beside the checkout, which is not there")
    return path


def sincos_loops(dim: int, grid_hw: tuple[int, int]) -> list[list[float]]:
    """2-D sine-cosine positions, one row a patch in row-major order, one number at a time in float64.

    Layout of the released weights: sines, then cosines of the column, then the same of the row.
    """
    quarter = dim // 4
    table = []
    for row in range(grid_hw[0]):
        for column in range(grid_hw[1]):
            line = []
            for place in (column, row):
                line += [math.sin(place / 10000 ** (k / quarter)) for k in range(quarter)]
                line += [math.cos(place / 10000 ** (k / quarter)) for k in range(quarter)]
            table.append(line)
    return table
