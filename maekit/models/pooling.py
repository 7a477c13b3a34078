"""Averages of a map over a grid of any number of cells, on devices whose own pooling knows some of them only.

Shapes: B images, D channels, h x w a grid, s x t cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_cells(map_BDhw: Tensor, cells_st: tuple[int, int]) -> Tensor:
    """The map's averages over so many cells, [B, D, s, t]: torch's adaptive average pooling.

    On MPS by products: torch refuses there what does not divide (pytorch issue 96056), such as 48 px by 32 cells.
    """
    if map_BDhw.device.type == "mps":
        return average_by_products(map_BDhw, cells_st)
    return F.adaptive_avg_pool2d(map_BDhw, cells_st)


def average_by_products(map_BDhw: Tensor, cells_st: tuple[int, int]) -> Tensor:
    """The same as two products with small matrices, which every device has."""
    rows_sh, columns_tw = (
        _shares(length, cells).to(map_BDhw) for length, cells in zip(map_BDhw.shape[2:], cells_st, strict=True)
    )
    averages: Tensor = rows_sh @ map_BDhw @ columns_tw.T
    return averages


def _shares(length: int, cells: int) -> Tensor:
    """[cells, length]: cell i is the mean of the places from i * length // cells up to the next one's, rounded up."""
    place, cell = torch.arange(length), torch.arange(cells)[:, None]
    begin, end = cell * length // cells, -(-(cell + 1) * length // cells)
    inside = (place >= begin) & (place < end)
    return inside / (end - begin)
