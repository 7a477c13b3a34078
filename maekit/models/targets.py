"""What the decoder predicts, its inverse for drawing, and the trivial predictors that a loss is measured against.

Shapes: B batch, C channels, H x W pixels, N patches of P = ph x pw x C values, V visible, M hidden, G = gh x gw grid.
A patch is flattened (row, column, channel), as in the paper's weights.

The spectral targets change the frequencies of a normalised patch by a fixed matrix [P, P], the same for every data set:
the basis is the discrete cosine transform, which is close to the principal components of natural patches, so that
nothing need be measured, stored or trusted. Cutting the lowest frequencies leaves out the components of the highest
variance (arXiv 2402.11337 finds that these tell little about what is seen).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
"""Added to a patch's variance before its root, as in the paper's code."""


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """Images [B, C, H, W] as patches [B, N, P], row-major over the grid, each flattened (row, column, channel)."""
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches_BNP: Tensor, patch: int, grid_hw: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, P] to [B, C, H, W]."""
    batch, _, size = patches_BNP.shape
    height, width = grid_hw
    channels = size // (patch * patch)
    grid = patches_BNP.reshape(batch, height, width, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height * patch, width * patch)


def take_patches(patches_BNP: Tensor, ids_BK: Tensor) -> Tensor:
    """The patches with the given numbers, [B, K, P]; one flat gather, without an index expanded over P."""
    batch, num, size = patches_BNP.shape
    flat_ids = (ids_BK + torch.arange(0, batch * num, num, device=ids_BK.device).unsqueeze(1)).reshape(-1)
    return patches_BNP.reshape(batch * num, size).index_select(0, flat_ids).reshape(batch, -1, size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over all its values, [..., 1]: unbiased variance plus 1e-6, as in the paper."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + NORM_EPS).sqrt()


@functools.cache
def target_spectrum(kind: str, patch: int, channels: int, cut: int) -> Tensor | None:
    """The matrix [P, P] that a spectral target applies to a normalised patch, float32; None for the other targets.

    In the orthonormal discrete cosine transform (DCT-II) of each channel's p x p values, frequency (u, v) is multiplied
    highpass: by 0 where u + v < cut, else by 1, a projection;
    whitened: by sqrt(u^2 + v^2): natural images have power 1 / f^2 (Field 1987, doi 10.1364/JOSAA.4.002379), so that
        every frequency then counts about alike; the mean of each channel is left out.
    The matrix is symmetric.
    """
    if kind in ("pixels", "norm-pixels"):
        return None
    place = np.arange(patch)
    basis_up = np.sqrt(2 / patch) * np.cos(np.pi / patch * np.outer(place, place + 0.5))
    basis_up[0] /= np.sqrt(2)
    rows, columns = np.meshgrid(place, place, indexing="ij")
    if kind == "norm-pixels-highpass":
        factor_uv = (rows + columns >= cut).astype(np.float64)
    else:
        assert kind == "norm-pixels-whitened", kind
        factor_uv = np.hypot(rows, columns)
    basis_FS = np.kron(basis_up, basis_up)  # all p x p frequencies, flattened (u, v), from p x p pixels
    one_channel = basis_FS.T @ (factor_uv.reshape(-1, 1) * basis_FS)
    return torch.from_numpy(np.kron(one_channel, np.eye(channels))).to(torch.float32)


def make_target(patches: Tensor, kind: str, spectrum_PP: Tensor | None = None) -> Tensor:
    """The values to predict for given patches: themselves, or normalised by their own statistics (section 3).

    spectrum_PP: what `target_spectrum` gives for this kind; it comes after the normalisation.
    """
    if kind == "pixels":
        return patches
    assert (spectrum_PP is None) == (kind == "norm-pixels"), kind
    mean, deviation = patch_statistics(patches)
    normal = (patches - mean) / deviation
    return normal if spectrum_PP is None else normal @ spectrum_PP.to(normal.dtype)


def undo_target(
    pred_BMP: Tensor,
    kind: str,
    statistics: str,
    patches_BNP: Tensor,
    ids_keep_BV: Tensor,
    ids_masked_BM: Tensor,
    grid_hw: tuple[int, int],
    patch: int = 0,
    spectrum_PP: Tensor | None = None,
) -> Tensor:
    """Predictions [B, M, P] brought back to (input-normalised) pixels for drawing.

    patch, spectrum_PP: for spectral targets. What these leave out of a patch cannot come from the prediction; it comes
        from where its statistics come from: the hidden patch itself, or `bilinear_fill`.

    statistics, for normalised targets only:
        true-patch: mean and deviation of the hidden patch itself. It shows texture well, but leaks the answer's
            brightness: a picture drawn so must say it.
        visible: both interpolated from the nearest visible patches, as `fill_grid` does. Leaks nothing.
        none: the prediction as it is.
    """
    if kind == "pixels" or statistics == "none":
        return pred_BMP
    if statistics == "true-patch":
        mean, deviation = patch_statistics(take_patches(patches_BNP, ids_masked_BM))
    else:
        assert statistics == "visible", statistics
        visible = torch.cat(patch_statistics(take_patches(patches_BNP, ids_keep_BV)), dim=-1)
        mean, deviation = take_patches(fill_grid(visible, ids_keep_BV, grid_hw), ids_masked_BM).split(1, dim=-1)
    if spectrum_PP is not None:
        known = bilinear_fill(patches_BNP, ids_keep_BV, grid_hw, patch) if statistics == "visible" else patches_BNP
        normal = (take_patches(known, ids_masked_BM) - mean) / deviation
        pred_BMP = undo_spectrum(pred_BMP, normal, spectrum_PP)
    return pred_BMP * deviation + mean


def undo_spectrum(pred_BMP: Tensor, normal_BMP: Tensor, spectrum_PP: Tensor) -> Tensor:
    """The normalised patches that a spectral target's prediction stands for; the rest of them is that of others."""
    matrix = spectrum_PP.cpu().double()  # on the CPU, since MPS has no float64
    inverse = torch.linalg.pinv(matrix, rtol=1e-5, hermitian=True)
    left_out = torch.eye(len(matrix), dtype=matrix.dtype) - inverse @ matrix
    whole: Tensor = pred_BMP @ inverse.to(pred_BMP) + normal_BMP @ left_out.to(normal_BMP)
    return whole


def fill_grid(values_BVK: Tensor, ids_keep_BV: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Values of visible patches spread over the whole grid, [B, N, K].

    A visible patch keeps its value. A hidden one takes the mean of its (up to) four nearest visible patches, weighted
    by 1 / distance; distances are between patch centres, ties go to the smaller patch number.
    """
    num = grid_hw[0] * grid_hw[1]
    rows, columns = torch.arange(num, device=values_BVK.device) // grid_hw[1], torch.arange(num) % grid_hw[1]
    place_N2 = torch.stack([rows, columns.to(rows.device)], dim=1).to(torch.float32)
    distance_NN = torch.cdist(place_N2, place_N2, compute_mode="donot_use_mm_for_euclid_dist")
    # Visible patches in ascending order and a stable sort: ties go to the smaller number on every device.
    ids_BV, order_BV = ids_keep_BV.sort(dim=1)
    values_BVK = torch.take_along_dim(values_BVK, order_BV.unsqueeze(-1), dim=1)
    distance_BNV = distance_NN[:, ids_BV].permute(1, 0, 2)
    nearest = min(4, ids_BV.shape[1])
    sorted_distance, sorted_place = distance_BNV.sort(dim=-1, stable=True)
    near_BNk, place_BNk = sorted_distance[..., :nearest], sorted_place[..., :nearest]
    weight_BNk = torch.where(near_BNk[..., :1] == 0, (near_BNk == 0).float(), 1 / near_BNk.clamp_min(1e-9))
    weight_BNk = (weight_BNk / weight_BNk.sum(dim=-1, keepdim=True)).to(values_BVK.dtype)
    batch = torch.arange(len(ids_BV), device=ids_BV.device)[:, None, None]
    filled: Tensor = torch.einsum("bnk,bnkc->bnc", weight_BNk, values_BVK[batch, place_BNk])
    return filled


def bilinear_fill(patches_BNP: Tensor, ids_keep_BV: Tensor, grid_hw: tuple[int, int], patch: int) -> Tensor:
    """A smooth guess of every patch from the visible ones, [B, N, P]: the stronger of the two trivial predictors.

    1. Each visible patch is reduced to its mean colour. 2. `fill_grid` gives every hidden patch a mean colour.
    3. The grid of colours, placed at the patch centres, is interpolated bilinearly to pixels (edges clamped).
    """
    batch, num, size = patches_BNP.shape
    channels = size // (patch * patch)
    visible = take_patches(patches_BNP, ids_keep_BV).reshape(batch, -1, patch * patch, channels)
    colour_BNC = fill_grid(visible.mean(dim=2), ids_keep_BV, grid_hw)
    colour_BCG = colour_BNC.transpose(1, 2).reshape(batch, channels, *grid_hw)
    size_hw = (grid_hw[0] * patch, grid_hw[1] * patch)
    return patchify(F.interpolate(colour_BCG, size=size_hw, mode="bilinear", align_corners=False), patch)


def trivial_losses(
    patches_BNP: Tensor,
    ids_keep_BV: Tensor,
    ids_masked_BM: Tensor,
    kind: str,
    grid_hw: tuple[int, int],
    patch: int,
    spectrum_PP: Tensor | None = None,
) -> Tensor:
    """Each image's mean squared errors [2, B] by two predictors that learn nothing, with the same masks and target.

    pixels: the mean colour of the image's visible pixels; `bilinear_fill`.
    norm-pixels: zero (its loss is about 1); `bilinear_fill` normalised by its own statistics.
    spectral targets: zero; the target that the fill, taken for the patch, would have.
    """
    hidden_BMP = take_patches(patches_BNP, ids_masked_BM)
    target_BMP = make_target(hidden_BMP, kind, spectrum_PP)
    fill_BMP = take_patches(bilinear_fill(patches_BNP, ids_keep_BV, grid_hw, patch), ids_masked_BM)
    if kind == "pixels":
        batch, visible, size = len(patches_BNP), ids_keep_BV.shape[1], patches_BNP.shape[-1]
        pixels = take_patches(patches_BNP, ids_keep_BV).reshape(batch, visible, patch * patch, -1)
        constant = pixels.mean(dim=(1, 2)).repeat(1, patch * patch).unsqueeze(1)
        assert constant.shape[-1] == size
    else:
        constant = torch.zeros_like(target_BMP)
    guesses = (constant, make_target(fill_BMP, kind, spectrum_PP))
    return torch.stack([(guess - target_BMP).square().mean(dim=(1, 2)) for guess in guesses])
