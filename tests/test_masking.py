"""Masks: exact counts, polarity, a sample's mask is its own, the three kinds, users' masks; and the generator."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maekit.config import UserError
from maekit.models.masking import (
    MASK_KINDS,
    Masks,
    _argsort_unique,
    make_masks,
    masks_from_bool,
    masks_from_keep,
    num_visible,
)
from maekit.rng import Purpose, random_bits, shuffled, uniforms

GRIDS = [(8, 8), (3, 5), (5, 3), (1, 2), (14, 14), (1, 7), (2, 2), (16, 3)]
RATIOS = [0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.95]


def both(masks: Masks) -> tuple[list[list[int]], list[list[int]]]:
    return masks.ids_keep_BV.tolist(), masks.ids_masked_BM.tolist()


# ---- counts, order, polarity ----


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (196, 0.75, 49),
        (64, 0.9, 6),
        (196, 0.95, 9),
        (256, 0.75, 64),
        (196, 0.0, 195),  # one patch stays hidden, or there is nothing to learn
        (16, 0.0, 15),
        (2, 0.95, 1),  # one patch stays visible
        (10, 0.95, 1),
        (15, 0.75, 3),
        (2, 0.0, 1),
    ],
)
def test_number_of_visible_patches(patches: int, ratio: float, visible: int) -> None:
    """max(1, int(N (1 - ratio))), and at least one hidden."""
    assert num_visible(patches, ratio) == visible


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_masks_partition_the_grid_exactly(kind: str, grid_hw: tuple[int, int]) -> None:
    """At every ratio the counts are exact, and visible and hidden ids together are all patches once."""
    num = math.prod(grid_hw)
    for ratio in RATIOS:
        masks = make_masks(kind, grid_hw, ratio, range(20), seed=0)
        visible = num_visible(num, ratio)
        assert masks.ids_keep_BV.shape == (20, visible)
        assert masks.ids_masked_BM.shape == (20, num - visible)
        assert masks.ids_keep_BV.dtype == masks.ids_masked_BM.dtype == torch.int64
        together = torch.cat([masks.ids_keep_BV, masks.ids_masked_BM], dim=1)
        assert torch.equal(together.sort(dim=1).values, torch.arange(num).expand(20, -1))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_polarity(kind: str) -> None:
    """masked is True exactly at hidden patches."""
    masks = make_masks(kind, (4, 6), 0.75, range(8), seed=0)
    for row, keep, hidden in zip(masks.masked_BN, *both(masks), strict=True):
        assert [number for number in range(24) if row[number]] == sorted(hidden)
        assert [number for number in range(24) if not row[number]] == sorted(keep)


def test_ties_are_broken_by_index() -> None:
    """Keys that agree in all bits that count are taken in the order of the patches, on every machine."""
    keys = np.array([[9 << 40, 9 << 40, 1 << 40, (9 << 40) + 3, 2**64 - 1]], np.uint64)
    assert _argsort_unique(keys).tolist() == [[2, 0, 1, 3, 4]]
    assert _argsort_unique(np.zeros((1, 300), np.uint64)).tolist() == [list(range(300))]


# ---- a sample's mask is its own ----


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_mask_does_not_depend_on_the_batch(kind: str) -> None:
    """Alone, in another order, with other neighbours: the same mask."""
    ids = [40, 3, 17, 1_000_000_007, 0]
    keep, hidden = both(make_masks(kind, (4, 6), 0.75, ids, seed=3, epoch=2))
    for index, sample in enumerate(ids):
        assert both(make_masks(kind, (4, 6), 0.75, [sample], seed=3, epoch=2)) == ([keep[index]], [hidden[index]])
    assert both(make_masks(kind, (4, 6), 0.75, ids[::-1], seed=3, epoch=2)) == (keep[::-1], hidden[::-1])


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_part_of_the_key_matters(kind: str) -> None:
    """Another seed, epoch, view, sample or purpose gives other masks, for nearly all of 50 samples."""
    base: dict[str, Any] = {"seed": 0, "epoch": 0, "view": 0, "purpose": Purpose.MASK}
    keys: list[dict[str, Any]] = [{}, {"seed": 1}, {"epoch": 1}, {"view": 1}, {"purpose": Purpose.HELDOUT_MASK}]
    found = [make_masks(kind, (8, 8), 0.75, range(50), **{**base, **key}).masked_BN for key in keys]
    found.append(make_masks(kind, (8, 8), 0.75, range(50, 100), **base).masked_BN)
    # Grid masks at this ratio have four offsets only, so a quarter of them agree by chance.
    most_equal = 25 if kind == "grid" else 2
    for first, second in itertools.combinations(found, 2):
        assert int((first == second).all(dim=1).sum()) <= most_equal
    assert len({tuple(row) for row in found[0].tolist()}) >= (4 if kind == "grid" else 48)


# ---- the kinds ----


def test_random_masks_are_uniform() -> None:
    """Each patch is hidden, and each pair hidden together, as often as chance says, within 5 deviations."""
    samples = 4000
    masked = make_masks("random", (4, 6), 0.75, range(samples), seed=0).masked_BN.double()
    share = masked.mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / samples)
    pairs = masked.T @ masked / samples
    expected = 18 / 24 * 17 / 23
    off_diagonal = pairs[~torch.eye(24, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / samples)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_no_patch_is_always_hidden(kind: str) -> None:
    """Over many samples every patch is now visible, now hidden."""
    share = make_masks(kind, (6, 4), 0.75, range(500), seed=0).masked_BN.double().mean(dim=0)
    assert 0.3 < share.min() <= share.max() < 0.98


def test_grid_masks_leave_one_patch_in_each_cell() -> None:
    """At 0.75 on 8 x 8, one patch of every 2 x 2 cell is visible, at the sample's own offset; all four occur."""
    masked = make_masks("grid", (8, 8), 0.75, range(40), seed=0).masked_BN.reshape(40, 4, 2, 4, 2)
    visible = (~masked).permute(0, 1, 3, 2, 4).reshape(40, 16, 4)
    assert (visible.sum(dim=2) == 1).all()
    offset = visible.int().argmax(dim=2)
    assert (offset == offset[:, :1]).all()
    assert set(offset[:, 0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75])
