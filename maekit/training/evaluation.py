"""What an evaluation card measures of one set of features. Every choice is made here, and no test image is seen here.

A choice comes with a function that predicts under the chosen setting: those of L-BFGS, LARS and k-NN fitted on all
training images, others without the held-out ones; whoever has the test split scores that once. Settings are chosen on
held-out training images: the lowest hashes of the sample ids.

Shapes: S images, R rows of features (a view of an image each), D width, C classes, V views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import UserError
from maekit.data.loader import lowest_hash
from maekit.rng import Purpose
from maekit.training.features import BlockFeatures, Pooling
from maekit.training.few_labels import draw_labels, labels_to_draw
from maekit.training.linear_probe import RATES, LarsSweep, scaled_batch, train_sweep
from maekit.training.probes import (
    Axes,
    LinearProbe,
    fit_linear,
    fit_linear_path,
    knn_predict,
    principal_axes,
    ridge_predict,
)

LEAST_IMAGES = 8
HELDOUT_SHARE = 0.1
"""Share of the training split on which everything is chosen."""
SEARCH_IMAGES, SEARCH_STRENGTHS = 10_000, (1e-4, 1e-3, 1e-2, 1e-1)
"""Block and pooling are searched by closed-form linear probes on at most so many training images."""
DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Of the L-BFGS probe: factor of the squared weights."""
FEW_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of the probes with few labels, which need more."""
NEIGHBOURS, TEMPERATURES = (5, 10, 20, 50, 200), (0.02, 0.07, 0.2)
KNN_QUERIES = 2000
"""Held-out images, at most, that choose for k-NN: those of lowest hash, as the first ones may be of few classes."""
DRAWS = 3
"""Draws of labels for each share of them."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainSet:
    """Features and labels [S] of the training split, and which images (places in it) fit, choose and search."""

    features: BlockFeatures
    labels_S: Tensor
    classes: int
    fit_S: Tensor
    held_S: Tensor
    search_S: Tensor
    queries_S: Tensor
    _axes: dict[tuple[int, Pooling], Axes] = field(default_factory=dict, repr=False)

    def rows(self, block: int, pooling: Pooling, images_S: Tensor, views: int = 1) -> tuple[Tensor, Tensor]:
        """Features [R, D] and labels [R] of some images: all plain views, then all mirrored ones."""
        features_VSD = self.features.get(block, pooling, images_S, views)
        return features_VSD.flatten(0, 1), self.labels_S[images_S].repeat(views)

    def axes(self, block: int, pooling: Pooling) -> Axes | None:
        """Along which all fits to these features are searched, found once; None of fewer images than features."""
        if (block, pooling) not in self._axes:
            features_SD, _ = self.rows(block, pooling, self.search_S)
            if len(features_SD) < features_SD.shape[1]:
                return None
            self._axes[block, pooling] = principal_axes(features_SD)
        return self._axes[block, pooling]

    @property
    def all_S(self) -> Tensor:
        return torch.arange(len(self.labels_S), device=self.labels_S.device)


@dataclass(frozen=True)
class TestImages:
    """What a fitted probe may see of the test split: features of the chosen blocks, and tokens anew; no label."""

    features: BlockFeatures
    tokens: Callable[[], Iterable[Tensor]]
    """Batches of the last block's tokens [B, T + N, D]."""


@dataclass(frozen=True)
class Chosen:
    """A probe's setting, its held-out accuracy, all that was tried, and what predicts test features under it."""

    setting: dict[str, Any]
    heldout: float
    sweep: list[dict[str, Any]]
    predict: Callable[[TestImages], Tensor] = field(repr=False)

    def scored(self) -> Chosen:
        """Without what predicts: k-NN's holds as much as the features do."""
        return replace(self, predict=_used_up)


def _used_up(test: TestImages) -> Tensor:
    raise AssertionError("the test split is scored once")


def divide(
    features: BlockFeatures,
    labels_S: Tensor,
    ids: npt.NDArray[np.int64],
    groups_N: npt.NDArray[np.int64] | None = None,
) -> TrainSet:
    """The training split with its held-out part, the images that blocks are searched on, and k-NN's queries."""
    held = held_out_S(ids, groups_N)
    search = np.isin(ids, lowest_hash(ids[~held], SEARCH_IMAGES, Purpose.SUBSET))
    queries = np.isin(ids, lowest_hash(ids[held], KNN_QUERIES, Purpose.SUBSET))
    fit_S, held_S, search_S, queries_S = (
        torch.from_numpy(np.flatnonzero(rows)).to(labels_S.device) for rows in (~held, held, search, queries)
    )
    return TrainSet(features, labels_S, int(labels_S.max()) + 1, fit_S, held_S, search_S, queries_S)


