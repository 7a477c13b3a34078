"""Heads that turn feature maps of a vision transformer into class scores for each pixel: UperNet, a light FPN, linear.

A head is given the maps [B, D, h, w] of one or four blocks, all on the patch grid, and gives scores [B, K, h', w'] on
the grid of its finest level; the segmenter resizes them to the image.

Batch norm follows the convolutions, as in the papers. The one place where it cannot work is the pyramid's pooling to a
single cell: with one image on a device there is one value a channel, and no variance. That branch has a layer norm
(`GroupNorm(1, width)`), which needs no batch, whatever the batch size.

Shapes: B images, K classes, D width of the encoder, W width of the head, h x w a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maekit.models.pooling import average_cells

BINS = (1, 2, 3, 6)
"""Cells a side of the pooling pyramid (PSPNet, arXiv 1612.01105; UperNet, arXiv 1807.10221)."""
DROPOUT = 0.1
"""Whole channels dropped before the classifier."""
AUXILIARY_WIDTH = 256
"""Width of the auxiliary head, at most: the usual one."""
AUXILIARY_LEVEL = 2
"""The auxiliary head reads the third level: stride of one patch."""


def conv_norm(width_in: int, width_out: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the grid, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def resized(map_BDhw: Tensor, size_hw: Sequence[int]) -> Tensor:
    """A map brought to another grid, bilinearly; corners are not aligned."""
    if tuple(map_BDhw.shape[2:]) == tuple(size_hw):
        return map_BDhw
    return F.interpolate(map_BDhw, size=tuple(size_hw), mode="bilinear", align_corners=False)


def init_head(module: nn.Module) -> None:
    """He's initialisation before a ReLU (arXiv 1502.01852)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Classifier(nn.Sequential):
    """Dropout of whole channels, then a linear layer at each place; it starts near zero, so all classes start alike."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(nn.Dropout2d(DROPOUT), nn.Conv2d(width, num_classes, 1))
        convolution = self[1]
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        nn.init.normal_(convolution.weight, std=0.01)
        nn.init.zeros_(convolution.bias)


class PyramidPooling(nn.Module):
    """The map beside its averages over 1, 2, 3 and 6 cells a side, each behind a 1 x 1 convolution; then one 3 x 3."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_norm(width_in, width, 1) for _ in BINS)
        single = self.branches[BINS.index(1)]
        assert isinstance(single, nn.Sequential)
        single[1] = nn.GroupNorm(1, width)
        self.bottleneck = conv_norm(width_in + len(BINS) * width, width, 3)

    def forward(self, map_BDhw: Tensor) -> Tensor:
        """[B, W, h, w] from [B, D, h, w]."""
        size = map_BDhw.shape[2:]
        pooled = [
            resized(branch(average_cells(map_BDhw, (bins, bins))), size)
            for bins, branch in zip(BINS, self.branches, strict=True)
        ]
        mixed: Tensor = self.bottleneck(torch.cat([map_BDhw, *pooled], dim=1))
        return mixed


class FeaturePyramid(nn.Module):
    """Four maps of one grid brought to 4, 2, 1 and 1/2 times that grid: what a plain transformer does not have.

    4 x and 2 x by transposed convolutions of stride 2 (norm and GELU between two of them), 1/2 by a maximum over 2 x 2;
    the last row and column of an odd grid count too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.four = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )  # fmt: skip
        self.two = nn.ConvTranspose2d(width, width, 2, 2)
        self.down = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The four levels, finest first."""
        first, second, third, fourth = maps
        return [self.four(first), self.two(second), third, self.down(fourth)]