def test_block_masks_are_blocks(ratio: float) -> None:
    """A hidden patch of a block mask has clearly more hidden neighbours than one of a random mask."""
    blocks = hidden_neighbours(make_masks("block", (14, 14), ratio, range(100), seed=0).masked_BN, (14, 14))
    scattered = hidden_neighbours(make_masks("random", (14, 14), ratio, range(100), seed=0).masked_BN, (14, 14))
    assert abs(scattered - ratio) < 0.02
    assert blocks > scattered + 0.5 * (1 - scattered)


def hidden_neighbours(masked_BN: Tensor, grid_hw: tuple[int, int]) -> float:
    """The share of the neighbours (up, down, left, right; inside the grid) of hidden patches that are hidden too."""
    grid = masked_BN.reshape(-1, *grid_hw).double()
    pairs = [(grid[:, 1:], grid[:, :-1]), (grid[:, :, 1:], grid[:, :, :-1])]
    together = sum(float(2 * (a * b).sum()) for a, b in pairs)
    return together / sum(float(a.sum() + b.sum()) for a, b in pairs)


def test_unknown_kind_and_single_patch() -> None:
    """The choices are listed; a grid of one patch cannot be masked."""
    with pytest.raises(UserError, match="--mask stripes: choose random, block, grid"):
        make_masks("stripes", (4, 4), 0.75, [0], seed=0)
    with pytest.raises(UserError, match="--patch-size"):
        make_masks("random", (1, 1), 0.75, [0], seed=0)


# ---- users' masks ----


def test_masks_from_bool() -> None:
    """True is hidden; both lists come in ascending order."""
    masks = masks_from_bool(torch.tensor([[True, False, False, True], [False, True, True, False]]))
    assert both(masks) == ([[1, 2], [0, 3]], [[0, 3], [1, 2]])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[True, False, False], [True, True, False]], "hide 1 to 2 patches"),
        ([[True, True, True]], "hides 3 of 3"),
        ([[False, False, False]], "hides 0 of 3"),
        ([[1, 0, 0]], "boolean"),
    ],
)
def test_bad_boolean_masks(rows: list[list[bool]], words: str) -> None:
    """Unequal counts, all or nothing hidden, and numbers in the place of booleans are refused with the counts."""
    with pytest.raises(UserError, match=words):
        masks_from_bool(torch.tensor(rows))


def test_masks_from_keep() -> None:
    """Visible ids keep the user's order, hidden ones ascend."""
    assert both(masks_from_keep(torch.tensor([[3, 0]]), 5)) == ([[3, 0]], [[1, 2, 4]])
    assert masks_from_keep(torch.tensor([[3, 0]], dtype=torch.int32), 5).ids_keep_BV.dtype == torch.int64


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0, 5]], "between 0 and 4"),
        ([[-1, 2]], "between 0 and 4"),
        ([[2, 2]], "twice"),
        ([[2, 2], [1, 3]], "hide|twice"),
        ([[0, 1, 2, 3, 4]], "hides 0 of 5"),
        ([[0.0, 1.0]], "integers"),
    ],
)
def test_bad_visible_ids(rows: list[list[int]], words: str) -> None:
    """Ids out of range, repeated, all visible, or not integers."""
    with pytest.raises(UserError, match=words):
        masks_from_keep(torch.tensor(rows), 5)


# ---- golden values: a run's masks are part of its format ----

