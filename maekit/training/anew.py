"""Probing and training on images that are augmented anew in every epoch: dear, as the encoder runs on each of them.

`probe_anew` is the paper's protocol of linear probing (appendix A.1): random resized crops and mirroring.
`train_supervised` trains an encoder of the same architecture with labels, plainly: what a probe is measured against.

Shapes: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maekit.data.loader import Pool, SampleOrder
from maekit.data.splits import Split
from maekit.models.mae import MaskedAutoencoder
from maekit.training.evaluation import Chosen, Progress, TrainSet, best_of, held_out_S
from maekit.training.linear_probe import EPOCHS, RATES, LarsSweep, scaled_batch, schedule
from maekit.training.optim import learning_rate
from maekit.training.settling import FEW_STEPS, settle_statistics

SUPERVISED_LR, SUPERVISED_DECAY, SUPERVISED_BATCH, SUPERVISED_WARMUP = 1e-3, 0.05, 256, 0.1
"""AdamW's, at (0.9, 0.999); warm-up as a share of the steps."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledPool:
    """Images whose pool crops and mirrors at random, the ids to draw from, and the class of each id [N]."""

    pool: Pool
    ids: Ids
    labels_N: Ids
    classes: int

    def batches(self, order: SampleOrder, steps: int, most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, images, labels) of all steps, in parts of at most so many images."""
        starts = range(0, order.batch_size, most)
        steps_ids = (order.step_ids(step) for step in range(steps))
        shares = ((epoch, ids[start : start + most]) for epoch, ids in steps_ids for start in starts)
        for count, batch in enumerate(self.pool.train_batches(shares)):
            labels = torch.from_numpy(self.labels_N[batch.sample_ids]).to(batch.images.device)
            yield count // len(starts), batch.images, labels


def fitting_pool(train: Split) -> LabelledPool:
    """The training images without the held-out ones, as a stream of random crops."""
    assert train.part.labels is not None
    ids = train.ids[~held_out_S(train.ids, train.part.groups)]
    return LabelledPool(train.pool, ids, np.asarray(train.part.labels, np.int64), int(train.labels.max()) + 1)


def probe_anew(
    model: MaskedAutoencoder,
    data: LabelledPool,
    kinds: Sequence[Literal["cls", "mean"]],
    batch_size: int,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, LarsSweep]:
    """The paper's probe on the last block for each kind of pooling, its rates side by side, from one pass an epoch.

    After few steps one more epoch of images gives the batch norms their statistics.
    """
    batch = scaled_batch(len(data.ids))
    order = SampleOrder(data.ids, batch, seed)
    total = epochs * order.steps_per_epoch
    width, device = model.encoder.embed_dim, model.mean.device
    sweeps: dict[str, LarsSweep] = {kind: LarsSweep(width, data.classes, RATES, seed).to(device) for kind in kinds}
    features: list[Tensor] = []
    labels: list[Tensor] = []
    last: list[Tensor] = []
    more = order.steps_per_epoch if total < FEW_STEPS else 0
    for step, images, some in data.batches(order, total + more, batch_size):
        with torch.no_grad():
            tokens_BND = model.encode(model.normalize(images), pool="tokens")
            features.append(pooled(tokens_BND, kinds, model.num_prefix).float())
        labels.append(some)
        if sum(map(len, labels)) < batch:
            continue
        features_BPD, labels_B = torch.cat(features), torch.cat(labels)
        features, labels = [], []
        if step >= total:
            last.append(features_BPD)
            continue
        for place, sweep in enumerate(sweeps.values()):
            sweep.update(features_BPD[:, place], labels_B, schedule(step, total))
        if on_progress is not None:
            on_progress(step + 1, total)
    for place, sweep in enumerate(sweeps.values() if last else ()):
        settle_statistics([sweep], [features_BPD[:, place] for features_BPD in last])
    return sweeps


def choose_paper(
    model: MaskedAutoencoder,
    data: LabelledPool,
    train: TrainSet,
    batch_size: int,
    *,
    epochs: int,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Chosen:
    """The paper's protocol on the last block; pooling and rate chosen on held-out images, and fitted without them."""
    kinds = train.features.kinds
    sweeps = probe_anew(model, data, kinds, batch_size, epochs=epochs, seed=seed, on_progress=on_progress)
    block = len(model.encoder.blocks)
    tried = [
        {"pooling": kind, "lr": rate, "heldout": share}
        for kind in kinds
        for rate, share in zip(RATES, sweeps[kind].accuracies(*train.rows(block, kind, train.held_S)), strict=True)
    ]
    best = best_of(tried)
    kind, place = best["pooling"], RATES.index(best["lr"])
    setting = {"block": block, "pooling": kind, "lr": best["lr"], "epochs": epochs}
    setting |= {"batch": scaled_batch(len(data.ids)), "at_the_edge": best["lr"] in (RATES[0], RATES[-1])}
    return Chosen(
        setting, best["heldout"], tried, lambda test: sweeps[kind].predict(test.features.get(block, kind)[0])[place]
    )


def pooled(tokens_BND: Tensor, kinds: Sequence[str], num_prefix: int) -> Tensor:
    """The class token and/or the mean of the patch tokens [B, P, D]."""
    both = {"cls": tokens_BND[:, 0], "mean": tokens_BND[:, num_prefix:].mean(dim=1)}
    return torch.stack([both[kind] for kind in kinds], dim=1)


def train_supervised(
    model: MaskedAutoencoder,
    data: LabelledPool,
    epochs: int,
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> nn.Linear:
    """Train the encoder in place with a linear layer on the mean of its patch tokens; returns that layer.

    Cross-entropy, AdamW, linear warm-up, then a cosine to 0; no mixing of images, no decay by layer: `maekit finetune`
    has all that. The last state is kept, so nothing is chosen.
    """
    order = SampleOrder(data.ids, min(SUPERVISED_BATCH, len(data.ids)), seed)
    total = epochs * order.steps_per_epoch
    device = model.mean.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(model.encoder.embed_dim, data.classes).to(device)
    trained = [one for one in [*model.encoder.parameters(), *head.parameters()] if one.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": SUPERVISED_DECAY},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SUPERVISED_LR)
    model.train()
    for step, images, labels_B in data.batches(order, total, order.batch_size):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, round(SUPERVISED_WARMUP * total), SUPERVISED_LR, 0.0)
        features_BD = model.encode(model.normalize(images), pool="mean")
        loss = F.cross_entropy(head(features_BD).float(), labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_progress is not None:
            on_progress(step + 1, total)
    model.eval()
    return head
