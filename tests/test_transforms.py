"""Crops, flips and resizing: where they are cut, and that pixels are those of Pillow and torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

from maekit.config import PretrainConfig
from maekit.data import memory
from maekit.data.loader import open_pool
from maekit.data.parts import ArrayPart
from maekit.data.sources import open_source
from maekit.data.transforms import Crops, apply_to_batch, apply_to_image, centre_crops, random_crops
from maekit.runtime import Choice

Sizes = npt.NDArray[np.int64]


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig(**{"img_size": (16, 24), **changes})


def sizes(height: int, width: int, count: int) -> Sizes:
    return np.tile(np.array([[height, width]], np.int64), (count, 1))


def fields(crops: Crops, rows: Any = slice(None)) -> list[list[Any]]:
    return [value[rows].tolist() for value in (crops.start, crops.length, crops.scale, crops.offset, crops.flip)]


def calm_images(batch: int, channels: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Noise that leaves bicubic's overshoot room, so that rounding is all that 8-bit pipelines add."""
    return np.random.default_rng(0).integers(64, 192, (batch, height, width, channels), dtype=np.uint8)


def as_batch(images_BHWC: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(images_BHWC.transpose(0, 3, 1, 2).copy())


# ---- where ----


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 333), (37, 41)])
def test_random_boxes_obey_their_limits(height: int, width: int) -> None:
    """Inside the image, a share of the area within the scale, an aspect within 3/4 to 4/3, but for whole pixels."""
    crops = random_crops(config(crop_scale=(0.2, 0.8)), sizes(height, width, 500), range(500), epoch=0)
    assert (crops.start >= 0).all() and (crops.length >= 1).all()
    assert (crops.start + crops.length <= (height, width)).all()
    tall, wide = crops.length[:, 0], crops.length[:, 1]
    assert ((tall - 0.5) * (wide - 0.5) <= 0.8 * height * width).all()
    assert ((tall + 0.5) * (wide + 0.5) >= 0.2 * height * width).all()
    assert ((wide - 0.5) / (tall + 0.5) <= 4 / 3).all()
    assert ((wide + 0.5) / (tall - 0.5) >= 3 / 4).all()
    assert np.array_equal(crops.scale, crops.length / np.array([16, 24]))
    assert not crops.offset.any()
    assert len(set(tall.tolist())) > 10 and len(set(crops.start[:, 0].tolist())) > 8


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    """Mean and spread of area share, aspect and place agree with RandomResizedCrop over 3000 boxes."""
    height, width, count = 300, 400, 3000
    crops = random_crops(config(), sizes(height, width, count), range(count), epoch=0)
    ours = np.concatenate([crops.start, crops.length], axis=1).astype(float)
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    for measure in (
        lambda box: box[:, 2] * box[:, 3] / (height * width),
        lambda box: np.log(box[:, 3] / box[:, 2]),
        lambda box: (box[:, 0] + box[:, 2] / 2) / height,
        lambda box: (box[:, 1] + box[:, 3] / 2) / width,
    ):
        first, second = measure(ours), measure(np.array(boxes, float))
        assert abs(first.mean() - second.mean()) < 5 * second.std() * math.sqrt(2 / count)
        assert abs(first.std() / second.std() - 1) < 0.08


def test_random_boxes_and_flips_are_independent_and_uniform() -> None:
    """Area share uniform, log aspect uniform (wide as often as tall), place uniform, the flip tied to none of them."""
    count = 20_000
    crops = random_crops(config(crop_scale=(0.2, 0.3)), sizes(2000, 2000, count), range(count), epoch=0)
    tall, wide = crops.length.astype(float).T
    places = (crops.start / (2000 - crops.length)).T
    half = math.log(4 / 3)
    uniform = [(tall * wide / 2000**2 - 0.2) / 0.1, (np.log(wide / tall) + half) / (2 * half), *places]
    for values in uniform:
        assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * count)
        assert abs(values.var() * 12 - 1) < 0.04
    related = np.corrcoef([*uniform, crops.flip])
    assert np.abs(related - np.eye(5)).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("crop", ["random-resized", "resize-crop", "none"])