GOLDEN = {
    "random": ([13, 23, 18, 5, 19, 2], [23, 12, 22, 16, 20, 5]),
    "block": ([9, 5, 11, 23, 17, 3], [11, 5, 0, 1, 7, 6]),
    "grid": ([13, 5, 15, 1, 17, 3], [22, 20, 18, 6, 8, 10]),
}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_golden_masks(kind: str) -> None:
    """The visible ids of samples 5 and 123456789 at (seed 7, epoch 3) on a 4 x 6 grid: old runs must find them."""
    masks = make_masks(kind, (4, 6), 0.75, [5, 123_456_789], seed=7, epoch=3)
    assert tuple(masks.ids_keep_BV.tolist()) == GOLDEN[kind]


# ---- the generator ----

MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def split_mix(value: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def test_reference_finaliser_is_split_mix() -> None:
    """The published first outputs of SplitMix64 for the state 0."""
    outputs = [split_mix(n * GAMMA & MASK64) for n in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("sample", [0, 5, 2**40])
def test_bits_are_split_mix_of_the_key(sample: int) -> None:
    """Seed, purpose, epoch, view and sample are hashed in this order; the n-th number is a hash of key + n gamma."""
    key = 0
    for part in (7, int(Purpose.CROP), 3, 1, sample):
        key = split_mix((key + GAMMA + part) & MASK64)
    expected = [split_mix((key + n * GAMMA) & MASK64) for n in range(1, 5)]
    assert random_bits([sample], 4, seed=7, purpose=Purpose.CROP, epoch=3, view=1)[0].tolist() == expected


def test_golden_bits() -> None:
    """Stored numbers, so that a change to both the generator and its reference is noticed as well."""
    bits = random_bits([0, 9], 2, seed=1, purpose=Purpose.MASK, epoch=2)
    assert [[hex(value) for value in row] for row in bits.tolist()] == [
        ["0x495d0f1ae7ae1ed2", "0xe914c2b3d38cfe73"],
        ["0x1261048038fb1088", "0x9f0bf72a6f0eda4a"],
    ]


def test_purposes_are_part_of_the_format() -> None:
    """The numbers behind the purposes never change."""
    assert {purpose.name: int(purpose) for purpose in Purpose if purpose <= 8} == {
        "ORDER": 1, "CROP": 2, "FLIP": 3, "MASK": 4,
        "HELDOUT_SPLIT": 5, "HELDOUT_MASK": 6, "SUBSET": 7, "TEST_SPLIT": 8,
    }  # fmt: skip


def test_uniforms_are_uniform() -> None:
    """Range, first four moments, and twenty bins of 200,000 numbers, within 5 deviations."""
    numbers = uniforms(range(2000), 100, seed=0, purpose=Purpose.CROP).ravel()
    assert numbers.min() >= 0 and numbers.max() < 1
    for power in (1, 2, 3, 4):
        mean, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs((numbers**power).mean() - mean) < 5 * math.sqrt(variance / numbers.size)
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    expected = numbers.size / 20
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_streams_are_independent() -> None:
    """Numbers of two purposes, epochs, views, seeds, neighbouring samples or places are not correlated."""
    ids, limit = range(20_000), 5 / math.sqrt(20_000)
    base = uniforms(ids, 2, seed=0, purpose=Purpose.CROP)
    others = [
        uniforms(ids, 1, seed=0, purpose=Purpose.FLIP)[:, 0],
        uniforms(ids, 1, seed=0, purpose=Purpose.MASK)[:, 0],
        uniforms(ids, 1, seed=1, purpose=Purpose.CROP)[:, 0],
        uniforms(ids, 1, seed=0, purpose=Purpose.CROP, epoch=1)[:, 0],
        uniforms(ids, 1, seed=0, purpose=Purpose.CROP, view=1)[:, 0],
        np.roll(base[:, 0], 1),
        base[:, 1],
    ]
    for other in others:
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < limit


def test_parts_of_the_key_do_not_trade_places() -> None:
    """(seed 1, epoch 2), (seed 2, epoch 1), (epoch 1, view 2)...: all different keys, so all different numbers."""
    keys = itertools.product(range(4), [Purpose.CROP, Purpose.FLIP], range(4), range(4), range(4))
    numbers = {
        int(random_bits([sample], 1, seed=seed, purpose=purpose, epoch=epoch, view=view)[0, 0])
        for seed, purpose, epoch, view, sample in keys
    }
    assert len(numbers) == 4 * 2 * 4 * 4 * 4


def test_shuffled_is_a_permutation_of_its_own() -> None:
    """All ids once, another order in each epoch and seed, and no dependence on the order that was given."""
    ids = np.arange(100, dtype=np.int64)
    first = shuffled(ids, seed=0, purpose=Purpose.ORDER)
    assert sorted(first.tolist()) == ids.tolist()
    assert first.tolist() != ids.tolist()
    assert shuffled(ids[::-1].copy(), seed=0, purpose=Purpose.ORDER).tolist() == first.tolist()
    for other in ({"seed": 1}, {"seed": 0, "epoch": 1}):
        assert shuffled(ids, purpose=Purpose.ORDER, **other).tolist() != first.tolist()