class UperNet(nn.Module):
    """UperNet (arXiv 1807.10221) on four blocks of a vision transformer, as in the MAE paper's transfer to ADE20K.

    Pyramid pooling on the coarsest level, a top-down feature pyramid, all levels resized to the finest one and fused.
    Cost at width W on a finest grid of n places: about 50 n W^2 multiply-adds, 36 of them the fusing convolution's.
    With a kernel of 1 these are 1.3: it commutes with the resizing, so each level is mixed on its own grid.
    """

    def __init__(self, embed_dim: int, num_classes: int, width: int, fuse_kernel: int = 3) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(embed_dim)
        self.laterals = nn.ModuleList(conv_norm(embed_dim, width, 1) for _ in range(3))
        self.pooling = PyramidPooling(embed_dim, width)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in range(3))
        self.fuse = conv_norm(4 * width, width, fuse_kernel)
        self.apply(init_head)
        self.classifier = Classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores [B, K, 4h, 4w] from four maps [B, D, h, w]."""
        levels = self.pyramid(maps)
        merged = [lateral(level) for lateral, level in zip(self.laterals, levels[:3], strict=True)]
        merged.append(self.pooling(levels[3]))
        for index in (2, 1, 0):
            merged[index] = merged[index] + resized(merged[index + 1], merged[index].shape[2:])
        for index, smooth in enumerate(self.smooth):
            merged[index] = smooth(merged[index])
        scores: Tensor = self.classifier(self._fused(merged))
        return scores

    def _fused(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, W, 4h, 4w] from the levels [B, W, ...], finest first."""
        finest = levels[0].shape[2:]
        convolution: Any = self.fuse[0]
        if convolution.kernel_size != (1, 1):
            fused: Tensor = self.fuse(torch.cat([resized(level, finest) for level in levels], dim=1))
            return fused
        weights = convolution.weight.chunk(len(levels), dim=1)
        mixed = F.conv2d(levels[0], weights[0])
        for level, weight in zip(levels[1:], weights[1:], strict=True):
            mixed = mixed + resized(F.conv2d(level, weight), finest)
        result: Tensor = self.fuse[2](self.fuse[1](mixed))
        return result


class LightFPN(nn.Module):
    """A small feature pyramid on the last block alone (the simple pyramid of ViTDet, arXiv 2203.16527).

    4 x and 2 x the grid by transposed convolutions that halve the width each time; sums from coarse to fine, and one
    3 x 3 convolution on the finest level: about a fifth of UperNet's cost at the same width.
    """

    def __init__(self, embed_dim: int, num_classes: int, width: int) -> None:
        super().__init__()
        half, quarter = max(1, embed_dim // 2), max(1, embed_dim // 4)
        self.four = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, half, 2, 2), nn.BatchNorm2d(half), nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )  # fmt: skip
        self.two = nn.ConvTranspose2d(embed_dim, half, 2, 2)
        self.down = nn.MaxPool2d(2, ceil_mode=True)
        self.laterals = nn.ModuleList(conv_norm(dim, width, 1) for dim in (quarter, half, embed_dim, embed_dim))
        self.smooth = conv_norm(width, width, 3)
        self.apply(init_head)
        self.classifier = Classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores [B, K, 4h, 4w] from one map [B, D, h, w]."""
        (last,) = maps
        levels = [self.four(last), self.two(last), last, self.down(last)]
        top = None
        for lateral, level in zip(reversed(self.laterals), reversed(levels), strict=True):
            side = lateral(level)
            top = side if top is None else side + resized(top, side.shape[2:])
        scores: Tensor = self.classifier(self.smooth(top))
        return scores


class LinearHead(nn.Module):
    """Batch norm without parameters, then a linear layer at each patch: how good are frozen features, densely?"""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(embed_dim, affine=False)
        self.classifier = nn.Conv2d(embed_dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores [B, K, h, w] from one map [B, D, h, w]."""
        (last,) = maps
        scores: Tensor = self.classifier(self.norm(last))
        return scores


class AuxiliaryHead(nn.Sequential):
    """A small fully convolutional head whose loss reaches the middle of the encoder directly; in training only."""

    def __init__(self, embed_dim: int, num_classes: int, width: int) -> None:
        narrow = min(width, AUXILIARY_WIDTH)
        super().__init__(conv_norm(embed_dim, narrow, 3))
        self.apply(init_head)
        self.append(Classifier(narrow, num_classes))
