"""An attentive probe: learned queries attend over the last block's tokens, and a linear layer reads what they gather.

Cross-attention as in CAE's attentive probing (arXiv 2202.03026, section 4). A query that does not depend on the image
can be multiplied into the key weights once (q.(W k) = (W' q).k), and the values' weights can be applied after the
weighted sum, as both are linear. So a token costs 4 H D operations in place of 4 D^2, for the same functions. A bias of
the keys shifts all scores of a head alike and is left out; that of the values goes into the batch norm.

Shapes: S samples, B batch, N tokens, D width, H heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maekit.data.loader import Pool
from maekit.models.mae import MaskedAutoencoder
from maekit.training.capacity import RAM_SHARE
from maekit.training.evaluation import Chosen, Progress, TrainSet, best_of
from maekit.training.optim import learning_rate
from maekit.training.settling import FEW_STEPS, settle_statistics

RATES = (1e-3, 4e-3, 1.6e-2)
DECAY, WARMUP_SHARE = 0.01, 0.1
BATCH, LEAST_BATCH, LEAST_STEPS = 256, 32, 500
"""Few images make smaller batches, so that there are steps enough to learn in; 50 of them, as digits in batches of 256
have in 10 epochs, leave the probe below a linear one."""

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""Of an epoch: (tokens [B, N, D], labels [B])."""


class AttentivePool(nn.Module):
    """Tokens [B, N, D] to what H heads gather from them [B, D]: multi-head attention with one learned query, folded."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query_HD = nn.Parameter(torch.randn(heads, width) / math.sqrt(width))
        self.value_HDE = nn.Parameter(torch.empty(heads, width, width // heads))
        for value_DE in self.value_HDE:
            nn.init.xavier_uniform_(value_DE)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens_BND = self.norm(tokens_BND)
        share_BHN = (tokens_BND @ self.query_HD.T).softmax(dim=1).transpose(1, 2)
        gathered_BHD = share_BHN @ tokens_BND
        return torch.einsum("bhd,hde->bhe", gathered_BHD, self.value_HDE).flatten(1)


class AttentiveProbe(nn.Module):
    """Attentive pooling, batch norm without affine, a linear layer: logits [B, C]."""

    def __init__(self, width: int, heads: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pool = AttentivePool(width, heads)
            self.norm = nn.BatchNorm1d(width, affine=False)
            self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        with torch.autocast(tokens_BND.device.type, enabled=False):
            logits_BC: Tensor = self.head(self.norm(self.pool(tokens_BND.float())))
        return logits_BC


def train_attentive(
    batches: Batches,
    steps_per_epoch: int,
    width: int,
    heads: int,
    classes: int,
    epochs: int,
    device: torch.device,
    rates: Sequence[float] = RATES,
    on_progress: Progress | None = None,
) -> list[AttentiveProbe]:
    """One probe for each rate, side by side on the same batches: AdamW, linear warm-up, cosine."""
    probes = [AttentiveProbe(width, heads, classes).to(device) for _ in rates]
    optimizers = [
        torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=DECAY)
        for probe, rate in zip(probes, rates, strict=True)
    ]
    total, step = epochs * steps_per_epoch, 0
    for epoch in range(epochs):
        for tokens_BND, labels_B in batches(epoch):
            for probe, optimizer, rate in zip(probes, optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = learning_rate(step, total, round(WARMUP_SHARE * total), rate, 0.0)
                optimizer.zero_grad()
                F.cross_entropy(probe(tokens_BND), labels_B).backward()
                optimizer.step()
            step += 1
            if on_progress is not None:
                on_progress(step, total)
    if total < FEW_STEPS:
        settle_statistics(probes, (tokens_BND for tokens_BND, _ in batches(epochs)))
    return [probe.eval() for probe in probes]


@torch.no_grad()
def tokens_of(
    model: MaskedAutoencoder, pool: Pool, ids: npt.NDArray[np.int64], batch_size: int
) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
    """The last block's tokens [B, T + N, D] of centre crops, and their ids, batch after batch."""
    for batch in pool.eval_batches(ids, batch_size):
        yield model.encode(model.normalize(batch.images), pool="tokens"), batch.sample_ids


