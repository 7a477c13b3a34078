"""Augmentation of images with annotations, and the loader: no class is invented, and workers change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_data
from PIL import Image
from torchvision.transforms import InterpolationMode

from maekit.config import UserError
from maekit.data import pair_transforms
from maekit.data.annotations import VOID
from maekit.data.pair_transforms import AugmentPlan, PairBatch, augment, train_batches, whole_pairs
from maekit.data.pairs import PairPart, open_pairs
from maekit.rng import Purpose, random_bits

PLAN = AugmentPlan((24, 32))
STILL = AugmentPlan((24, 32), scale=(1.0, 1.0), flip=0.0, photometric=False, max_class_share=1.0)


def checkerboard(height: int = 40, width: int = 50, side: int = 5) -> np.ndarray[Any, Any]:
    rows, columns = np.mgrid[:height, :width] // side
    return np.where((rows + columns) % 2, 10, 0).astype(np.int16)


def pair(labels: np.ndarray[Any, Any], chans: int = 3) -> np.ndarray[Any, Any]:
    """An image that shows the classes: 20 times the id in every channel."""
    return np.repeat((labels * 20).astype(np.uint8)[:, :, None], chans, axis=2)


def invented(plan: AugmentPlan, draws: int = 40) -> set[int]:
    """Class ids that come out of the augmentation of a board of 0 and 10, but were not in it."""
    board = checkerboard()
    found: set[int] = set()
    for seed in range(draws):
        torch.manual_seed(seed)
        found |= set(augment(pair(board), board, plan)[1].unique().tolist())
    return found - {0, 10, VOID}


@pytest.mark.parametrize("plan", [PLAN, AugmentPlan((64, 64)), AugmentPlan((20, 20), short_side=37), STILL])
def test_no_class_is_invented(plan: AugmentPlan) -> None:
    assert not invented(plan)


def test_an_interpolated_annotation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with bilinear annotations there are classes between 0 and 10."""
    bilinear = InterpolationMode.BILINEAR
    modes = SimpleNamespace(BILINEAR=bilinear, NEAREST_EXACT=bilinear)
    monkeypatch.setattr(pair_transforms, "InterpolationMode", modes)
    assert invented(PLAN)


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.6, 2.0])
def test_image_and_annotation_stay_on_each_other(factor: float) -> None:
    """Each pixel still shows its own class but for a few on edges; after half a pixel's shift many would not."""
    labels = checkerboard(120, 150, 15)
    plan = AugmentPlan((60, 64), scale=(factor, factor), photometric=False, fill=(0.0,))
    for seed in range(10):
        torch.manual_seed(seed)
        image, crop = augment(pair(labels), labels, plan)
        assert image.shape == (3, 60, 64)
        assert crop.shape == (60, 64)
        assert crop.dtype == torch.int64
        assert image.dtype == torch.uint8
        known = crop != VOID
        shown = image[0].float() / 20
        off = ((shown - crop).abs() > 5) & known  # more than half of the way to the other class
        # Antialiased edges are exactly half way at some scales: a rounding's worth of them may tip.
        assert off.float().mean() < 0.01
        if factor == 1.0:
            assert not off.any()


def test_the_crop_is_cut_as_numpy_would() -> None:
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (40, 50, 3), np.uint8), rng.integers(-1, 11, (40, 50)).astype(np.int16)
    torch.manual_seed(5)
    crop, classes = augment(image, labels, STILL)
    found = [
        (top, left)
        for top in range(17)
        for left in range(19)
        if np.array_equal(image[top : top + 24, left : left + 32], crop.permute(1, 2, 0).numpy())
    ]
    assert len(found) == 1
    top, left = found[0]
    assert np.array_equal(labels[top : top + 24, left : left + 32], classes.numpy())


def test_every_place_and_both_sides_occur() -> None:
    labels = np.arange(8, dtype=np.int16)[None].repeat(4, axis=0)
    plan = AugmentPlan((4, 4), scale=(1.0, 1.0), photometric=False)
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        seen.add(tuple(augment(pair(labels), labels, plan)[1][0].tolist()))
    places = [tuple(range(left, left + 4)) for left in range(5)]
    assert seen == {*places, *(place[::-1] for place in places)}


