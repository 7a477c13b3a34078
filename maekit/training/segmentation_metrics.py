"""How good a segmentation is: one confusion matrix over a whole split, and what is read from it.

Pixels are counted at the annotations' own resolution, over the split and not image by image, so an image with few
pixels of a class cannot outweigh another with many. Void pixels count nowhere.

Shapes: K classes; the matrix [K, K] has the truth in its rows and the prediction in its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Confusion:
    """A confusion matrix that grows image by image, int64 on the device; nothing waits for the device."""

    def __init__(self, num_classes: int, void: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.void = num_classes, void
        self.matrix_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of equally shaped class maps; a prediction is a class everywhere, the truth may be void."""
        assert predicted.shape == truth.shape, (predicted.shape, truth.shape)
        # Void goes to a cell of its own behind the matrix, as selecting pixels would wait for the device.
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
