"""A vision transformer with a head that gives a class to each pixel, for images of any size.

    images -> patches -> encoder blocks -> feature maps of one or four blocks -> head -> scores, resized to the image

The encoder is timm's, key names included. Its positions are resized to the grid of each image (bicubic with
antialiasing, timm's), so crops, whole images and windows of any size go through the same weights.

Shapes: B images, C channels, H x W pixels, K classes, T prefix tokens (class, registers), D width, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.config import UserError
from maekit.config.segmentation import HeadConfig
from maekit.models.dense_heads import AUXILIARY_LEVEL, AuxiliaryHead, LightFPN, LinearHead, UperNet, resized
from maekit.models.encoder import run_block
from maekit.models.inputs import normalized

KEPT_GRIDS = 16
"""Grids whose resized positions are kept; images of many sizes would fill the memory."""


class Scores(NamedTuple):
    """Class scores [B, K, H, W], and those of the auxiliary head (None in evaluation, or where there is none)."""

    main: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """An encoder and a head; `linear` leaves the encoder frozen and in evaluation mode.

    Images are [B, C, H, W], H and W multiples of the patch: uint8 pixels, which are normalised here, or floats that are
    normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        head: HeadConfig,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        any_encoder: Any = encoder
        self.encoder = encoder
        self.head_config, self.num_classes = head, num_classes
        self.patch_size: int = any_encoder.patch_embed.patch_size[0]
        self.frozen = head.kind == "linear"
        depth, dim = len(any_encoder.blocks), any_encoder.embed_dim
        self.block_ids = chosen_blocks(head, depth)
        """0-based, ascending."""
        self.head: nn.Module
        if head.kind == "linear":
            self.head = LinearHead(dim, num_classes)
        elif head.kind == "upernet":
            self.head = UperNet(dim, num_classes, head.width, head.fuse_kernel)
        else:
            self.head = LightFPN(dim, num_classes, head.width)
        self.auxiliary = AuxiliaryHead(dim, num_classes, head.width) if head.auxiliary else None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._resized: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        if self.frozen:
            encoder.requires_grad_(False)
        else:  # blocks that no map needs are not run, and must not wait for gradients
            any_encoder.blocks[self.block_ids[-1] + 1 :].requires_grad_(False)
            any_encoder.norm.requires_grad_(self.block_ids[-1] == depth - 1)
        # Feature maps come with channels last, since tokens do; convolutions that follow it spare every conversion.
        self.head.to(memory_format=torch.channels_last)
        if self.auxiliary is not None:
            self.auxiliary.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Segmenter:
        """Training mode for all but a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Pixels, uint8 in 0..255 or floats in 0..1, brought to the mean 0 and deviation 1 that the encoder expects."""
        return normalized(images_BCHW, self.mean, self.std)

    def forward(self, images_BCHW: Tensor) -> Scores:
        """Scores for each pixel.

        Raises:
            UserError: a side that is no multiple of the patch.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.feature_maps(images_BCHW)
        size = images_BCHW.shape[2:]
        main = resized(self.head(maps), size)
        if self.auxiliary is None or not self.training:
            return Scores(main, None)
        return Scores(main, resized(self.auxiliary(maps[AUXILIARY_LEVEL]), size))

    def feature_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """The outputs [B, D, h, w] of the head's blocks; the encoder's last norm belongs to its last block."""
        tokens, (rows, columns) = self._embed(images_BCHW)
        encoder: Any = self.encoder
        maps: dict[int, Tensor] = {}
        for index in range(self.block_ids[-1] + 1):
            tokens = run_block(encoder.blocks[index], tokens, checkpointed=encoder.grad_checkpointing)
            if index in self.block_ids:
                out = encoder.norm(tokens) if index == len(encoder.blocks) - 1 else tokens
                out_BhwD = out[:, encoder.num_prefix_tokens :].reshape(len(out), rows, columns, -1)
                maps[index] = out_BhwD.permute(0, 3, 1, 2)  # strides of channels_last: nothing is copied
        return [maps[index] for index in self.block_ids]  # a short encoder's blocks may stand for two levels

    def _embed(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, [B, T + h*w, D], and the grid."""
        encoder: Any = self.encoder
        patch = self.patch_size
        _, _, height, width = images_BCHW.shape
        if height % patch or width % patch:
            raise UserError(f"images of {height} x {width} px: both sides must be multiples of the patch of {patch} px")
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = self.normalize(images_BCHW)
        grid = (height // patch, width // patch)
        tokens = encoder.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2)
        tokens = encoder.patch_embed.norm(tokens)
        table = self.positions(grid)
        prefix = [token.expand(len(tokens), -1, -1) for token in (encoder.cls_token, encoder.reg_token)
                  if token is not None]  # fmt: skip
        own = table.shape[1] - math.prod(grid)  # prefix tokens that have positions of their own
        if own:
            tokens = torch.cat([*(token.to(tokens.dtype) for token in prefix), tokens], dim=1) + table
        else:
            tokens = torch.cat([*(token.to(tokens.dtype) for token in prefix), tokens + table], dim=1)
        return encoder.norm_pre(tokens), grid

    def positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """The position table [1, T + h*w, D] at a grid; fixed tables are resized once for each grid."""
        encoder: Any = self.encoder
        table: Tensor = encoder.pos_embed
        own_grid: tuple[int, int] = tuple(encoder.patch_embed.grid_size)
        if grid_hw == own_grid:
            return table
        mark = (table._version, table.device, table.dtype)
        if not table.requires_grad and grid_hw in self._resized and self._resized[grid_hw][0] == mark:
            return self._resized[grid_hw][1]
        num_prefix = table.shape[1] - math.prod(own_grid)
        made: Tensor = resample_abs_pos_embed(table, list(grid_hw), list(own_grid), num_prefix_tokens=num_prefix)
        if not table.requires_grad:
            if len(self._resized) == KEPT_GRIDS:
                self._resized.clear()
            self._resized[grid_hw] = (mark, made)
        return made

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass computes the encoder's blocks again, to save memory; numbers stay the same."""
        self.encoder.set_grad_checkpointing(enable)


