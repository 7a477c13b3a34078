"""What is measured during training, on held-out images only: loss with fixed masks, skill, probes, panels.

No test split is ever opened here. Shapes as in models/mae.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.data.loader import Batch, Pool, lowest_hash
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks
from maekit.models.targets import patchify, take_patches, trivial_losses, undo_target
from maekit.rng import Purpose
from maekit.training.probes import knn_accuracy, rankme, ridge_accuracy

PROBE_IMAGES = 5000
"""Training images, at most, whose features the online probes are fitted on (lowest id hash)."""
TRIVIAL_IMAGES = 1024
"""Training images, at most, that the training loss's trivial predictors are measured on."""
PANEL_IMAGES = 8
ROUNDING = 1e-6
"""A trivial predictor's loss up to here is 0 but for rounding (1e-8 or so), as on blank images: there is no skill."""


@dataclass(frozen=True)
class Heldout:
    """Loss on the held-out images with fixed masks, and the losses of the two trivial predictors there."""

    loss: float
    trivial: tuple[float, float]

    @property
    def skill(self) -> float:
        """1 - L / L_trivial against the better trivial predictor: 0 is no better than it, 1 is perfect."""
        return 1 - self.loss / min(self.trivial)


def heldout_masks(model: MaskedAutoencoder, sample_ids: npt.NDArray[np.int64], view: int = 0) -> tuple[Tensor, Tensor]:
    """The masks of held-out images, the same in every epoch and in every run: visible [B, V] and hidden [B, M] ids.

    view: which of an image's masks; every score takes the first.
    """
    config = model.config
    masks = make_masks(
        config.mask, model.grid_hw, config.mask_ratio, sample_ids, seed=0, purpose=Purpose.HELDOUT_MASK, view=view
    ).to(model.mean.device)
    return masks.ids_keep_BV, masks.ids_masked_BM


@torch.no_grad()
def heldout_losses(
    model: MaskedAutoencoder,
    pool: Pool,
    ids: npt.NDArray[np.int64],
    batch_size: int,
    *,
    with_trivial: bool,
    views: int = 1,
) -> Iterator[Tensor]:
    """Each image's loss and those of the two trivial predictors [3, B], in the order of the ids, a batch at a time.

    Means over the first `views` masks of each image; float64 on the CPU. Without the trivial ones these are 0.
    """
    for batch in pool.eval_batches(ids, batch_size):
        images = model.normalize(batch.images)
        patches = patchify(images, model.patch_size)
        losses_3B = torch.zeros(3, len(images), dtype=torch.float64)
        for view in range(views):
            keep, masked = heldout_masks(model, batch.sample_ids, view)
            pred_BMP = model(images, keep, ids_masked=masked).pred_BMP
            errors_BMP = model.errors(pred_BMP, take_patches(patches, masked))
            losses_3B[0] += errors_BMP.mean(dim=(1, 2)).cpu().double()
            if with_trivial:
                trivial = trivial_losses(
                    patches, keep, masked, model.config.target, model.grid_hw, model.patch_size, model.spectrum
                )
                losses_3B[1:] += trivial.cpu().double()
        yield losses_3B / views