def test_a_crop_is_the_samples_own(crop: str) -> None:
    """The same alone, in any order, among images of any size; another one in another epoch, view or seed."""
    ids = [9, 2, 77, 500]
    shapes = np.array([[30, 40], [64, 20], [25, 25], [100, 31]], np.int64)
    settings = config(crop=crop)
    together = random_crops(settings, shapes, ids, epoch=1)
    for index, sample in enumerate(ids):
        alone = random_crops(settings, shapes[index : index + 1], [sample], epoch=1)
        assert fields(alone) == fields(together, slice(index, index + 1))
    backwards = random_crops(settings, shapes[::-1], ids[::-1], epoch=1)
    assert fields(backwards, slice(None, None, -1)) == fields(together)
    many, ids = sizes(40, 50, 50), list(range(50))
    base = fields(random_crops(settings, many, ids, epoch=1))
    assert fields(random_crops(settings, many, ids, epoch=1)) == base
    assert fields(random_crops(settings, many, ids, epoch=2)) != base
    assert fields(random_crops(settings, many, ids, epoch=1, view=1)) != base
    assert fields(random_crops(config(crop=crop, seed=1), many, ids, epoch=1)) != base


def test_half_are_flipped() -> None:
    """Each image with probability 1/2, a new draw each epoch; none without --flip."""
    many, ids = sizes(20, 20, 4000), range(4000)
    first = random_crops(config(), many, ids, epoch=0).flip
    second = random_crops(config(), many, ids, epoch=1).flip
    for flips in (first, first ^ second):
        assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert not random_crops(config(flip=False), many, ids, epoch=0).flip.any()


@pytest.mark.parametrize(
    ("shape", "start", "length"),
    [((1, 1000), (0, 499), (1, 1)), ((1000, 1), (499, 0), (1, 1)), ((9, 3000), (0, 1494), (9, 12))],
)
def test_extreme_shapes_fall_back_to_the_centre(
    shape: tuple[int, int], start: tuple[int, int], length: tuple[int, int]
) -> None:
    """Where none of ten boxes fits, the largest centred box of allowed aspect is taken."""
    crops = random_crops(config(), sizes(*shape, 3), range(3), epoch=0)
    assert crops.start.tolist() == [list(start)] * 3
    assert crops.length.tolist() == [list(length)] * 3
    assert apply_to_batch(torch.zeros(3, 1, *shape), crops, (16, 24)).shape == (3, 1, 16, 24)
    assert apply_to_image(np.zeros((*shape, 1), np.uint8), crops, 0, (16, 24)).shape == (1, 16, 24)


def test_a_single_pixel() -> None:
    """The smallest image becomes a flat one, under each crop."""
    for crop in ("random-resized", "resize-crop", "none"):
        crops = random_crops(config(crop=crop), sizes(1, 1, 2), range(2), epoch=0)
        out = apply_to_batch(torch.full((2, 3, 1, 1), 51, dtype=torch.uint8), crops, (16, 24))
        torch.testing.assert_close(out, torch.full((2, 3, 16, 24), 0.2))


@pytest.mark.parametrize(
    ("shape", "resized", "offset"),
    [
        ((32, 49), (16, 24), (0, 0)),
        ((33, 60), (16, 29), (0, 2)),
        ((41, 24), (41, 24), (12, 0)),
        ((7, 5), (33, 24), (8, 0)),
    ],
)
def test_centre_crops(shape: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int]) -> None:
    """The image just covers the output, its aspect kept to a pixel, and the cut is in the middle (to an even place)."""
    crops = centre_crops(sizes(*shape, 1), (16, 24))
    assert np.allclose(crops.scale[0], np.array(shape) / resized)
    assert crops.offset[0].tolist() == list(offset)
    assert crops.length[0].tolist() == list(shape) and not crops.start.any() and not crops.flip.any()
    assert fields(random_crops(config(crop="none", flip=False), sizes(*shape, 1), [3], epoch=0)) == fields(crops)


def test_centre_crop_cuts_the_middle() -> None:
    """Where the image is not scaled, the centre's pixels come out bit-exact; an odd rest goes to the far side."""
    image = torch.randint(0, 256, (1, 3, 16, 29), dtype=torch.uint8)
    out = apply_to_batch(image, centre_crops(sizes(16, 29, 1), (16, 24)), (16, 24))
    assert torch.equal(out, image[..., 2:26].float() / 255)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(40, 61), (57, 40), (50, 73), (31, 45), (28, 28), (20, 23)])
