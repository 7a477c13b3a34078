"""Windows of images, JPEGs decoded smaller, batches of crops, and how fast the loader says that it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_data
from image_files import encoded, npy, photograph, png16, tiff
from PIL import Image

from maekit.config import PretrainConfig
from maekit.data.images import BadImage, decode
from maekit.data.order import sides
from maekit.data.parts import ArrayPart, FilePart, Part
from maekit.data.pixels import Window
from maekit.data.sources import open_source
from maekit.data.speed import keeps_up, worker_images_per_second
from maekit.data.stream import Decoder, StreamPool
from maekit.data.transforms import (
    apply_to_image,
    apply_to_window,
    centre_crops,
    draw_crops,
    place_crop,
    random_crops,
    wanted,
)

PHOTO = photograph(3, 61, 83)
GRAY16 = np.random.default_rng(0).integers(0, 65536, (61, 83, 1)).astype(np.uint16)


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def keyed(colour: tuple[int, int, int]) -> bytes:
    return encoded(PHOTO, transparency=colour)


FORMATS = {
    "jpeg": encoded(PHOTO, "JPEG"),
    "gray jpeg": encoded(PHOTO.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "progressive jpeg": encoded(PHOTO, "JPEG", progressive=True),
    **{f"orientation {k}": oriented(PHOTO, k) for k in range(2, 9)},
    "png": encoded(PHOTO),
    "turned png": oriented(PHOTO, 6, "PNG"),
    "palette": encoded(PHOTO.quantize(16)),
    "transparent palette": encoded(PHOTO.quantize(16), transparency=3),
    "transparent colour": keyed(PHOTO.getpixel((9, 9))),  # type: ignore[arg-type]
    "alpha": encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.getchannel(0)))),
    "one bit": encoded(PHOTO.convert("1")),
    "gif": encoded(PHOTO.quantize(16), "GIF"),
    "16-bit gray": png16(GRAY16),
    "16-bit colour": png16(np.repeat(GRAY16, 3, axis=2)),
    "tiff": tiff(np.asarray(PHOTO)),
    "npy": npy(np.asarray(PHOTO)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_window_is_a_slice_of_the_whole(name: str) -> None:
    """Whatever the format; `look` is told the upright size."""
    whole = decode(FORMATS[name], 3)
    told = []

    def look(height: int, width: int) -> Window:
        told.append((height, width))
        return Window(5, 11, 40, 37)

    found = decode(FORMATS[name], 3, look)
    assert told == [whole.shape[:2]]
    assert found.flags.c_contiguous
    assert found.dtype == whole.dtype
    assert np.array_equal(found, whole[5:45, 11:48])


def smooth(height: int, width: int) -> Image.Image:
    """A picture of slow colour changes, which JPEG and shrinking keep, unlike in its four corners."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return Image.fromarray((np.stack([y, x, y * x], axis=2) * 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(160, 208), (161, 211)], ids=["divisible", "with a rest"])
def test_a_jpeg_decoded_smaller_shows_the_same_place(orientation: int, shape: tuple[int, int]) -> None:
    """Against the full decode, upright: each pixel within 2 levels, where half an output pixel would make 3 to 5.

    With a rest, turned images are decoded in full: their larger pixels would begin at the other edge."""
    data = oriented(smooth(*shape), orientation, quality=98, subsampling=0)
    config = PretrainConfig(img_size=(24, 32), crop_scale=(0.1, 0.9))
    whole = decode(data, 3)
    draws = draw_crops(config, range(12), epoch=0)
    shrunken = 0
    for row in range(12):
        crops = place_crop(config, whole.shape[0], whole.shape[1], draws, row)
        window = wanted(crops, 0, (24, 32), shrink=True)
        box = decode(data, 3, lambda height, width, window=window: window)  # type: ignore[misc]
        shrunken += box.shape[0] < window.height
        found = apply_to_window(box, window, crops, 0, (24, 32)).int()
        assert (found - apply_to_image(whole, crops, 0, (24, 32)).int()).abs().max() <= 2
    assert (shrunken > 6) == (orientation == 1 or shape == (160, 208))


def test_photographs_decoded_smaller_differ_little_from_full_decode() -> None:
    """Mean difference of a crop: below 2.5 levels of 255 over photographs, below 6 in each; all three factors occur."""
    files = sorted(shared_data("imagenet-sample").glob("*.JPEG"))[:12]
    differences: dict[int, list[float]] = {}
    for number, file in enumerate(files):
        whole = decode(file, 3)
        for size in (112, 64, 32):
            config = PretrainConfig(img_size=(size,))
            crops = random_crops(config, np.array([whole.shape[:2]]), [number], epoch=0)
            window = wanted(crops, 0, (size, size), shrink=True)
            box = decode(file, 3, lambda height, width, window=window: window)  # type: ignore[misc]
            assert min(box.shape[:2]) >= size or window.shrink == 1
            found = apply_to_window(box, window, crops, 0, (size, size))
            expected = apply_to_image(whole, crops, 0, (size, size))
            difference = (found.float() - expected.float()).abs().mean().item()
            differences.setdefault(window.shrink, []).append(difference)
    assert {2, 4, 8} <= differences.keys()
    for factor, found_means in differences.items():
        assert max(found_means) < (6 if factor > 1 else 1e-9)
        assert np.mean(found_means) < 2.5


