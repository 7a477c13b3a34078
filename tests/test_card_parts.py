"""What a card is made of, against independent references: features by block, k-NN, ridge, draws, attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from rich.text import Text
from scipy.stats import binomtest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from maekit.config import PretrainConfig, UserError
from maekit.data.loader import MemoryPool
from maekit.data.parts import ArrayPart
from maekit.models.mae import MaskedAutoencoder
from maekit.training import evaluation, probes
from maekit.training.attentive import LEAST_STEPS, AttentivePool, batch_for, choose_attentive, train_attentive
from maekit.training.card import Row, line_of, seconds_of
from maekit.training.evaluation import TestImages as Images
from maekit.training.evaluation import TrainSet, choose_few, choose_linear, divide, search_blocks
from maekit.training.features import BlockFeatures, Plan, extract_blocks, of_pixels, plan_features, raw_pixels
from maekit.training.few_labels import draw_labels, labels_to_draw
from maekit.training.interval import wilson
from maekit.training.probe_choices import encoder_kind, untrained
from maekit.training.probes import knn_predict, ridge_predict
from maekit.viz.card import Curves, draw_card
from maekit.weights.store import random_model


def tiny(images: int = 10, depth: int = 3) -> tuple[MaskedAutoencoder, MemoryPool, np.ndarray]:
    """A model, and random images of its size."""
    model = random_model(tiny_config(depth=depth))
    pixels = np.random.default_rng(0).integers(0, 256, (images, 16, 24, 3), np.uint8)
    config = PretrainConfig(data="-", img_size=(16, 24), max_bad_share=1.0)
    pool = MemoryPool(ArrayPart(pixels, None, None, 3), config, torch.device("cpu"), (16, 24))
    return model, pool, pixels


def toy_labels(count: int, classes: int, width: int, distance: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    return torch.randn(count, width, generator=generator) + distance * torch.eye(width)[labels], labels


# ---- features ----


def test_features_are_those_of_timms_own_forward_pass() -> None:
    """After every block, plain and mirrored, in batches: what timm's encoder gives as intermediates."""
    model, pool, pixels = tiny()
    plan = Plan((1, 2, 3), ("mean", "cls"), torch.float32, "")
    ids = np.array([7, 2, 9, 0, 1])
    found = extract_blocks(model, pool, ids, 2, plan, mirrored=True)
    images = torch.from_numpy(pixels[ids]).permute(0, 3, 1, 2).float() / 255
    for view, shown in enumerate((images, images.flip(3))):
        with torch.no_grad():
            encoder: Any = model.encoder
            maps = encoder.forward_intermediates(
                model.normalize(shown), return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
        for block, (patches, prefix) in enumerate(maps, start=1):
            if block == 3:
                patches, prefix = model.encoder.norm(patches), model.encoder.norm(prefix)
            mean, cls = patches.mean(dim=1), prefix[:, 0]
            torch.testing.assert_close(found.get(block, "mean")[view], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.get(block, "cls")[view], cls, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found.get(block, "both", torch.tensor([3, 1]))[view], torch.cat([mean, cls], dim=1)[[3, 1]],
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip
    kept = found.kept(np.array([True, False, True, True, True]))
    assert torch.equal(kept.get(2, "cls"), found.get(2, "cls")[:, [0, 2, 3, 4]])
    assert not model.encoder.blocks[0]._forward_hooks, "no hook stays behind"


def test_the_plan_fits_the_memory() -> None:
    """1,000 views x 100 x 2 poolings are 0.8 MB a block in float32; classifiers are counted with six times as much."""
    free = {"all": 1e9, "half": (4.8e6 + 12 * 0.6e6) / 0.8, "some": (4.8e6 + 4.3 * 0.4e6) / 0.8}
    whole, half, some = (plan_features(1000, 100, 12, ("mean", "cls"), None, int(size)) for size in free.values())
    assert (whole.blocks, whole.dtype) == (tuple(range(1, 13)), torch.float32)
    assert (half.blocks, half.dtype) == (whole.blocks, torch.float16)
    assert (some.blocks, some.dtype) == ((3, 6, 9, 12), torch.float16)
    assert "do not fit" in some.reason
    assert plan_features(1000, 100, 12, ("mean",), (12, 4, 4), 10**9).blocks == (4, 12)
    many = plan_features(1000, 100, 12, ("mean", "cls"), None, int(free["half"]), classes=300)
    assert len(many.blocks) == 9  # three numbers for each class and view: 3.6 of the 7.2 MB are left, 0.4 a block
    with pytest.raises(UserError, match=r"take 0\.0 GB .* --flip no"):
        plan_features(1000, 100, 12, ("mean", "cls"), None, 4_000_000)


def test_float16_changes_little() -> None:
    model, pool, _ = tiny()
    ids = np.arange(10)
    wide, narrow = (
        extract_blocks(model, pool, ids, 4, Plan((2,), ("mean",), dtype, ""))
        for dtype in (torch.float32, torch.float16)
    )
    assert narrow.stored_LPVSD.dtype == torch.float16
    torch.testing.assert_close(narrow.get(2, "mean"), wide.get(2, "mean"), rtol=2e-3, atol=2e-3)


def test_large_pixels_are_averaged() -> None:
    """A 64 x 16 image gives 32 x 16 pixels, each the mean of two."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 16, 3), np.uint8)
    config = PretrainConfig(data="-", img_size=(64, 16), max_bad_share=1.0)
    pool = MemoryPool(ArrayPart(pixels, None, None, 3), config, torch.device("cpu"), (64, 16))
    rows = raw_pixels(pool, np.array([2, 0]), 1)
    assert rows.shape == (2, 3 * 32 * 16)
    expected = pixels[2].reshape(32, 2, 16, 3).mean(axis=1).transpose(2, 0, 1).ravel() / 255
    np.testing.assert_allclose(rows[0].numpy(), expected, atol=1e-6)


# ---- classifiers ----


def test_knn_is_scikit_learns() -> None:
    """Every neighbour count and temperature from one search, against brute force with the same weights."""
    features, labels = toy_labels(400, 5, 8, 1.5)
    train, test = features[:300], features[300:]
    found = knn_predict(train, labels[:300], test, (50, 1, 7), (0.02, 0.5))
    assert len(found) == 6
    for (k, temperature), predicted in found.items():

        def weights(distance: np.ndarray, temperature: float = temperature) -> np.ndarray:
            return np.exp((1 - distance) / temperature)

        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        theirs.fit((train - train.mean(dim=0)).double().numpy(), labels[:300].numpy())
        expected = theirs.predict((test - train.mean(dim=0)).double().numpy())
        assert (predicted.numpy() == expected).mean() >= 0.99, (k, temperature)
    assert not torch.equal(found[50, 0.5], found[1, 0.5])


def test_knn_by_a_slow_loop() -> None:
    """Small temperatures, at which exp(1 / T) has no float32, and more neighbours than there are."""
    features, labels = toy_labels(60, 3, 4, 1.0)
    train, test = features[:40].double(), features[40:].double()
    predicted = knn_predict(features[:40], labels[:40], features[40:], (100,), (0.01,))[100, 0.01]
    centre = train.mean(dim=0)
    for row, ours in zip(test - centre, predicted.tolist(), strict=True):
        votes = [0.0, 0.0, 0.0]
        for other, label in zip(train - centre, labels.tolist(), strict=False):
            votes[label] += math.exp(float(row @ other / row.norm() / other.norm()) / 0.01)
        assert votes.index(max(votes)) == ours


def test_ridge_is_scikit_learns() -> None:
    """A strength s is their alpha of s x samples, on standardised features."""
    features, labels = toy_labels(2300, 4, 10, 1.0)
    features = features @ torch.eye(10).cumsum(dim=0) * torch.logspace(-2, 2, 10) + 3
    train, test = features[:300], features[300:]
    mean, deviation = train.mean(dim=0), train.std(dim=0)
    for strength, predicted in ridge_predict(train, labels[:300], 4, test, (1e-3, 0.1, 10.0)).items():
        theirs = RidgeClassifier(alpha=strength * 300)
        theirs.fit(((train - mean) / deviation).numpy(), labels[:300].numpy())
        expected = theirs.predict(((test - mean) / deviation).numpy())
        assert (predicted.numpy() == expected).mean() >= 0.999
        assert 0.3 < (predicted == labels[300:]).float().mean() < 0.95


@pytest.mark.parametrize(("right", "count"), [(0, 10), (8, 10), (10, 10), (4433, 10_000)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_attentive_pooling_is_torchs_attention() -> None:
    """The folded query and values are multi-head attention with one learned query, on tokens that were normalised."""
    torch.manual_seed(0)
    width, heads, tokens = 12, 3, torch.randn(5, 7, 12)
    theirs = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    query = torch.randn(1, 1, width)
    to_query, to_key, to_value = theirs.in_proj_weight.detach().chunk(3)
    asked_HE = (to_query @ query[0, 0]).view(heads, 4) / math.sqrt(4)
    ours = AttentivePool(width, heads)
    ours.query_HD.data = torch.einsum("he,hed->hd", asked_HE, to_key.view(heads, 4, width))
    ours.value_HDE.data = to_value.view(heads, 4, width).transpose(1, 2)
    normal = nn.functional.layer_norm(tokens, (width,))
    expected, _ = theirs(query.expand(5, 1, width), normal, normal)
    torch.testing.assert_close(theirs.out_proj(ours(tokens)), expected[:, 0], rtol=1e-4, atol=1e-5)


def bright_set(images: int = 160) -> tuple[MaskedAutoencoder, MemoryPool, TrainSet]:
    """Two classes by the brightness of one corner; features of both blocks."""
    model = random_model(tiny_config())
    pixels = np.random.default_rng(0).integers(0, 100, (images, 16, 24, 3), np.uint8)
    labels = torch.arange(images) % 2
    pixels[labels.numpy() == 1, 4:8, 4:8] += 120
    config = PretrainConfig(data="-", img_size=(16, 24), max_bad_share=1.0)
    pool = MemoryPool(ArrayPart(pixels, None, None, 3), config, torch.device("cpu"), (16, 24))
    ids = np.arange(images)
    features = extract_blocks(model, pool, ids, 64, Plan((1, 2), ("mean", "cls"), torch.float32, ""), mirrored=True)
    return model, pool, divide(features, labels, ids)


def test_an_attentive_probe_finds_the_patch_that_counts(tmp_path: Path) -> None:
    """With tokens in memory and with tokens computed anew: the same choice, up to float16, and nearly all right."""
    model, pool, train = bright_set()
    ids = np.arange(160)
    kept, anew = (
        choose_attentive(model, pool, ids, train, epochs=15, batch_size=64, free=free) for free in (10**9, 1000)
    )
    assert (kept.setting["tokens"], anew.setting["tokens"]) == ("kept in float16", "computed anew")
    assert min(kept.heldout, anew.heldout) >= 0.9
    for one, other in zip(kept.sweep, anew.sweep, strict=True):
        assert one["lr"] == other["lr"]
        assert abs(one["heldout"] - other["heldout"]) <= 0.2

    def tokens() -> list[Tensor]:
        with torch.no_grad():
            return [model.encode(model.normalize(batch.images), "tokens") for batch in pool.eval_batches(ids, 50)]

    assert (kept.predict(Images(train.features, tokens)) == train.labels_S).float().mean() > 0.9


@pytest.mark.parametrize("epochs", [4, 40])
def test_few_steps_leave_no_first_statistics_in_an_attentive_probe(epochs: int) -> None:
    """Tokens far from mean 0 and variance 1: after 12 steps a quarter of those would be left, after 120 nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = 5 + 3 * torch.randn(96, 6, 8, generator=generator), torch.arange(96) % 3

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
        return ((tokens[some], labels[some]) for some in order.split(32))

    (probe,) = train_attentive(batches, 3, 8, 2, 3, epochs, torch.device("cpu"), rates=(1e-3,))
    with torch.no_grad():
        gathered = probe.pool(tokens)
    mean, running = probe.norm.running_mean, probe.norm.running_var
    assert mean is not None and running is not None
    torch.testing.assert_close(mean, gathered.mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close(running, gathered.var(dim=0), atol=0.05, rtol=0.15)


def test_a_classifiers_floor_has_the_positions_that_it_began_with() -> None:
    model = random_model(tiny_config(pos_embed="learned"))
    assert untrained(model).pos_embed == "learned"
    model.passport = dataclasses.replace(model.passport, kind="classifier")
    assert untrained(model).pos_embed == "sincos"
    assert encoder_kind(model) == encoder_kind(random_model(tiny_config(pos_embed="sincos")))


# ---- what is chosen on ----


def test_few_labels_are_all_that_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrambled labels of all other images change no probe; held-out images are never drawn."""
    _, _, train = bright_set()
    monkeypatch.setattr(evaluation, "FEW_DECAYS", (1e-3, 1e-1))
    found = choose_few(train, 2, "mean", 1, 0.1)
    assert [one.setting["labels"] for one in found] == [16, 16, 16]
    drawn = draw_labels(train.labels_S, train.fit_S, labels_to_draw(train.labels_S, 0.1), 1)
    assert not set(drawn.tolist()) & set(train.held_S.tolist())
    other = train.labels_S.clone()
    rest = torch.ones(160, dtype=torch.bool)
    rest[drawn] = False
    rest[train.held_S] = False
    other[rest] = 1 - other[rest]
    images = Images(train.features, list)
    again = TrainSet(train.features, other, 2, train.fit_S, train.held_S, train.search_S, train.queries_S)
    monkeypatch.setattr(evaluation, "draw_labels", lambda *_: drawn)
    monkeypatch.setattr(evaluation, "DRAWS", 1)
    one, two = (choose_few(data, 2, "mean", 1, 0.1)[0] for data in (train, again))
    assert torch.equal(one.predict(images), two.predict(images))


@pytest.mark.parametrize(
    ("shares", "tried", "chosen"),
    [((0.5, 0.6, 0.55, 0.6, 0.9), 4, 1), ((0.5, 0.6, 0.55, 0.7, 0.6), 5, 3), ((0.1, 0.2, 0.3, 0.4, 0.5), 5, 4)],
)
def test_weaker_decays_are_tried_until_two_do_not_help(
    shares: tuple[float, ...], tried: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, train = bright_set()
    heldout = dict(zip(evaluation.DECAYS, shares, strict=True))
    monkeypatch.setattr(probes.LinearProbe, "accuracy", lambda probe, *_: heldout[probe.decay])
    found = choose_linear(train, 2, "mean", 1)
    assert [entry["decay"] for entry in found.sweep] == list(evaluation.DECAYS[:tried])
    assert found.setting["decay"] == evaluation.DECAYS[chosen]
    assert list(evaluation.DECAYS) == sorted(evaluation.DECAYS, reverse=True)


def test_the_parts_of_the_training_split() -> None:
    """A tenth is held out, at most 10,000 others search; ids decide, not places."""
    ids = np.arange(40_000, dtype=np.int64)
    train = divide(of_pixels(torch.zeros(40_000, 1)), torch.arange(40_000) % 2, ids)
    assert (len(train.held_S), len(train.fit_S), len(train.search_S)) == (4000, 36_000, 10_000)
    assert not set(train.held_S.tolist()) & set(train.fit_S.tolist())
    assert set(train.search_S.tolist()) <= set(train.fit_S.tolist())
    back = divide(of_pixels(torch.zeros(40_000, 1)), torch.arange(40_000) % 2, ids[::-1].copy())
    assert torch.equal(back.held_S, 39_999 - train.held_S.flip(0))


def test_k_nn_is_chosen_on_images_of_every_class() -> None:
    """Folders come class by class, so the first held-out images are of the first classes only."""
    labels = torch.arange(40_000) // 4000
    train = divide(of_pixels(torch.zeros(40_000, 1)), labels, np.arange(40_000, dtype=np.int64))
    assert len(train.queries_S) == evaluation.KNN_QUERIES
    assert set(train.queries_S.tolist()) <= set(train.held_S.tolist())
    assert torch.bincount(labels[train.queries_S], minlength=10).min() > 120


def test_a_scored_choice_predicts_no_more() -> None:
    _, _, train = bright_set()
    chosen = choose_linear(train, 2, "mean", 1).scored()
    with pytest.raises(AssertionError, match="scored once"):
        chosen.predict(Images(train.features, list))


def test_few_images_make_small_batches_for_the_attentive_probe() -> None:
    """Batches of digits (1,294) have 500 steps or are of 32; CIFAR-10's 45,000 images need nothing of the kind."""
    assert [batch_for(images, 10) for images in (45_000, 5_400, 1_294, 20)] == [256, 64, 32, 20]
    assert 5_400 // 64 * 10 >= LEAST_STEPS > 5_400 // 128 * 10


def test_a_name_is_no_markup() -> None:
    setting = {"block": 1, "pooling": "mean"}
    probes: dict[str, Any] = {name: [SimpleNamespace(setting=setting)] for name in ("linear", "knn")}
    row = Row("runs/exp[lr=1e-3]", 8, "", [], [], probes, {}, {})
    assert Text.from_markup(line_of(row, [], 10)[0]).plain == "runs/exp[lr=1e-3]"


def test_the_search_finds_the_good_block() -> None:
    """Features that tell the classes only after block 2, in the class token."""
    good, labels = toy_labels(300, 2, 6, 4.0)
    noise = torch.randn(3, 300, 6, generator=torch.Generator().manual_seed(3))
    stored = torch.stack([torch.stack([noise[0], noise[1]]), torch.stack([noise[2], good])])[:, :, None]
    train = divide(BlockFeatures(stored, (1, 2), ("mean", "cls")), labels, np.arange(300))
    found = {(entry["block"], entry["pooling"]): entry for entry in search_blocks(train, train.features.blocks)}
    assert len(found) == 6
    assert min(found[2, "cls"]["linear"], found[2, "both"]["linear"], found[2, "cls"]["knn"]) > 0.9
    assert max(found[1, "both"]["linear"], found[2, "mean"]["linear"], found[1, "cls"]["knn"]) < 0.8


def test_the_picture_takes_any_names(tmp_path: Path) -> None:
    """Dollars and long paths; one block; and pixels alone."""
    entries = [{"block": 1, "pooling": "mean", "linear": 0.5, "knn": 0.4}]
    pixels = [{"block": 0, "pooling": "mean", "linear": 0.3, "knn": 0.2}]
    curves = [Curves("a/$x$_" * 30, entries), Curves("random", entries, floor=True), Curves("pixels", pixels)]
    draw_card(curves, tmp_path / "card.png", title="$data_", note="n")
    draw_card(curves[2:], tmp_path / "pixels.png", title="t", note="")
    assert (tmp_path / "card.png").stat().st_size > 10_000


def test_a_rows_seconds_are_told_without_what_took_none() -> None:
    row = Row("mine", 8, "", [], [], {}, {}, {"search": 3.4, "knn": 0.2, "linear": 12.0})
    assert seconds_of(row) == "mine: 16 s (search 3, linear 12)"
