"""How good a segmentation is: one confusion matrix over a whole split, and what is read from it.

Pixels are counted at the annotations' own resolution, over the split and not image by image, so an image with few
pixels of a class cannot outweigh another with many. Void pixels count nowhere.

Shapes: K classes; the matrix [K, K] has the truth in its rows and the prediction in its columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from maekit.terminal import make_table


class Confusion:
    """A confusion matrix that grows image by image, int64 on the device."""

    def __init__(self, num_classes: int, void: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.void = num_classes, void
        self.matrix_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of equally shaped class maps; a prediction is a class everywhere, the truth may be void."""
        assert predicted.shape == truth.shape, (predicted.shape, truth.shape)
        # Void goes to a cell of its own behind the matrix, as selecting pixels would wait for the device once more.
        cells = truth.long() * self.num_classes + predicted.long()
        cells = torch.where(truth == self.void, self.num_classes**2, cells)
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2 + 1)
        self.matrix_KK += counts[:-1].view(self.num_classes, self.num_classes)


@dataclass(frozen=True)
class SegmentationScore:
    """What a confusion matrix says; shares are in 0..1, and NaN where there is nothing to divide by."""

    miou: float
    """Mean IoU over the classes that are in the truth or in the prediction (or both)."""
    mean_accuracy: float
    """Mean over the classes in the truth of the share of their pixels that was found."""
    pixel_accuracy: float
    """Share of all pixels that was found."""
    iou_K: tuple[float, ...]
    """Intersection over union of each class; NaN: neither in the truth nor in the prediction, and left out of the
    mean. A class that is only predicted has 0 and counts."""
    accuracy_K: tuple[float, ...]
    """Share of each class's pixels that was found; NaN: not in the truth."""
    share_K: tuple[float, ...]
    """Share of the truth's pixels."""
    pixels: int
    """Pixels that are not void."""

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """As JSON values: NaN becomes null, and what belongs to a class stands under its name."""

        def number(value: float) -> float | None:
            return None if math.isnan(value) else value

        by_class = zip(names, self.iou_K, self.accuracy_K, self.share_K, strict=True)
        return {
            "miou": number(self.miou), "mean_accuracy": number(self.mean_accuracy),
            "pixel_accuracy": number(self.pixel_accuracy), "pixels": self.pixels,
            "classes": {
                name: {"iou": number(iou), "accuracy": number(accuracy), "share": number(share)}
                for name, iou, accuracy, share in by_class
            },
        }  # fmt: skip


def score(matrix_KK: npt.NDArray[np.int64] | Tensor) -> SegmentationScore:
    """IoU (Jaccard index), accuracies and their means from a confusion matrix."""
    matrix = (matrix_KK.cpu().numpy() if isinstance(matrix_KK, Tensor) else np.asarray(matrix_KK)).astype(np.float64)
    hit_K, true_K, predicted_K = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    total = float(matrix.sum())
    iou_K = _divide(hit_K, true_K + predicted_K - hit_K)
    accuracy_K = _divide(hit_K, true_K)
    return SegmentationScore(
        miou=_mean(iou_K),
        mean_accuracy=_mean(accuracy_K),
        pixel_accuracy=float(hit_K.sum()) / total if total else math.nan,
        iou_K=tuple(map(float, iou_K)),
        accuracy_K=tuple(map(float, accuracy_K)),
        share_K=tuple(map(float, true_K / total if total else np.full_like(true_K, math.nan))),
        pixels=int(total),
    )


def _divide(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.divide(above, below, out=np.full_like(above, math.nan), where=below > 0)


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def score_table(result: SegmentationScore, names: Sequence[str], title: str) -> Table:
    """One row for each class, then the means; a dash where there is nothing to divide by."""

    def percent(value: float) -> str:
        return "-" if math.isnan(value) else f"{100 * value:.2f}"

    rows = [
        (escape(name), percent(iou), percent(accuracy), percent(share))
        for name, iou, accuracy, share in zip(names, result.iou_K, result.accuracy_K, result.share_K, strict=True)
    ]
    rows.append(("mean", percent(result.miou), percent(result.mean_accuracy), ""))
    rows.append(("all pixels", "", percent(result.pixel_accuracy), ""))
    return make_table(escape(title), ("class", "IoU %", "accuracy %", "pixels %"), rows)