def test_evaluation_sees_what_torchvisions_pipeline_shows(shape: tuple[int, int], crop_pct: float) -> None:
    """Resize and CenterCrop, as the official code scores (256 and 224 px: 0.875), to a level of the 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    steps = Compose([Resize(int(28 / crop_pct), InterpolationMode.BICUBIC), CenterCrop(28)])
    theirs = np.array(steps(Image.fromarray(pixels)), np.int64)
    crops = centre_crops(sizes(*shape, 1), (28, 28), "bicubic", crop_pct)
    ours = apply_to_image(pixels, crops, 0, (28, 28)).permute(1, 2, 0).numpy().astype(np.int64)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_pools_show_the_share_that_evaluation_sees(in_memory: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    wanted = apply_to_image(pixels, centre_crops(sizes(40, 61, 1), (28, 28), "bicubic", 0.7), 0, (28, 28))
    reading = config(data=str(tmp_path), img_size=(28,), crop_pct=0.7, in_memory=in_memory)
    pool, _ = open_pool(open_source(str(tmp_path)).train, reading, torch.device("cpu"), Choice(0, ""))
    (batch,) = pool.eval_batches(np.array([0]), 1)
    shown = batch.images[0] if batch.images.dtype == torch.uint8 else batch.images[0] * 255
    assert float((shown.float() - wanted.float()).abs().max()) <= 1


def test_resize_crop_moves_within_the_slack() -> None:
    """The shorter side becomes --resize-to; every place of the cut occurs and none leaves the image."""
    crops = random_crops(config(crop="resize-crop", resize_to=30), sizes(60, 80, 2000), range(2000), epoch=0)
    assert np.allclose(crops.scale, 2)
    for axis, slack in ((0, 30 - 16), (1, 40 - 24)):
        assert set(crops.offset[:, axis].tolist()) == set(range(slack + 1))
    default = random_crops(config(crop="resize-crop"), sizes(60, 80, 1), [0], epoch=0)
    assert np.allclose(default.scale, 60 / 27, atol=0.01)  # 24 x 9 / 8 = 27 for the shorter side


# ---- pixels ----


def pillow(image_HWC: npt.NDArray[np.uint8], crops: Crops, index: int, size_hw: tuple[int, int]) -> Tensor:
    """Pillow's way: crop the box, resize it, cut, mirror; one channel at a time."""
    (top, left), (tall, wide) = crops.start[index].tolist(), crops.length[index].tolist()
    high, across = np.rint(crops.length[index] / crops.scale[index]).astype(int).tolist()
    y, x = crops.offset[index].tolist()
    planes = []
    for channel in range(image_HWC.shape[2]):
        plane = Image.fromarray(image_HWC[..., channel]).crop((left, top, left + wide, top + tall))
        plane = plane.resize((across, high), Image.Resampling.BICUBIC).crop((x, y, x + size_hw[1], y + size_hw[0]))
        planes.append(np.asarray(plane)[:, ::-1] if crops.flip[index] else np.asarray(plane))
    return torch.from_numpy(np.stack(planes)).float() / 255


@pytest.mark.parametrize("crop", ["random-resized", "resize-crop", "none"])
@pytest.mark.parametrize(
    ("shape", "size_hw"),
    [((40, 56), (16, 24)), ((20, 17), (32, 24)), ((64, 30), (28, 28)), ((30, 90), (8, 8))],
    ids=["down", "up", "both", "far-down"],
)
def test_batches_are_pillows(crop: str, shape: tuple[int, int], size_hw: tuple[int, int]) -> None:
    """Cropped, scaled and flipped in batch as Pillow does one by one, but for its rounding to 8 bits in between."""
    images = calm_images(12, 3, *shape)
    crops = random_crops(config(crop=crop, img_size=size_hw), sizes(*shape, 12), range(12), epoch=0)
    assert 0 < crops.flip.sum() < 12
    out = apply_to_batch(as_batch(images), crops, size_hw)
    expected = torch.stack([pillow(images[i], crops, i, size_hw) for i in range(12)])
    difference = (out - expected).abs() * 255
    assert difference.max() < 2
    assert difference.mean() < 0.6