def test_how_far_a_jpeg_may_be_decoded_smaller() -> None:
    """The box keeps at least the output's pixels: 2 from twice the size on, never more than 8, not for tiny outputs."""
    for side, size, expected in [
        (63, 32, 1),
        (64, 32, 2),
        (127, 32, 2),
        (128, 32, 4),
        (256, 32, 8),
        (999, 32, 8),
        (99, 7, 1),
    ]:
        crops = centre_crops(np.array([[side, side + 1]]), (size, size))
        assert wanted(crops, 0, (size, size), shrink=True).shrink == expected
        assert wanted(crops, 0, (size, size), shrink=False).shrink == 1
    tall = centre_crops(np.array([[9000, 64]]), (32, 32))
    assert wanted(tall, 0, (32, 32), shrink=True).shrink == 1  # cut before it is scaled, in its own pixels


def test_damage_is_found_in_a_smaller_decode_too() -> None:
    data = encoded(smooth(300, 400), "JPEG")
    with pytest.raises(BadImage, match="truncated JPEG"):
        decode(data[: len(data) // 2], 3, lambda height, width: Window(0, 0, 40, 40, 4))


# ---- batches ----


@pytest.mark.parametrize("crop", ["random-resized", "resize-crop", "none"])
def test_one_crop_is_placed_as_in_a_batch(crop: str) -> None:
    """The plain floats of one image against NumPy's of many, to the bit: sizes of 1 to 900 px, long thin ones too."""
    config = PretrainConfig(crop=crop, crop_scale=(0.3, 1.0))  # type: ignore[arg-type]
    sizes = np.random.default_rng(1).integers(1, 900, (400, 2))
    together = random_crops(config, sizes, range(400), epoch=2)
    draws = draw_crops(config, range(400), epoch=2)
    for row, (height, width) in enumerate(sizes.tolist()):
        alone = place_crop(config, height, width, draws, row)
        for name in ("start", "length", "scale", "offset", "flip"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[row]), (row, name)


def jpegs(root: Path, count: int = 20) -> Part:
    root.mkdir()
    for index in range(count):
        (root / f"{index:02d}.jpg").write_bytes(encoded(photograph(index, 60 + index, 90), "JPEG"))
    (root / "05.jpg").write_bytes(b"")
    return open_source(str(root)).train


def test_a_sample_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Alone, in any order and among others: the same pixels, and those of the full path where nothing is shrunken."""
    part = jpegs(tmp_path / "set")
    config = PretrainConfig(data="x", img_size=(24, 32), crop_scale=(0.2, 1.0))
    decoder = Decoder(part, config, sides(part, config))
    keys: list[tuple[int | None, int]] = [(3, index) for index in (7, 5, 19, 0)]
    together = decoder.__getitems__(keys)
    for key, (image, slot, bad) in zip(keys, together, strict=True):
        alone, alone_slot, alone_bad = decoder.__getitems__([key])[0]
        assert image is not None and alone is not None
        assert torch.equal(image, alone)
        assert (slot, bad) == (key[1], [(5, "empty file")] if slot == 5 else []) == (alone_slot, alone_bad)
        if slot == 5:
            continue
        whole = part.read(slot)
        crops = random_crops(config, np.array([whole.shape[:2]]), [slot], epoch=3)
        if wanted(crops, 0, (24, 32), shrink=True).shrink == 1:
            assert torch.equal(image, apply_to_image(whole, crops, 0, (24, 32)))


def test_evaluation_decodes_in_full(tmp_path: Path) -> None:
    """Large JPEGs too: its numbers are those of other tools' pixels. Training crops of the same are shrunken."""
    (tmp_path / "a.jpg").write_bytes(encoded(photograph(0, 300, 400), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(encoded(photograph(1, 300, 400), "JPEG"))
    part = open_source(str(tmp_path)).train
    pool = StreamPool(part, PretrainConfig(img_size=(24, 32), flip=False, crop="none"), torch.device("cpu"), 0)
    batch = next(pool.eval_batches(np.array([0, 1]), 2))
    crops = centre_crops(np.array([[300, 400]]), (24, 32))
    for index in range(2):
        assert torch.equal(batch.images[index], apply_to_image(part.read(index), crops, 0, (24, 32)))
    trained = next(pool.train_batches([(0, np.array([0, 1]))]))  # the same place: crop "none"
    assert 0 < (trained.images.float() - batch.images.float()).abs().mean() < 12


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_a_gray_jpeg_that_is_decoded_smaller_fills_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    """Pillow, which resizes these, would take the last of two or four channels for alpha."""
    place = np.mgrid[0:512, 0:640].sum(axis=0) / 8
    Image.fromarray((128 + 100 * np.sin(place / 9)).astype(np.uint8)).save(tmp_path / "gray.jpg", quality=95)
    config = PretrainConfig(data="-", img_size=(64,), in_chans=channels, crop_scale=(0.8, 1.0))
    decoder = Decoder(FilePart(os.fsencode(tmp_path), [b"gray.jpg"], channels), config, np.zeros(1, np.bool_))
    ((image, _, bad),) = decoder.__getitems__([(0, 0)])
    assert image is not None and not bad
    assert image.shape == (channels, 64, 64)
    assert torch.equal(image, image[:1].expand(channels, -1, -1))
    crops = random_crops(config, np.array([[512, 640]]), [0], epoch=0)
    whole = apply_to_image(decode(tmp_path / "gray.jpg", channels), crops, 0, (64, 64))
    assert (image.int() - whole.int()).abs().max() <= 4


def test_arrays_are_cut_like_files() -> None:
    part = ArrayPart(np.asarray(PHOTO)[None], None, None, 3)
    found = part.read(0, lambda height, width: Window(3, 4, 20, 30, 8))
    assert np.array_equal(found, np.asarray(PHOTO)[3:23, 4:34])
    assert not np.shares_memory(found, part.images)


# ---- memory ----


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(value) for value in re.findall(r"Private_\w+: +(\d+) kB", text))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux for a process's own memory")
def test_a_listing_is_small_and_forked_workers_share_it() -> None:
    """200,000 names take their bytes and 9 more each; a worker that asks for each of them copies next to nothing."""
    names = [b"class-%03d/image-%08d.jpg" % (index // 1000, index) for index in range(200_000)]
    part = FilePart(b"/nowhere", names, 3)
    held = len(part._blob) + part._starts.nbytes
    assert held == sum(map(len, names)) + 9 * len(names) + 8
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = private_bytes()
        total = sum(len(part.path(index)) for index in range(len(part)))
        os.write(write, f"{private_bytes() - before} {total}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    grown, total = map(int, os.read(read, 100).split())
    os.close(read)
    os.close(write)
    assert total == sum(map(len, names)) + len("/nowhere/") * len(names)
    assert grown < held // 4, f"{grown:,} bytes of {held:,}"


# ---- speed ----


def test_the_loaders_speed_is_measured_without_a_trace(tmp_path: Path) -> None:
    part = jpegs(tmp_path / "set")
    config = PretrainConfig(data="x", img_size=(24, 32))
    decoder = Decoder(part, config, sides(part, config))
    before = decoder.__getitems__([(0, 3)])[0][0]
    state = torch.get_rng_state()
    assert 20 < worker_images_per_second(part, config, images=12) < 1e5
    assert torch.equal(torch.get_rng_state(), state)
    after = decoder.__getitems__([(0, 3)])[0][0]
    assert before is not None and after is not None and torch.equal(before, after)
    for index in range(20):
        (tmp_path / "set" / f"{index:02d}.jpg").write_bytes(b"")
    assert worker_images_per_second(part, config) == 0


def advice(tmp_path: Path, **numbers: Any) -> tuple[bool, str]:
    part = FilePart(b"", [b"a.jpg"], 3)
    choice = keeps_up(part, **{"per_worker": 500.0, "model": 1000.0, "workers": 4, "cores": 4, **numbers})
    return choice.value, choice.reason


def test_what_is_said_where_the_loader_is_slow(tmp_path: Path) -> None:
    """Worked by hand: 1000 images/s and a tenth to spare are 1100, which 500 a process reaches with 3 of them."""
    enough, reason = advice(tmp_path)
    assert enough and "2,000 images/s" in reason and "help" not in reason
    enough, reason = advice(tmp_path, workers=2)
    assert not enough and "--workers 3" in reason and "pack" not in reason
    enough, reason = advice(tmp_path, model=5000.0)
    assert not enough and "--workers" not in reason and "maekit pack" in reason and "--masks-per-image 3" in reason
    assert "--masks-per-image" not in advice(tmp_path, model=5000.0, masks_per_image=4)[1]
    assert "--workers 3" in advice(tmp_path, workers=0)[1]
    assert "check-data" in advice(tmp_path, per_worker=0.0)[1]