def held_out_S(ids: npt.NDArray[np.int64], groups_N: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.bool_]:
    """[S] True for the training images on which everything is chosen: the tenth with the lowest hashes, in whole
    groups (so more than a tenth) where the images of the part have any.

    Raises:
        UserError: all images are of one group.
    """
    lowest = lowest_hash(ids, max(1, round(HELDOUT_SHARE * len(ids))), Purpose.HELDOUT_SPLIT, groups_N)
    held_S: npt.NDArray[np.bool_] = np.isin(ids, lowest)
    if held_S.all():
        raise UserError(
            f"--group-by: the {len(ids):,} training images are of too few groups: a tenth of them chooses the settings "
            "of the probes, in whole groups, and some must be left to fit them on"
        )
    return held_S


def share_right(predicted_S: Tensor, labels_S: Tensor) -> float:
    """Accuracy in 0..1."""
    return int((predicted_S == labels_S).sum()) / len(labels_S)


def best_of(sweep: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry with the highest held-out accuracy; the first of equals."""
    return max(sweep, key=lambda entry: entry["heldout"])


def search_blocks(train: TrainSet, blocks: Sequence[int], on_progress: Progress | None = None) -> list[dict[str, Any]]:
    """Held-out accuracies of a closed-form linear probe and of k-NN, after each of the blocks with every pooling.

    On plain views of at most SEARCH_IMAGES images: it ranks, and the chosen ones are fitted anew on all.
    """
    places = [(block, pooling) for block in blocks for pooling in train.features.poolings]
    found = []
    for block, pooling in places:
        fit, labels = train.rows(block, pooling, train.search_S)
        check, check_labels = train.rows(block, pooling, train.held_S)
        ridge = ridge_predict(fit, labels, train.classes, check, SEARCH_STRENGTHS)
        linear = max(share_right(predicted, check_labels) for predicted in ridge.values())
        queries, query_labels = train.rows(block, pooling, train.queries_S)
        knn = share_right(knn_predict(fit, labels, queries, (20,), (0.07,))[20, 0.07], query_labels)
        found.append({"block": block, "pooling": pooling, "linear": linear, "knn": knn})
        if on_progress is not None:
            on_progress(len(found), len(places))
    return found


def choose_views(train: TrainSet, block: int, pooling: Pooling) -> tuple[int, list[dict[str, Any]]]:
    """Whether mirrored images help a linear probe (2) or not (1): where left and right differ they may harm."""
    if train.features.views == 1:
        return 1, []
    check, check_labels = train.rows(block, pooling, train.held_S)
    sweep = []
    for views in range(1, train.features.views + 1):
        rows, labels = train.rows(block, pooling, train.search_S, views)
        for strength, predicted in ridge_predict(rows, labels, train.classes, check, SEARCH_STRENGTHS).items():
            sweep.append({"views": views, "strength": strength, "heldout": share_right(predicted, check_labels)})
    return best_of(sweep)["views"], sweep


def choose_linear(
    train: TrainSet, block: int, pooling: Pooling, views: int, on_progress: Progress | None = None
) -> Chosen:
    """The L-BFGS probe: its weight decay chosen, then fitted on all training images.

    The last fit begins at the best of the sweep, whose images are most of its own.
    """
    fit = train.rows(block, pooling, train.fit_S, views)
    probes, sweep = _sweep_decays(train, block, pooling, fit, DECAYS, on_progress)
    best = best_of(sweep)
    everything = train.rows(block, pooling, train.all_S, views)
    start, axes = probes[sweep.index(best)], train.axes(block, pooling)
    final = fit_linear(*everything, train.classes, best["decay"], start, axes)
    setting = {"block": block, "pooling": pooling, "views": views, "decay": best["decay"]}
    return Chosen(setting, best["heldout"], sweep, _by(final, block, pooling))


def _sweep_decays(
    train: TrainSet,
    block: int,
    pooling: Pooling,
    rows: tuple[Tensor, Tensor],
    decays: Sequence[float],
    on_progress: Progress | None = None,
) -> tuple[list[LinearProbe], list[dict[str, Any]]]:
    """A probe and its held-out accuracy for each decay.

    From strong decays to weak ones, which take longer, until two in a row do not help.
    """
    check = train.rows(block, pooling, train.held_S)
    probes: list[LinearProbe] = []
    sweep: list[dict[str, Any]] = []
    for probe in fit_linear_path(*rows, train.classes, decays, axes=train.axes(block, pooling)):
        probes.append(probe)
        sweep.append({"decay": probe.decay, "heldout": probe.accuracy(*check)})
        if on_progress is not None:
            on_progress(len(probes), len(decays) + 1)
        if best_of(sweep) in sweep[:-2]:
            break
    return probes, sweep


def _by(probe: LinearProbe, block: int, pooling: Pooling) -> Callable[[TestImages], Tensor]:
    return lambda test: probe.predict(test.features.get(block, pooling)[0])


def choose_lars(
    train: TrainSet,
    block: int,
    pooling: Pooling,
    views: int,
    epochs: int,
    seed: int,
    on_progress: Progress | None = None,
) -> Chosen:
    """The paper's probe: all learning rates in one pass over the features, then the best one on all images."""

    def trained(images_S: Tensor, rates: Sequence[float]) -> LarsSweep:
        rows = train.rows(block, pooling, images_S, views)
        return train_sweep(
            *rows, train.classes, rates, images=len(images_S), epochs=epochs, seed=seed, on_progress=on_progress
        )

    right = trained(train.fit_S, RATES).accuracies(*train.rows(block, pooling, train.held_S))
    tried = [{"lr": rate, "heldout": share} for rate, share in zip(RATES, right, strict=True)]
    best = best_of(tried)
    final = trained(train.all_S, (best["lr"],))
    setting = {"block": block, "pooling": pooling, "views": views, "lr": best["lr"], "epochs": epochs}
    # At the edge of those tried, a better rate may lie beyond.
    setting |= {"batch": scaled_batch(len(train.all_S)), "at_the_edge": best["lr"] in (RATES[0], RATES[-1])}
    return Chosen(setting, best["heldout"], tried, lambda test: final.predict(test.features.get(block, pooling)[0])[0])


def choose_knn(train: TrainSet, block: int, pooling: Pooling) -> Chosen:
    """k-NN: neighbours and temperature chosen among the fitting images, then voted by all; plain views only."""
    check, check_labels = train.rows(block, pooling, train.queries_S)
    voted = knn_predict(*train.rows(block, pooling, train.fit_S), check, NEIGHBOURS, TEMPERATURES)
    sweep = [
        {"neighbours": k, "temperature": temperature, "heldout": share_right(classes, check_labels)}
        for (k, temperature), classes in voted.items()
    ]
    best = best_of(sweep)
    key = best["neighbours"], best["temperature"]
    bank = train.rows(block, pooling, train.all_S)
    setting = {"block": block, "pooling": pooling, "neighbours": key[0], "temperature": key[1]}
    return Chosen(
        setting,
        best["heldout"],
        sweep,
        lambda test: knn_predict(*bank, test.features.get(block, pooling)[0], (key[0],), (key[1],))[key],
    )


def check_labels(labels_S: Tensor, few: Sequence[float] | None) -> None:
    """Refuse labels that nothing can be learnt from, and shares of them that leave a class out.

    Raises:
        UserError: one class only, hardly any image, or a share that gives a class no label.
    """
    images, classes = len(labels_S), len(labels_S.unique())
    if classes < 2:
        raise UserError(
            f"--data: its {images:,} labelled training images are all of one class; a probe tells classes apart and "
            "needs two at least"
        )
    if images < LEAST_IMAGES:
        raise UserError(f"--data: {images} labelled training images are too few: {LEAST_IMAGES} at least are needed")
    for share in few or ():
        if not labels_to_draw(labels_S, share).any():
            raise UserError(
                f"--few-labels {share:g}: {100 * share:g} % of {images:,} labels is less than one for each of "
                f"{classes} classes: take at least {classes / images:.2g}"
            )


def choose_few(train: TrainSet, block: int, pooling: Pooling, views: int, share: float) -> list[Chosen]:
    """L-BFGS probes with a share of the labels, one for each draw.

    The decay is chosen on the same held-out images as everything: more labels than the probe itself has, for all
    encoders alike.
    """
    wanted_C = labels_to_draw(train.labels_S, share)
    found = []
    for draw in range(DRAWS):
        images = draw_labels(train.labels_S, train.fit_S, wanted_C, draw)
        rows = train.rows(block, pooling, images, views)
        probes, sweep = _sweep_decays(train, block, pooling, rows, FEW_DECAYS)
        best = best_of(sweep)
        setting = {"share": share, "labels": len(images), "draw": draw, "decay": best["decay"]}
        setting |= {"block": block, "pooling": pooling, "views": views}
        final = probes[sweep.index(best)]
        found.append(Chosen(setting, best["heldout"], sweep, _by(final, block, pooling)))
    return found
