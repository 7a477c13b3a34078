"""The paper's linear probe, several learning rates side by side: batch norm without affine, one linear layer, LARS.

MAE appendix A.1 and table 10: 90 epochs, batch 16384, base rate 0.1, momentum 0.9, no weight decay, linear warm-up over
10 epochs, then a cosine. LARS: arXiv 1708.03888. timm's optimiser applies its trust ratio at weight decay 0 only where
it is told to (`always_adapt`); biases are left out of it.

Shapes: B batch, D features, C classes, K classifiers, R rows of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from maekit.training.optim import learning_rate
from maekit.training.settling import FEW_STEPS, settle_statistics

EPOCHS, WARMUP_EPOCHS, MOMENTUM, TRUST = 90, 10, 0.9, 0.001
PAPER_BATCH, PAPER_IMAGES, LEAST_BATCH = 16384, 1_281_167, 256
RATES = (0.2, 0.8, 3.2, 6.4, 12.8, 25.6, 102.4)
"""Peak learning rates that are tried, about the paper's 6.4 (0.1 x 16384 / 256). Under LARS they do not scale with the
batch: a step changes a classifier by rate x TRUST of its own length."""
INIT_STD = 0.01


def scaled_batch(images: int) -> int:
    """The paper's batch in proportion to the set, as a power of two: an epoch keeps its steps, about 78.

    At least 256, as the batch norm's statistics need some samples, and never more than there are.
    """
    wanted = PAPER_BATCH * images / PAPER_IMAGES
    batch = 1
    while batch < wanted:
        batch *= 2
    return max(1, min(PAPER_BATCH, max(LEAST_BATCH, batch), images))


class LarsSweep(nn.Module):
    """K linear classifiers behind one batch norm, from the same start, each with a learning rate of its own.

    Every one is trained as if it were alone: the sum of the losses has each one's own gradient, and timm's LARS takes
    the lengths of weights and gradients per parameter.
    """

    def __init__(self, width: int, classes: int, rates: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        self.rates, self.classes = tuple(rates), classes
        start_CD = INIT_STD * torch.randn(width, classes, generator=torch.Generator().manual_seed(seed)).T.contiguous()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.weights = nn.ParameterList([start_CD.clone() for _ in self.rates])
        self.biases = nn.ParameterList([torch.zeros(classes) for _ in self.rates])
        self.optimizer = Lars(
            [{"params": [weight], "rate": rate, "always_adapt": True}
             for weight, rate in zip(self.weights, self.rates, strict=True)]
            + [{"params": [bias], "rate": rate} for bias, rate in zip(self.biases, self.rates, strict=True)],
            momentum=MOMENTUM, weight_decay=0.0, trust_coeff=TRUST,
        )  # fmt: skip

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits [B, K, C], by one matrix product in float32, whatever the encoder computes in."""
        # [K * C, D] as in F.linear: the gradient of a [B, D] @ [D, 10] product takes 3 to 6 times as long (MKL, AVX2).
        weight_KCD, bias_KC = torch.cat(list(self.weights)), torch.cat(list(self.biases))
        with torch.autocast(features_BD.device.type, enabled=False):
            logits_BKC: Tensor = F.linear(self.norm(features_BD), weight_KCD, bias_KC)
        return logits_BKC.view(len(features_BD), len(self.rates), self.classes)

    def update(self, features_BD: Tensor, labels_B: Tensor, share: float) -> None:
        """One step of all classifiers; `share` is what the schedule leaves of each one's rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
        logits_BKC = self(features_BD)
        count = len(self.rates)
        # A classifier's loss is its mean over the batch; the losses add up, so that none weighs on another.
        loss = F.cross_entropy(logits_BKC.flatten(0, 1), labels_B.repeat_interleave(count)) * count
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, features_RD: Tensor) -> Tensor:
        """Classes [K, R], by the batch norm's running statistics."""
        self.eval()
        found = torch.cat([self(part).argmax(dim=2) for part in features_RD.split(4096)])
        self.train()
        return found.T

    def accuracies(self, features_RD: Tensor, labels_R: Tensor) -> list[float]:
        """Share of rows that each classifier gets right."""
        return [int(right_R.sum()) / len(labels_R) for right_R in self.predict(features_RD) == labels_R]


def schedule(step: int, total: int) -> float:
    """What is left of the peak rate in a step (0-based): the paper's 10 of 90 epochs of warm-up, then a cosine."""
    return learning_rate(step, total, round(total * WARMUP_EPOCHS / EPOCHS), 1.0, 0.0)


def train_sweep(
    features_RD: Tensor,
    labels_R: Tensor,
    classes: int,
    rates: Sequence[float],
    *,
    images: int | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> LarsSweep:
    """Train a classifier for each rate on features in memory, in one pass over the same shuffled batches.

    images: what an epoch counts, where the rows hold several views of each image; default: the rows.
    """
    images = images or len(features_RD)
    batch = scaled_batch(images)
    steps = epochs * max(1, images // batch)
    sweep = LarsSweep(features_RD.shape[1], classes, rates, seed).to(features_RD.device)
    generator = torch.Generator().manual_seed(seed)
    order, place = torch.empty(0, dtype=torch.int64), 0
    for step in range(steps):
        if place + batch > len(order):
            order, place = torch.randperm(len(features_RD), generator=generator).to(features_RD.device), 0
        rows = order[place : place + batch]
        place += batch
        sweep.update(features_RD[rows], labels_R[rows], schedule(step, steps))
        if on_progress is not None:
            on_progress(step + 1, steps)
    if steps < FEW_STEPS:
        # Shuffled, since rows in the order of their classes would have too little variance in a batch; without a rest
        # that may be one row, which has none.
        parts = torch.randperm(len(features_RD), generator=generator).to(features_RD.device).split(batch)
        settle_statistics([sweep], (features_RD[rows] for rows in parts if len(rows) == batch))
    return sweep
