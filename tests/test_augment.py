"""Augmentation of labelled images: shifts against NumPy's padding, and each image's randomness is its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from maekit.config import PretrainConfig
from maekit.data.augment import Augment
from maekit.data.labelled import open_augmented, take_good_slots, why_no_colours
from maekit.data.order import Batch
from maekit.data.parts import ArrayPart
from maekit.data.transforms import apply_to_batch, apply_to_image, random_crops
from maekit.runtime import Choice
from maekit.seeding import own_generators

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 10, 3), np.uint8)
FEW = 24


def test_a_shift_shows_a_mirrored_edge() -> None:
    config = PretrainConfig(data="-", img_size=(8, 10), crop="pad-crop", pad=3)
    crops = random_crops(config, np.tile([[8, 10]], (64, 1)), np.arange(64), epoch=1)
    assert {int(one) for one in crops.offset.flatten()} == set(range(-3, 4))
    whole = apply_to_batch(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), crops, (8, 10))
    for index, (y, x) in enumerate(crops.offset + 3):
        padded = np.pad(IMAGES[index], ((3, 3), (3, 3), (0, 0)), mode="reflect")
        cut = padded[y : y + 8, x : x + 10]
        expected = torch.from_numpy((cut[:, ::-1] if crops.flip[index] else cut).copy()).permute(2, 0, 1)
        assert torch.equal(apply_to_image(IMAGES[index], crops, index, (8, 10)), expected)
        torch.testing.assert_close(whole[index], expected / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n3", "augmix-m5-w4", "original-mstd0.5", "3a", ""]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_changes_an_image_by_its_key_alone(policy: str, channels: int) -> None:
    augment = Augment(policy, 0.0 if policy else 0.4, (8, 10), (0.0,) * channels, seed=5)
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)[:FEW, :channels]
    keys = augment.keys(np.arange(FEW), epoch=2)
    with own_generators():
        one = [augment(image, key) for image, key in zip(images, keys, strict=True)]
        again = [augment(images[index], keys[index]) for index in reversed(range(FEW))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(image.shape == images[0].shape and image.dtype == torch.uint8 for image in one)
    assert sum(not torch.equal(a, b) for a, b in zip(one, images, strict=True)) > FEW // 3
    with own_generators():
        other = [augment(image, key) for image, key in zip(images, augment.keys(np.arange(FEW), epoch=3), strict=True)]
    assert sum(not torch.equal(a, b) for a, b in zip(one, other, strict=True)) > FEW // 3


def test_batches_do_not_depend_on_the_number_of_processes_nor_touch_the_generators() -> None:
    labels = np.zeros(64, np.int64)
    part = ArrayPart(IMAGES, labels, ["a"], 3)
    config = PretrainConfig(data="-", img_size=(8, 10), crop="pad-crop", workers=0)
    augment = Augment("rand-m9-mstd0.5-inc1", 0.2, (8, 10), (0.5,) * 3, seed=0)
    shares = [(0, np.arange(20)), (1, np.arange(40, 64)), (1, np.array([3, 1, 2]))]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    found = []
    for workers in (0, 2):
        pool, in_memory = open_augmented(part, config, CPU, Choice(workers, ""), augment)
        assert in_memory.value
        found.append([batch.images for batch in pool.train_batches(iter(shares))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    plain = next(iter(open_augmented(part, config, CPU, Choice(0, ""), None)[0].eval_batches(np.arange(5), 5)))
    augmented = next(iter(open_augmented(part, config, CPU, Choice(0, ""), augment)[0].eval_batches(np.arange(5), 5)))
    assert torch.equal(plain.images, augmented.images), "evaluation is never augmented"


def test_a_slot_that_cannot_be_read_takes_the_next_good_one_with_its_label() -> None:
    batch = Batch(torch.arange(5.0).reshape(5, 1, 1, 1), np.array([7, 3, 9, 4, 8]), [])
    images, ids, any_good = take_good_slots(batch, {3: "bad", 9: "bad", 8: "bad", 100: "elsewhere"})
    assert (images.flatten().tolist(), ids.tolist(), any_good) == ([0, 3, 3, 3, 0], [7, 4, 4, 4, 7], True)
    assert take_good_slots(batch, {})[1] is batch.sample_ids
    assert take_good_slots(batch, dict.fromkeys([7, 3, 9, 4, 8], "bad"))[2] is False


def test_images_whose_colours_cannot_be_changed_are_told_apart() -> None:
    assert "have 5 channels" in why_no_colours(ArrayPart(np.zeros((4, 8, 8, 5), np.uint8), None, None, 5), np.arange(4))
    assert why_no_colours(ArrayPart(IMAGES, None, None, 3), np.arange(4)) == ""

    class Deep(ArrayPart):
        def read(self, index: int, look: object = None) -> np.ndarray:
            return np.zeros((8, 8, 3), np.float32)

    assert why_no_colours(Deep(IMAGES, None, None, 3), np.arange(4)) == "row 0 has more"


# ---- shears, shifts and rotations of images whose colours cannot be changed ----


def augmented(augment: Augment, images: torch.Tensor) -> torch.Tensor:
    with own_generators():
        keys = augment.keys(np.arange(len(images)), epoch=2)
        return torch.stack([augment(image, key) for image, key in zip(images, keys, strict=True)])


def test_pixels_are_moved_as_often_and_as_far_as_those_of_photographs() -> None:
    """Where timm draws no change of colour, the whole policy and its geometric part do the same, and not by doing
    nothing; where it draws one, the geometric part leaves it out."""
    gray = torch.from_numpy(IMAGES[..., :1]).permute(0, 3, 1, 2)
    whole, moved = (
        augmented(Augment("rand-m9-mstd0.5-inc1", 0.0, (8, 10), (0.5,), seed=5, geometric=only), gray)
        for only in (False, True)
    )
    same = (whole == moved).flatten(1).all(dim=1)
    still = (moved == gray).flatten(1).all(dim=1)
    assert int((same & ~still).sum()) >= 5, "moved by both"
    assert int((~same & still).sum()) >= 5, "a colour changed by one"


def test_every_channel_is_moved_alike_and_uncovers_its_mean() -> None:
    """Channels that are linear in each other, their means too, stay so; of one value, they stay what they are."""
    base = torch.from_numpy(IMAGES[:FEW, ..., :1]).permute(0, 3, 1, 2).float() / 255
    factor, offset = (torch.tensor(values).view(1, 5, 1, 1) for values in ([1.0, -2, 40, 0, 0], [0.0, 7, -900, 3, 0]))
    mean = (0.25 * factor + offset).flatten().tolist()
    augment = Augment("rand-m9-n4-p1-inc1", 0.0, (8, 10), mean, seed=1)
    images = base * factor + offset
    found = augmented(augment, images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, found[:, :1] * factor + offset, rtol=1e-4, atol=1e-3)
    changed = (found != images).flatten(2).any(dim=2)
    assert changed[:, 0].sum() > FEW // 2
    assert not changed[:, 3:].any()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_any_type_and_any_number_of_channels_can_be_changed(policy: str, dtype: torch.dtype) -> None:
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)[:FEW].repeat(1, 2, 1, 1)[:, :5].to(dtype)
    found = augmented(Augment(policy, 0.0, (8, 10), (0.5,) * 5, seed=5), images)
    assert (found.dtype, found.shape) == (dtype, images.shape)
    moves = policy.startswith(("rand", "original"))
    assert bool((found != images).any()) == moves