def test_padding_is_void_and_the_mean_colour() -> None:
    labels = np.full((10, 12), 3, np.int16)
    plan = AugmentPlan((16, 20), scale=(1.0, 1.0), photometric=False, fill=(0.1, 0.5, 0.9))
    image, classes = augment(pair(labels), labels, plan)
    assert (classes[:10, :12] == 3).all()
    assert int((classes == VOID).sum()) == 16 * 20 - 10 * 12
    assert image[:, 15, 19].tolist() == [26, 128, 230]  # 25.5 and 127.5 to even, 229.5
    floats, _ = augment(pair(labels).astype(np.float32) / 255, labels, plan)
    assert floats[:, 0, 19].tolist() == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("chans", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_channels_and_types(chans: int, dtype: Any) -> None:
    board = checkerboard()
    torch.manual_seed(0)
    image, labels = augment(pair(board, chans).astype(dtype), board, AugmentPlan((64, 64), fill=(0.5,)))
    assert image.shape == (chans, 64, 64)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert labels.shape == (64, 64)


def test_colours_change_and_measurements_do_not() -> None:
    rng = np.random.default_rng(1)
    image, labels = rng.integers(0, 256, (24, 32, 3), np.uint8), np.zeros((24, 32), np.int16)
    plan = AugmentPlan((24, 32), scale=(1.0, 1.0), flip=0.0)
    measured = image.astype(np.float32)  # 0..255: not colours in 0..1
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        changed += not np.array_equal(augment(image, labels, plan)[0].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(augment(measured, labels, plan)[0].permute(1, 2, 0).numpy(), measured)
    assert 14 <= changed <= 20  # all four changes are left out in 1 of 16 samples


@pytest.mark.parametrize("value", [100, 100 / 255])
def test_brightness_moves_by_a_sum_and_by_a_factor(value: float) -> None:
    """A gray image knows neither saturation nor hue: 100 can become (100 +- 32) x 0.5 to 1.5, in either order."""
    uint8 = isinstance(value, int)
    image = np.full((4, 4, 3), value, np.uint8 if uint8 else np.float32)
    plan = AugmentPlan((4, 4), scale=(1.0, 1.0), flip=0.0)
    found = []
    for seed in range(400):
        torch.manual_seed(seed)
        drawn = augment(image, np.zeros((4, 4), np.int16), plan)[0]
        assert drawn.min() == drawn.max()
        found.append(float(drawn[0, 0, 0]) * (1 if uint8 else 255))
    moved, scaled = np.array(found), np.array(found) / 100
    assert 18 <= moved.min() < 45 and 175 < moved.max() <= 198
    assert 0.14 < np.mean((scaled < 0.68) | (scaled > 1.32)) < 0.6  # what no sum alone reaches


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    labels = np.zeros((40, 40), np.int16)
    labels[30:, 30:] = 1
    image = pair(labels)

    def mixed(share: float) -> int:
        count = 0
        for seed in range(60):
            torch.manual_seed(seed)
            plan = AugmentPlan((12, 12), scale=(1.0, 1.0), flip=0.0, photometric=False, max_class_share=share)
            count += bool(augment(image, labels, plan)[1].float().mean() >= 0.25)
        return count

    # Of 29 x 29 corners those with r x c >= 36 of 144 pixels are mixed; ten draws instead of one find them more often.
    chance = sum(r * c >= 36 for top in range(29) for left in range(29)
                 for r, c in [(max(0, top - 18), max(0, left - 18))]) / 29**2  # fmt: skip
    assert mixed(1.0) == pytest.approx(60 * chance, abs=7)
    assert mixed(0.75) > 60 * (1 - (1 - chance) ** 10) - 14
    assert mixed(0.75) > 2 * mixed(1.0)


def test_short_side_is_that_of_scale_one() -> None:
    labels = np.zeros((50, 100), np.int16)
    plan = AugmentPlan((20, 200), scale=(1.0, 1.0), short_side=20, flip=0.0, photometric=False)
    torch.manual_seed(0)
    assert augment(pair(labels), labels, plan)[1][0].tolist() == [0] * 40 + [VOID] * 160


# ---- the loader ----


@pytest.fixture
def part(tmp_path: Path) -> PairPart:
    rng = np.random.default_rng(3)
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for index in range(12):
        size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "images" / f"{index:02}.png")
        Image.fromarray(rng.integers(0, 5, size, np.uint8)).save(tmp_path / "annotations" / f"{index:02}.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd")
    return open_pairs(str(tmp_path)).train


def shares(first: int = 0) -> list[tuple[int, np.ndarray[Any, Any]]]:
    steps = [(0, [0, 5, 2]), (0, [1, 3, 11]), (1, [0, 5, 2]), (1, [4, 0, 7])]
    return [(epoch, np.array(ids)) for epoch, ids in steps[first:]]


def batches(part: PairPart, workers: int = 0, first: int = 0, seed: int = 9, **options: Any) -> list[PairBatch]:
    return list(train_batches(part, PLAN, shares(first), seed=seed, workers=workers, **options))


def same(one: PairBatch, other: PairBatch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_the_same_samples_for_any_workers_and_after_an_interruption(part: PairPart) -> None:
    alone, together = batches(part), batches(part, workers=2)
    torch.manual_seed(77)  # what else a process drew must not matter
    resumed = batches(part, first=2)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
    assert all(same(*two) for two in zip(alone[2:], resumed, strict=True))
    assert alone[0].images.shape == (3, 3, 24, 32)
    assert alone[0].labels.dtype == torch.int64


def test_epochs_and_seeds_differ_and_the_trainer_s_generator_does_not_notice(part: PairPart) -> None:
    before = torch.get_rng_state()
    one, other = batches(part), batches(part, seed=10)
    assert torch.equal(before, torch.get_rng_state())
    assert not same(one[0], other[0])
    assert not same(one[0], one[2])  # the same ids, an epoch later


def test_a_sample_s_numbers_are_its_own(part: PairPart) -> None:
    """Sample 0 of epoch 1 comes out the same beside other samples and in another place."""
    found = batches(part)
    assert torch.equal(found[2].images[0], found[3].images[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_gives_its_slot_to_the_next(part: PairPart, workers: int) -> None:
    whole = {int(i): k for k, i in enumerate(batches(part)[0].sample_ids)}
    for index in (5, 6):
        Path(part.images.path(index)).write_bytes(b"")  # type: ignore[arg-type]
    found = batches(part, workers)
    assert found[0].sample_ids.tolist() == [0, 5, 2]
    assert found[0].bad == [(5, "empty file"), (6, "empty file")]
    assert found[1].bad == []
    assert same_row(found[0], batches(part)[0], whole[0])
    # Where the stand-in is looked for among some ids only, it is 9, not 7.
    chosen = batches(part, workers, allowed=np.array([0, 1, 2, 5, 6, 9]))
    assert not torch.equal(chosen[0].images[1], found[0].images[1])
    image, labels = part.read(9)
    with torch.random.fork_rng(devices=[]):
        bits = random_bits([5], 1, seed=9, purpose=Purpose.AUGMENT, epoch=0)
        torch.manual_seed(int(bits[0, 0]) >> 1)
        assert torch.equal(chosen[0].images[1], augment(image, labels, PLAN)[0])


def same_row(one: PairBatch, other: PairBatch, row: int) -> bool:
    return torch.equal(one.images[row], other.images[row])


def test_nothing_readable_is_an_error_for_the_user(part: PairPart) -> None:
    for index in range(len(part)):
        Path(part.images.path(index)).write_bytes(b"")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"12 images in a row cannot be read, such as images/11\.png: empty file"):
        batches(part)


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_pairs_come_in_order(part: PairPart, workers: int) -> None:
    Path(part.images.path(4)).write_bytes(b"")  # type: ignore[arg-type]
    found = list(whole_pairs(part, [7, 4, 0], workers=workers))
    assert [one.sample_id for one in found] == [7, 4, 0]
    assert found[1].image is None
    assert found[1].reason == "empty file"
    image, labels = part.read(7)
    assert np.array_equal(np.asarray(found[0].image), image)
    assert np.array_equal(np.asarray(found[0].labels), labels)


def test_the_operations_draw_from_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker seeds torch: numbers from elsewhere would differ from run to run."""
    import random

    def forbidden(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("drawn from another generator")

    python, numpy = ("random", "uniform", "randint", "choice"), ("rand", "uniform", "randint", "random", "permutation")
    for module, names in ((random, python), (np.random, numpy)):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    board = checkerboard()
    for seed in range(20):
        torch.manual_seed(seed)
        augment(pair(board), board, PLAN)


def test_camvid() -> None:
    pairs = open_pairs(str(shared_data("camvid")))
    plan = AugmentPlan((240, 240))
    (batch,) = train_batches(pairs.train, plan, [(0, np.array([3, 99]))], seed=0, workers=0)
    assert batch.images.shape == (2, 3, 240, 240)
    assert set(batch.labels.unique().tolist()) <= set(range(-1, 11))