def heldout_sums(
    model: MaskedAutoencoder, pool: Pool, ids: npt.NDArray[np.int64], batch_size: int, *, with_trivial: bool
) -> Tensor:
    """[loss x images, trivial 1 x images, trivial 2 x images, images] over this process's held-out ids.

    float64 on the CPU. Sums add up over processes, so the division is the caller's.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for losses_3B in heldout_losses(model, pool, ids, batch_size, with_trivial=with_trivial):
        sums[:3] += losses_3B.sum(dim=1)
        sums[3] += losses_3B.shape[1]
    return sums


@torch.no_grad()
def training_trivial(model: MaskedAutoencoder, batches: Iterator[Batch], seed: int) -> float:
    """The better trivial loss on the first training images as the training sees them: augmented, with their masks."""
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        images = model.normalize(batch.images)
        masks = model.draw_masks(batch.sample_ids, seed=seed).to(images.device)
        losses = trivial_losses(
            patchify(images, model.patch_size),
            masks.ids_keep_BV,
            masks.ids_masked_BM,
            model.config.target,
            model.grid_hw,
            model.patch_size,
            model.spectrum,
        )
        sums += losses.cpu().double().sum(dim=1)
        count += len(images)
    return float(sums.min()) / count


@torch.no_grad()
def extract_features(model: MaskedAutoencoder, pool: Pool, ids: npt.NDArray[np.int64], batch_size: int) -> Tensor:
    """Features [S, D] of the images, float32: the mean of their patch tokens."""
    batches = pool.eval_batches(ids, batch_size)
    return torch.cat([model.encode(model.normalize(batch.images), pool="mean").float() for batch in batches])


def online_probe(
    model: MaskedAutoencoder,
    pool: Pool,
    train_ids: npt.NDArray[np.int64],
    heldout_ids: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64] | None,
    batch_size: int,
) -> dict[str, float]:
    """RankMe of the held-out features and, with labels, k-NN and ridge accuracy from training to held-out images, of
    how many images that is, and what share of them is of the largest class.

    Where too few images have a label for that, only the first.
    """
    heldout = extract_features(model, pool, heldout_ids, batch_size)
    found = {"rankme": rankme(heldout)}
    if labels is not None:
        some = lowest_hash(train_ids, PROBE_IMAGES, Purpose.SUBSET)
        train = extract_features(model, pool, some, batch_size)
        train, train_labels = _labelled(pool, some, train, labels)
        heldout, heldout_labels = _labelled(pool, heldout_ids, heldout, labels)
        if len(train_labels) > 1 and len(heldout_labels):
            found["images"] = len(heldout_labels)
            found["largest_class"] = float(heldout_labels.bincount().max()) / len(heldout_labels)
            found["knn"] = knn_accuracy(train, train_labels, heldout, heldout_labels)
            found["linear"] = ridge_accuracy(train, train_labels, heldout, heldout_labels)
    return found


def _labelled(
    pool: Pool, ids: npt.NDArray[np.int64], features_SD: Tensor, labels: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Features and labels of the images that could be read and have a label: a stand-in's label is not its own."""
    kept = ~np.isin(ids, list(pool.unreadable)) & (labels[ids] >= 0)
    device = features_SD.device
    return features_SD[torch.from_numpy(kept).to(device)], torch.from_numpy(labels[ids[kept]]).to(device)


@dataclass(frozen=True)
class Reconstruction:
    """What a panel shows of one image: pixels in 0..1 [H, W, C], hidden patch numbers [M], their pixels [M, P]."""

    image_HWC: npt.NDArray[np.float32]
    ids_masked_M: npt.NDArray[np.int64]
    pred_MP: npt.NDArray[np.float32]


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, images_BCHW: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor, statistics: str
) -> list[Reconstruction]:
    """Predictions for pixels in 0..1 (or uint8), brought back to pixels under the named statistics."""
    normal = model.normalize(images_BCHW)
    pred_BMP = model(normal, ids_keep_BV, ids_masked=ids_masked_BM).pred_BMP.float()
    patches = patchify(normal, model.patch_size)
    pred_BMP = undo_target(
        pred_BMP, model.config.target, statistics, patches, ids_keep_BV, ids_masked_BM, model.grid_hw, model.patch_size,
        model.spectrum,
    )  # fmt: skip
    repeat = model.patch_size**2  # channels are the fastest axis of a patch
    pixels_BMP = pred_BMP * model.std.flatten().repeat(repeat) + model.mean.flatten().repeat(repeat)
    shown = images_BCHW.float() / 255 if images_BCHW.dtype == torch.uint8 else images_BCHW
    return [
        Reconstruction(image.permute(1, 2, 0).cpu().numpy(), hidden.cpu().numpy(), pixels.cpu().numpy())
        for image, hidden, pixels in zip(shown, ids_masked_BM, pixels_BMP, strict=True)
    ]


STATISTICS_NOTE = {
    "true-patch": "normalised target: each hidden patch is un-normalised by the mean and deviation of the true patch",
    "visible": "normalised target: un-normalised by statistics interpolated from the nearest visible patches",
    "none": "normalised target, shown as predicted (no patch statistics)",
}
LEFT_OUT_NOTE = {
    "true-patch": ", and has its frequencies that the target leaves out",
    "visible": "; frequencies that the target leaves out come from a bilinear fill of the visible patches",
    "none": "; the frequencies that the target leaves out are missing",
}
"""What is added for a spectral target."""


def statistics_note(model: MaskedAutoencoder, statistics: str) -> str:
    """The line under a panel that says whose statistics it shows; empty for pixel targets, which need none."""
    if model.config.target == "pixels":
        return ""
    return STATISTICS_NOTE[statistics] + (LEFT_OUT_NOTE[statistics] if model.spectrum is not None else "")
