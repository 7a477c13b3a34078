"""The linear probe of the Keras tutorial on masked image modelling, so that its published numbers can be compared.

    augmented views -> frozen encoder, dropout on -> fixed factor -> mean of patches -> linear layer, 50 epochs of SGD

Facts from the tutorial's text, no line of its code. What is odd about it belongs to it:
- its batch normalisation stands before the mean and is frozen at its first statistics (mean 0, variance 1): all that
  it does is to divide by sqrt(1 + 0.001). The features are not standardised;
- freezing the encoder does not switch off its dropout of 0.1, in the weights of attention and after both layers of
  every MLP, while the classifier is fitted. It is off when the test split is scored;
- it fits on the 40,000 images that it pretrains on, not on all 50,000;
- it fits on random crops (48 px out of 52) and mirrored images, and is scored on the whole image at 48 px.
The protocol runs every image through the encoder 50 times. Beside it, `maekit probe` tells what the features hold.

Shapes: B batch, S samples, D features, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from maekit.config import ModelConfig, PretrainConfig, UserError
from maekit.data.loader import Pool
from maekit.models.mae import MaskedAutoencoder
from maekit.rng import Purpose, shuffled
from maekit.training.optim import learning_rate

TRAIN_IMAGES = 40_000
EPOCHS, BATCH_SIZE, PEAK_LR, MOMENTUM, WARMUP_SHARE, DROPOUT = 50, 256, 0.1, 0.9, 0.1, 0.1
NORM_EPS = 1e-3
"""Keras's for batch normalisation."""
RESIZED = 52 / 48
"""Side to which images are resized, over the side of the random crop."""


class Labelled(NamedTuple):
    """Images of one split: where they are, their sample ids [S], their classes [S] on the device."""

    pool: Pool
    ids: npt.NDArray[np.int64]
    labels: Tensor


class KerasScore(NamedTuple):
    """Accuracy on the test images, and on the augmented training images of the last epoch, with dropout; the layer."""

    test: float
    train: float
    weight_DK: Tensor
    bias_K: Tensor


def reading(config: ModelConfig, data: str, seed: int = 0) -> PretrainConfig:
    """How the probe's images are read: with it, a pool gives the views that the classifier is fitted and scored on."""
    return PretrainConfig(
        data=data, img_size=config.size_hw, in_chans=config.in_chans, seed=seed, crop="resize-crop",
        resize_to=round(RESIZED * max(config.size_hw)), flip=True, interpolation="bilinear",
    )  # fmt: skip


def keras_probe(
    model: MaskedAutoencoder,
    train: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    dropout: float = DROPOUT,
    on_progress: Callable[[int, int], None] | None = None,
) -> KerasScore:
    """Fit the tutorial's linear classifier on the frozen encoder and score it once on the test images.

    Both pools must read as `reading` says. The schedule is the pretraining's: 10 % of linear warm-up, then a cosine to
    zero over epochs x whole batches; Keras's momentum keeps the learning rate inside (v = 0.9 v - lr g, w = w + v).
    on_progress: called with steps done and in all.

    Raises:
        UserError: no images to fit on, or none to score.
    """
    for split, what in ((train, "training"), (test, "test")):
        if not len(split.ids):
            raise UserError(f"--protocol keras: there are no labelled {what} images")
    size = min(batch_size, len(train.ids))
    total = len(train.ids) // size * epochs
    warmup = int(WARMUP_SHARE * total)
    device = train.labels.device
    generator = torch.Generator().manual_seed(seed)
    width = model.config.embed_dim
    assert width is not None
    limit = math.sqrt(6 / (width + num_classes))  # Keras's initial values of a dense layer
    weight = (limit * (2 * torch.rand(width, num_classes, generator=generator) - 1)).to(device)
    bias = torch.zeros(num_classes, device=device)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    hits = seen = 0
    with live_dropout(model, dropout), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step, (begins, features_BD, labels_B) in enumerate(_views(model, train, size, epochs, seed)):
            if begins:
                hits = seen = 0
            lr = learning_rate(step, total, warmup, PEAK_LR, 0.0)
            with torch.autocast(device.type, enabled=False):  # only the encoder's arithmetic may be coarse
                logits_BK = features_BD @ weight + bias
                error_BK = (logits_BK.softmax(dim=1) - F.one_hot(labels_B, num_classes)) / max(1, len(labels_B))
                gradients = (features_BD.T @ error_BK, error_BK.sum(dim=0))
            for value, speed, gradient in zip((weight, bias), velocity, gradients, strict=True):
                speed.mul_(MOMENTUM).sub_(lr * gradient)
                value.add_(speed)
            hits += int((logits_BK.argmax(dim=1) == labels_B).sum())
            seen += len(labels_B)
            if on_progress is not None:
                on_progress(min(step + 1, total), total)
    return KerasScore(_score(model, test, weight, bias, batch_size), hits / max(1, seen), weight, bias)


