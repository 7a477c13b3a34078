"""Which patches the encoder sees. Masks are made on the CPU from each sample's own key, so every device sees the same.

Shapes: B batch, N patches, V visible, M hidden (V + M = N).
Polarity: `ids_keep` are visible to the encoder, `ids_masked` are hidden, `masked` is True where hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import UserError
from maekit.rng import Purpose, UInt64s, random_bits, uniforms
from maekit.runtime import to_device

MASK_KINDS = ("random", "block", "grid")


@dataclass(frozen=True)
class Masks:
    """One mask a sample: ids_keep_BV and ids_masked_BM, int64 patch numbers in row-major order of the grid.

    Where only a part of the hidden patches is predicted, ids_masked_BM is that part (`choose_predicted`); masked_BN is
    of whole masks.
    """

    ids_keep_BV: Tensor
    ids_masked_BM: Tensor

    @property
    def masked_BN(self) -> Tensor:
        """True where a patch is hidden from the encoder."""
        num_patches = self.ids_keep_BV.shape[1] + self.ids_masked_BM.shape[1]
        masked = torch.zeros(len(self.ids_keep_BV), num_patches, dtype=torch.bool, device=self.ids_keep_BV.device)
        return masked.scatter(1, self.ids_masked_BM, True)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on a device, without waiting for the copy: CUDA needs pinned memory for that."""
        device = torch.device(device)
        pin = device.type == "cuda" and self.ids_keep_BV.device.type == "cpu"
        both = (self.ids_keep_BV, self.ids_masked_BM)
        return Masks(*(to_device(ids.pin_memory() if pin else ids, device) for ids in both))


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches: max(1, int(N x (1 - ratio))), but at least one patch stays hidden.

    The truncation is the paper's code's: 196 patches at 0.75 leave 49, 64 at 0.9 leave 6.
    """
    return min(max(1, int(num_patches * (1 - mask_ratio))), num_patches - 1)


def num_predicted(num_patches: int, num_hidden: int, predict_share: float | None) -> int:
    """Predicted patches: max(1, int(N x share)), but no more than are hidden; all of those without a share."""
    return num_hidden if predict_share is None else min(max(1, int(num_patches * predict_share)), num_hidden)


def make_masks(
    kind: str,
    grid_hw: tuple[int, int],
    mask_ratio: float,
    sample_ids: npt.ArrayLike,
    *,
    seed: int,
    epoch: int = 0,
    view: int = 0,
    purpose: Purpose = Purpose.MASK,
) -> Masks:
    """Masks of B samples, each a function of (seed, epoch, its id, purpose, view) alone.

    random: a uniform choice without replacement (the paper, section 3).
    block:  rectangles of 1/12 to 1/3 of the grid with aspect 0.3 to 3.3 are hidden until enough patches are
            (after BEiT, arXiv 2106.08254, as in the paper's figure 6); the last one is trimmed.
    grid:   a regular grid with a random offset stays visible (figure 6); at 0.75, one patch in every 2 x 2.
            Where the ratio does not fit a regular grid, patches are added or dropped at random.

    Raises:
        UserError: an unknown kind, or a grid of fewer than two patches.
    """
    num_patches = grid_hw[0] * grid_hw[1]
    if num_patches < 2:
        raise UserError(f"a grid of {grid_hw[0]} x {grid_hw[1]} patches cannot be masked: lower --patch-size")
    visible = num_visible(num_patches, mask_ratio)
    ids = np.atleast_1d(np.asarray(sample_ids, dtype=np.int64))
    # One 64-bit key a patch; the patches with the smallest keys stay visible.
    keys_BN = random_bits(ids, num_patches, seed=seed, purpose=purpose, epoch=epoch, view=view)
    if kind == "block":
        boxes = uniforms(ids, 4 * _MAX_BLOCKS, seed=seed, purpose=purpose, epoch=epoch, view=view + _BOX_STREAM)
        keys_BN = _block_keys(keys_BN, boxes, grid_hw)
    elif kind == "grid":
        keys_BN = _grid_keys(keys_BN, grid_hw, visible)
    elif kind != "random":
        raise UserError(f"--mask {kind}: choose {', '.join(MASK_KINDS)}")
    order_BN = _argsort_unique(keys_BN)
    return Masks(torch.from_numpy(order_BN[:, :visible].copy()), torch.from_numpy(order_BN[:, visible:].copy()))


def choose_predicted(
    masks: Masks, count: int, sample_ids: npt.ArrayLike, *, seed: int, epoch: int = 0, view: int = 0
) -> Masks:
    """The same masks with `count` of each sample's hidden patches left to predict, a uniform choice.

    It is a function of (seed, epoch, the sample's id, view) and of the mask alone.
    """
    hidden_BM = masks.ids_masked_BM.numpy()
    ids = np.atleast_1d(np.asarray(sample_ids, dtype=np.int64))
    num_patches = masks.ids_keep_BV.shape[1] + hidden_BM.shape[1]
    # One key a patch, drawn by its number: the choice does not depend on the order in which a mask lists its patches.
    keys_BN = random_bits(ids, num_patches, seed=seed, purpose=Purpose.PREDICT, epoch=epoch, view=view)
    chosen_BM = _argsort_unique(np.take_along_axis(keys_BN, hidden_BM, axis=1))[:, :count]
    return Masks(masks.ids_keep_BV, torch.from_numpy(np.take_along_axis(hidden_BM, chosen_BM, axis=1)))


_MAX_BLOCKS = 48
_BOX_STREAM = 1 << 32  # a view number that no caller uses: boxes and tie-breaks never share a stream


def _argsort_unique(keys_BN: UInt64s) -> npt.NDArray[np.int64]:
    """The order of the keys, ties broken by index: the index takes the low bits, so that sorting values suffices."""
    num = keys_BN.shape[1]
    low = np.uint64((1 << max(1, (num - 1).bit_length())) - 1)
    tagged = (keys_BN & ~low) | np.arange(num, dtype=np.uint64)
    tagged.sort(axis=1)
    return (tagged & low).astype(np.int64)


def _ranked(rank_BN: npt.NDArray[np.integer], keys_BN: UInt64s) -> UInt64s:
    """Keys ordered by rank (0..255) first, then by the random key."""
    return (rank_BN.astype(np.uint64) << np.uint64(56)) | (keys_BN >> np.uint64(8))


def _block_keys(keys_BN: UInt64s, boxes_BX: npt.NDArray[np.float64], grid_hw: tuple[int, int]) -> UInt64s:
    """Keys under which patches covered by the first rectangles come last, that is, are hidden first."""
    height, width = grid_hw
    num = height * width
    u_BK4 = boxes_BX.reshape(len(keys_BN), _MAX_BLOCKS, 4)
    area_BK = num * (1 / 12 + (1 / 3 - 1 / 12) * u_BK4[..., 0])
    aspect_BK = np.exp(math.log(0.3) * (1 - 2 * u_BK4[..., 1]))
    tall_BK = np.clip(np.rint(np.sqrt(area_BK * aspect_BK)), 1, height).astype(np.int64)
    wide_BK = np.clip(np.rint(np.sqrt(area_BK / aspect_BK)), 1, width).astype(np.int64)
    top_BK = np.floor(u_BK4[..., 2] * (height - tall_BK + 1)).astype(np.int64)
    left_BK = np.floor(u_BK4[..., 3] * (width - wide_BK + 1)).astype(np.int64)
    row_N, column_N = np.divmod(np.arange(num), width)
    first_BN = np.full(keys_BN.shape, _MAX_BLOCKS, np.int64)  # the first rectangle that covers a patch
    for k in reversed(range(_MAX_BLOCKS)):
        rows = (row_N >= top_BK[:, k, None]) & (row_N < (top_BK + tall_BK)[:, k, None])
        columns = (column_N >= left_BK[:, k, None]) & (column_N < (left_BK + wide_BK)[:, k, None])
        first_BN[rows & columns] = k
    # The key within one rectangle is the patch number, so that trimming leaves a compact remainder.
    ordered = np.where(first_BN < _MAX_BLOCKS, np.arange(num, dtype=np.uint64) << np.uint64(48), keys_BN)
    return _ranked(_MAX_BLOCKS - first_BN, ordered)


def _grid_keys(keys_BN: UInt64s, grid_hw: tuple[int, int], visible: int) -> UInt64s:
    """Keys under which the patches of a regular grid come first, that is, stay visible."""
    num = grid_hw[0] * grid_hw[1]
    stride = max(2, round(math.sqrt(num / visible)))
    row_N, column_N = np.divmod(np.arange(num), grid_hw[1])
    offset_B2 = (keys_BN[:, :2] % np.uint64(stride)).astype(np.int64)
    on_grid_BN = (row_N % stride == offset_B2[:, :1]) & (column_N % stride == offset_B2[:, 1:])
    return _ranked(~on_grid_BN, keys_BN)


def masks_from_bool(masked_BN: Tensor) -> Masks:
    """Masks given by the user: True = hidden from the encoder.

    Raises:
        UserError: not boolean [B, N], unequal counts in the batch, or nothing visible or nothing hidden.
    """
    if masked_BN.dtype != torch.bool or masked_BN.ndim != 2:
        raise UserError(f"masks must be boolean [batch, patches], not {masked_BN.dtype} {list(masked_BN.shape)}")
    counts = masked_BN.sum(dim=1)
    if len(counts) and int(counts.min()) != int(counts.max()):
        raise UserError(
            f"the masks of one batch hide {int(counts.min())} to {int(counts.max())} patches: every sample of a batch "
            "must hide the same number"
        )
    hidden = int(counts[0]) if len(counts) else 0
    if not 0 < hidden < masked_BN.shape[1]:
        raise UserError(f"a mask hides {hidden} of {masked_BN.shape[1]} patches: at least one visible and one hidden")
    order = masked_BN.to(torch.uint8).argsort(dim=1, stable=True)  # False (visible) sorts first
    return Masks(order[:, : masked_BN.shape[1] - hidden], order[:, masked_BN.shape[1] - hidden :])


def masks_from_keep(ids_keep_BV: Tensor, num_patches: int) -> Masks:
    """Masks given by the visible patches alone, which keep their order; the hidden ones are in ascending order.

    Raises:
        UserError: ids out of range or repeated within a sample, or nothing visible or nothing hidden.
    """
    if ids_keep_BV.ndim != 2 or ids_keep_BV.is_floating_point():
        raise UserError(f"ids_keep must be integers [batch, visible], not {list(ids_keep_BV.shape)}")
    ids_keep_BV = ids_keep_BV.long()
    if ids_keep_BV.numel() and not 0 <= int(ids_keep_BV.min()) <= int(ids_keep_BV.max()) < num_patches:
        raise UserError(f"ids_keep must lie between 0 and {num_patches - 1}")
    masked_BN = torch.ones(len(ids_keep_BV), num_patches, dtype=torch.bool, device=ids_keep_BV.device)
    masks = masks_from_bool(masked_BN.scatter(1, ids_keep_BV, False))
    if masks.ids_keep_BV.shape != ids_keep_BV.shape:
        raise UserError("ids_keep names a patch twice")
    return Masks(ids_keep_BV, masks.ids_masked_BM)