def chosen_blocks(head: HeadConfig, depth: int) -> tuple[int, ...]:
    """The 0-based blocks whose outputs the head reads, ascending.

    Four for UperNet: at 4/12, 6/12, 8/12 and 12/12 of the depth unless they are named (BEiT, MAE: 3, 5, 7, 11 of 12 and
    7, 11, 15, 23 of 24, from 0); the last one for the others.

    Raises:
        UserError: another number of blocks than the head reads, or blocks that are not there.
    """
    levels = 4 if head.kind == "upernet" else 1
    if head.blocks is None:
        if levels == 1:
            return (depth - 1,)
        return tuple(max(1, round(depth * share / 12)) - 1 for share in (4, 6, 8, 12))
    given = " ".join(map(str, head.blocks))
    if len(head.blocks) != levels:
        raise UserError(f"--blocks {given}: --head {head.kind} reads {levels} block{'s' if levels > 1 else ''}")
    if list(head.blocks) != sorted(head.blocks) or not all(1 <= block <= depth for block in head.blocks):
        raise UserError(f"--blocks {given}: give ascending numbers from 1 to {depth}, the blocks of this encoder")
    return tuple(block - 1 for block in head.blocks)


def pixel_loss(
    scores: Scores,
    labels_BHW: Tensor,
    void: int,
    weights_K: Tensor | None,
    denominator: Tensor,
    auxiliary_weight: float,
) -> Tensor:
    """Cross entropy summed over the pixels that are not void, over a denominator: a float32 scalar.

    labels_BHW: int64 classes or `void`. denominator: what the sum is divided by, `loss_denominator` of the whole batch
    of a step, over all processes and accumulation parts. A batch that is void throughout loses 0.
    """

    def part(logits_BKHW: Tensor) -> Tensor:
        return F.cross_entropy(logits_BKHW.float(), labels_BHW, weights_K, ignore_index=void, reduction="sum")

    with torch.autocast(labels_BHW.device.type, enabled=False):
        loss = part(scores.main)
        if scores.auxiliary is not None:
            loss = loss + auxiliary_weight * part(scores.auxiliary)
        return loss / torch.where(denominator > 0, denominator, 1.0)


def loss_denominator(labels_BHW: Tensor, void: int, weights_K: Tensor | None) -> Tensor:
    """The number of pixels that are not void, each counted by the weight of its class; a float32 scalar."""
    known = labels_BHW != void
    if weights_K is None:
        return known.sum().float()
    return torch.where(known, weights_K[labels_BHW.clamp_min(0)], 0.0).sum()