@torch.no_grad()
def frozen_features(model: MaskedAutoencoder, images_BCHW: Tensor) -> Tensor:
    """Mean of the patch tokens over the frozen batch normalisation's sqrt(1 + 0.001), float32 [B, D]."""
    return model.encode(model.normalize(images_BCHW), pool="mean").float() / math.sqrt(1 + NORM_EPS)


@contextlib.contextmanager
def live_dropout(model: MaskedAutoencoder, share: float) -> Iterator[None]:
    """Dropout in the encoder, where the tutorial has it: on the weights of attention and after both MLP layers."""
    blocks: Any = model.encoder.blocks
    layers: list[Any] = []
    for block in blocks:
        layers += [block.attn.attn_drop, block.mlp.drop1, block.mlp.drop2]
    before = [(layer.p, layer.training) for layer in layers]
    modes = [block.attn.training for block in blocks]
    try:
        for layer in layers:
            layer.p = share
            layer.train()
        for block in blocks:
            block.attn.training = True  # its fused kernel asks the module itself; nothing else in it depends on this
        yield
    finally:
        for layer, (old, training) in zip(layers, before, strict=True):
            layer.p = old
            layer.train(training)
        for block, mode in zip(blocks, modes, strict=True):
            block.attn.training = mode


def _views(
    model: MaskedAutoencoder, train: Labelled, size: int, epochs: int, seed: int
) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """For each batch of each epoch, the last one smaller: whether it begins an epoch, features [B, D], labels [B]."""
    places_S = np.arange(len(train.ids), dtype=np.int64)
    batches = [
        (epoch, order[start : start + size])
        for epoch in range(epochs)
        for order in [shuffled(places_S, seed=seed, purpose=Purpose.ORDER, epoch=epoch)]
        for start in range(0, len(order), size)
    ]
    views = train.pool.train_batches((epoch, train.ids[places]) for epoch, places in batches)
    last = -1
    for (epoch, places), batch in zip(batches, views, strict=True):
        kept = _readable(train, places)
        features_BD = frozen_features(model, batch.images)[kept]
        yield epoch != last, features_BD, train.labels[torch.from_numpy(places).to(kept.device)[kept]]
        last = epoch


def _readable(split: Labelled, places: npt.NDArray[np.int64]) -> Tensor:
    """[B] False where another image stands in for an unreadable one, whose label is not its own."""
    readable = ~np.isin(split.ids[places], list(split.pool.unreadable))
    return torch.from_numpy(readable).to(split.labels.device)


def _score(model: MaskedAutoencoder, test: Labelled, weight_DK: Tensor, bias_K: Tensor, batch_size: int) -> float:
    hits = count = done = 0
    for batch in test.pool.eval_batches(test.ids, batch_size):
        places = np.arange(done, done + len(batch.sample_ids), dtype=np.int64)
        kept = _readable(test, places)
        features_BD = frozen_features(model, batch.images)[kept]
        with torch.autocast(features_BD.device.type, enabled=False):
            predicted = (features_BD @ weight_DK + bias_K).argmax(dim=1)
        labels = test.labels[torch.from_numpy(places).to(kept.device)[kept]]
        hits += int((predicted == labels).sum())
        count += len(labels)
        done += len(batch.sample_ids)
    if not count:
        raise UserError("--protocol keras: none of the test images can be read")
    return hits / count