def tokens_bytes(model: MaskedAutoencoder, images: int) -> int:
    """What the tokens of so many images take in float16."""
    tokens = model.num_prefix + model.grid_hw[0] * model.grid_hw[1]
    return 2 * images * tokens * int(model.encoder.embed_dim)


def batch_for(images: int, epochs: int) -> int:
    """BATCH, halved until the epochs have LEAST_STEPS together, or to LEAST_BATCH; never more than there are images."""
    batch = BATCH
    while batch > LEAST_BATCH and images // batch * epochs < LEAST_STEPS:
        batch //= 2
    return min(batch, images)


def choose_attentive(
    model: MaskedAutoencoder,
    pool: Pool,
    ids: npt.NDArray[np.int64],
    train: TrainSet,
    *,
    epochs: int,
    batch_size: int,
    free: int,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Chosen:
    """The attentive probe on plain views, its rate chosen on the held-out images; fitted without them.

    Tokens are kept in float16 where they take up to half of the free memory (bytes), else the encoder runs anew in
    every epoch.
    """
    kept = tokens_bytes(model, len(ids)) <= RAM_SHARE * free / 2
    batch = batch_for(len(train.fit_S), epochs)
    steps = len(train.fit_S) // batch
    tokens_SND = _kept(model, pool, ids, batch_size, on_progress) if kept else None

    def of(rows: Tensor, whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        rows = rows if whole else rows[: steps * batch]
        if tokens_SND is not None:
            yield from ((tokens_SND[some], train.labels_S[some]) for some in rows.split(batch))
            return
        read = tokens_of(model, pool, ids[rows.cpu().numpy()], batch)
        for (tokens_BND, _), some in zip(read, rows.split(batch), strict=True):
            yield tokens_BND, train.labels_S[some]

    def of_epoch(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(train.fit_S), generator=generator).to(train.fit_S.device)
        return of(train.fit_S[order], whole=False)

    width = int(model.encoder.embed_dim)
    heads = math.gcd(width, model.config.num_heads or 1)  # heads may have a width of their own in the encoder
    probes = train_attentive(
        of_epoch, steps, width, heads, train.classes, epochs, train.labels_S.device, on_progress=on_progress
    )
    right = [int(_right(probe, of(train.held_S)).sum()) / len(train.held_S) for probe in probes]
    sweep = [{"lr": rate, "heldout": share} for rate, share in zip(RATES, right, strict=True)]
    best = best_of(sweep)
    setting = {"block": len(model.encoder.blocks), "pooling": "attentive", "heads": heads, "lr": best["lr"]}
    setting |= {"epochs": epochs, "batch": batch, "tokens": "kept in float16" if kept else "computed anew"}
    final = probes[sweep.index(best)]
    return Chosen(setting, best["heldout"], sweep, lambda test: _predict(final, test.tokens()))


def _kept(
    model: MaskedAutoencoder, pool: Pool, ids: npt.NDArray[np.int64], batch_size: int, on_progress: Progress | None
) -> Tensor:
    count = model.num_prefix + model.grid_hw[0] * model.grid_hw[1]
    tokens_SND = torch.empty((len(ids), count, model.encoder.embed_dim), dtype=torch.float16, device=model.mean.device)
    done = 0
    for tokens_BND, _ in tokens_of(model, pool, ids, batch_size):
        tokens_SND[done : done + len(tokens_BND)] = tokens_BND
        done += len(tokens_BND)
        if on_progress is not None:
            on_progress(done, len(ids))
    return tokens_SND


@torch.no_grad()
def _right(probe: AttentiveProbe, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([probe(tokens).argmax(dim=1) == labels for tokens, labels in batches])


@torch.no_grad()
def _predict(probe: AttentiveProbe, tokens: Iterable[Tensor]) -> Tensor:
    return torch.cat([probe(tokens_BND).argmax(dim=1) for tokens_BND in tokens])