@pytest.mark.parametrize("crop", ["random-resized", "resize-crop", "none"])
@pytest.mark.parametrize(("shape", "size_hw"), [((40, 56), (16, 24)), ((20, 17), (32, 24)), ((97, 31), (28, 28))])
def test_one_image_and_a_batch_are_the_same(crop: str, shape: tuple[int, int], size_hw: tuple[int, int]) -> None:
    """The path of large photographs and that of small data sets give the same pixels within 8-bit rounding."""
    images = calm_images(12, 3, *shape)
    crops = random_crops(config(crop=crop, img_size=size_hw), sizes(*shape, 12), range(12), epoch=3)
    out = apply_to_batch(as_batch(images), crops, size_hw)
    for index in range(12):
        one = apply_to_image(images[index], crops, index, size_hw)
        assert one.dtype == torch.uint8 and one.shape == (3, *size_hw)
        assert (one.float() - out[index] * 255).abs().max() < 1.5


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_8_bit_pixels_take_torchs_fast_path(channels: int) -> None:
    """It is the one that leaves channels last in memory, so that a batch is filled by plain copies."""
    images = calm_images(2, channels, 40, 56)
    crops = random_crops(config(), sizes(40, 56, 2), range(2), epoch=0)
    for index in range(2):
        pixels_STC = apply_to_image(images[index], crops, index, (16, 24)).permute(1, 2, 0)
        assert pixels_STC.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_floats_equal_torchs_antialiased_bicubic(channels: int) -> None:
    """Float data of any range and channels: no clipping, and the filter is torch's to 1e-4 of the range."""
    generator = np.random.default_rng(1)
    images = (generator.random((6, 30, 44, channels)) * 8 - 3).astype(np.float32)
    crops = random_crops(config(), sizes(30, 44, 6), range(6), epoch=0)
    out = apply_to_batch(as_batch(images), crops, (16, 24))
    assert out.dtype == torch.float32 and out.min() < -0.5 and out.max() > 1.5
    for index in range(6):
        (top, left), (tall, wide) = crops.start[index].tolist(), crops.length[index].tolist()
        box = as_batch(images)[index : index + 1, :, top : top + tall, left : left + wide]
        expected = F.interpolate(box, (16, 24), mode="bicubic", antialias=True, align_corners=False)[0]
        expected = expected.flip(2) if crops.flip[index] else expected
        assert (out[index] - expected).abs().max() < 8e-4
        one = apply_to_image(images[index], crops, index, (16, 24))
        assert one.dtype == torch.float32
        assert (one - expected).abs().max() < 8e-4


@pytest.mark.parametrize("channels", [1, 5, 11])
def test_any_number_of_channels(channels: int) -> None:
    """Grayscale and many channels go through both paths, each channel as if alone."""
    images = calm_images(4, channels, 20, 30)
    crops = random_crops(config(), sizes(20, 30, 4), range(4), epoch=0)
    out = apply_to_batch(as_batch(images), crops, (16, 24))
    assert out.shape == (4, channels, 16, 24)
    for channel in range(channels):
        alone = apply_to_batch(as_batch(images[..., channel : channel + 1]), crops, (16, 24))
        torch.testing.assert_close(out[:, channel : channel + 1], alone)
        one = apply_to_image(np.ascontiguousarray(images[0, ..., channel : channel + 1]), crops, 0, (16, 24))
        assert torch.equal(apply_to_image(images[0], crops, 0, (16, 24))[channel : channel + 1], one)


def test_8_bit_overshoot_is_clipped() -> None:
    """A black and white edge overshoots under bicubic: the result stays in 0..1 and reaches both."""
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    out = apply_to_batch(edge, centre_crops(sizes(8, 8, 1), (32, 32)), (32, 32))
    assert out.min() == 0 and out.max() == 1
    raw = apply_to_batch(edge.float() / 255, centre_crops(sizes(8, 8, 1), (32, 32)), (32, 32))
    assert raw.min() < -0.01 and raw.max() > 1.01


