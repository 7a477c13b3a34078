"""Averages over cells: what is computed where torch's own pooling has gaps is what it gives elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maekit.models import pooling


@pytest.mark.parametrize(
    ("size", "cells"), [((48, 40), (32, 32)), ((14, 14), (6, 6)), ((5, 7), (3, 2)), ((4, 4), (6, 6)), ((9, 9), (1, 1))]
)
def test_products_are_adaptive_pooling(size: tuple[int, int], cells: tuple[int, int]) -> None:
    """Windows that overlap where sizes do not divide, and cells that are more than places."""
    values = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pooling.average_by_products(values, cells), F.adaptive_avg_pool2d(values, cells))
    torch.testing.assert_close(pooling.average_cells(values, cells), F.adaptive_avg_pool2d(values, cells))


def test_mps_never_sees_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises there for sizes that do not divide."""
    asked: list[Any] = []
    monkeypatch.setattr(pooling, "average_by_products", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda *_: pytest.fail("torch's own"))
    apple: Any = SimpleNamespace(device=torch.device("mps"))
    pooling.average_cells(apple, (32, 32))
    assert asked == [(apple, (32, 32))]