@pytest.mark.parametrize("crop", ["random-resized", "none"])
def test_images_are_never_coarse(crop: Any) -> None:
    """bfloat16 is for a model's arithmetic: a card reads its images inside of its autocast."""
    images = as_batch(calm_images(4, 3, 20, 30))
    crops = random_crops(config(crop=crop), sizes(20, 30, 4), range(4), epoch=0)
    plain = apply_to_batch(images, crops, (16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_to_batch(images, crops, (16, 24)), plain)


def test_a_constant_image_stays_constant() -> None:
    """The weights sum to 1 everywhere, at edges too."""
    images = torch.full((8, 2, 31, 17), 0.3)
    crops = random_crops(config(), sizes(31, 17, 8), range(8), epoch=0)
    torch.testing.assert_close(apply_to_batch(images, crops, (16, 24)), torch.full((8, 2, 16, 24), 0.3))


def test_pixels_outside_the_box_do_not_take_part() -> None:
    """As when the box is cut first: other pixels around it change nothing."""
    images = torch.rand(8, 1, 40, 40)
    crops = random_crops(config(crop_scale=(0.2, 0.4)), sizes(40, 40, 8), range(8), epoch=0)
    outside = torch.ones(8, 1, 40, 40, dtype=torch.bool)
    for index in range(8):
        (top, left), (tall, wide) = crops.start[index].tolist(), crops.length[index].tolist()
        outside[index, :, top : top + tall, left : left + wide] = False
    assert outside.any()
    first = apply_to_batch(images, crops, (16, 24))
    assert torch.equal(apply_to_batch(torch.where(outside, 1 - images, images), crops, (16, 24)), first)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_whole_image_is_bit_exact(dtype: torch.dtype) -> None:
    """An image of the output's size is not resampled, and its mirror image is exactly that."""
    images = torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images.float() * 3 - 100
    expected = images.float() / 255 if dtype == torch.uint8 else images
    crops = centre_crops(sizes(16, 24, 6), (16, 24))
    assert torch.equal(apply_to_batch(images, crops, (16, 24)), expected)
    flipped = random_crops(config(crop="none"), sizes(16, 24, 6), range(6), epoch=0)
    assert 0 < flipped.flip.sum() < 6
    out = apply_to_batch(images, flipped, (16, 24))
    for index in range(6):
        mirror = expected[index].flip(2) if flipped.flip[index] else expected[index]
        assert torch.equal(out[index], mirror)
        one = apply_to_image(images[index].permute(1, 2, 0).numpy(), flipped, index, (16, 24))
        assert torch.equal(one, images[index].flip(2) if flipped.flip[index] else images[index])


def test_a_flip_mirrors_the_scaled_crop() -> None:
    """Flipped or not, the same box is seen: the one is the mirror image of the other."""
    images = calm_images(8, 3, 40, 56)
    crops = random_crops(config(), sizes(40, 56, 8), range(8), epoch=0)
    plain, mirrored = (
        Crops(crops.start, crops.length, crops.scale, crops.offset, np.full(8, flip)) for flip in (False, True)
    )
    first = apply_to_batch(as_batch(images), plain, (16, 24))
    torch.testing.assert_close(apply_to_batch(as_batch(images), mirrored, (16, 24)), first.flip(3), rtol=0, atol=1e-6)
    one = apply_to_image(images[0], plain, 0, (16, 24))
    assert torch.equal(apply_to_image(images[0], mirrored, 0, (16, 24)), one.flip(2))


@pytest.mark.parametrize(("side", "one_by_one"), [(memory.LARGE - 1, False), (memory.LARGE, True)])
def test_large_images_in_memory_are_scaled_one_by_one_on_a_cpu(
    side: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense products would spend nearly all of their work on zeros; the pixels are the same within rounding."""
    images = calm_images(10, 3, side, 40)
    part = ArrayPart(images, None, None, in_chans=3)
    settings = config(data="-")
    pool = memory.MemoryPool(part, settings, torch.device("cpu"), (side, 40))
    calls: list[int] = []

    def one(image_HWC: Any, crops: Crops, row: int, size_hw: tuple[int, int]) -> Tensor:
        calls.append(row)
        return apply_to_image(image_HWC, crops, row, size_hw)

    monkeypatch.setattr(memory, "apply_to_image", one)
    ids = np.array([7, 2, 2, 9])
    batch = next(pool.train_batches([(3, ids)]))
    assert calls == (list(range(4)) if one_by_one else [])
    crops = random_crops(settings, sizes(side, 40, 4), ids, epoch=3)
    expected = apply_to_batch(as_batch(images[ids]), crops, (16, 24))
    found = batch.images.float() / 255 if one_by_one else batch.images
    assert (found - expected).abs().max() < 1.5 / 255
