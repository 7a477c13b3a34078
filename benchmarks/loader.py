"""Images/s of one core for each form of data, beside the pipeline of the official training script, in turn.

    python -m benchmarks.loader
    python -m benchmarks.loader --data ~/images --listing 1000000

Ours is what a loader worker does (`StreamPool` without workers, or `MemoryPool`): read, decode, crop, flip, collate.
The other one is PIL's open and convert, then torchvision's RandomResizedCrop (0.2 to 1, bicubic), flip, ToTensor and
Normalize, collated to float32. Ours yields uint8 and normalises on the device: that is part of the training step.
Without --data the images are crops of photographs that scikit-image ships, of ImageNet's typical size (500 x 375 px).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from torchvision import datasets, transforms

from benchmarks.timing import alternate, show, speedup, spread, wall_clock, write_json
from maekit.config import PretrainConfig, UserError
from maekit.data.loader import MemoryPool, Pool, StreamPool
from maekit.data.parts import FilePart, Part
from maekit.data.photos import PHOTOS
from maekit.data.sources import open_source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUALITY = 96
"""Of the JPEGs: they come to 76 KB on average, where ImageNet's have about 110; --data takes real ones."""


@dataclass
class LoaderConfig:
    """Images/s of one core."""

    data: str | None = None
    """A folder of photographs. Default: crops of bundled ones, written to a temporary folder."""
    images: int = 128
    """Images that are generated, or taken of --data."""
    img_size: int = 224
    """Side of what comes out."""
    small: int = 4096
    """Images of 32 px in the in-memory form."""
    turn: int = 32
    """Images of one turn; the in-memory form takes 8 times as many."""
    rounds: int = 7
    """Rounds that count."""
    listing: int = 0
    """Also list a folder with so many (empty) files."""
    json: str | None = None
    """File for all numbers."""


def photographs() -> list[Image.Image]:
    """The colour photographs among scikit-image's bundled ones.

    Raises:
        UserError: scikit-image is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError("no --data, and no bundled photographs: pip install 'maekit[demo]'")
    root = Path(found.origin).parent / "data"
    paths = [root / Path(path).name for path in PHOTOS.values() if path.startswith("skimage/")]
    images = [Image.open(path) for path in paths if path.exists()]
    return [image.convert("RGB") for image in images if image.mode == "RGB"]


def write_corpus(folder: Path, count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> None:
    """JPEGs of the given width and height: crops of 60 to 100 % of the photographs' sides."""
    random, photos = np.random.default_rng(seed), photographs()
    for index in range(count):
        photo = photos[index % len(photos)]
        ratio = min(photo.width / size[0], photo.height / size[1]) * random.uniform(0.6, 1)
        wide, tall = size[0] * ratio, size[1] * ratio
        left, top = random.uniform(0, photo.width - wide), random.uniform(0, photo.height - tall)
        crop = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + wide, top + tall))
        crop.save(folder / f"{index:06d}.jpg", quality=QUALITY)


def write_small_parquet(path: Path, count: int, seed: int = 0) -> None:
    """32 px crops as PNGs in the hub's image schema, as CIFAR comes from there."""
    random = np.random.default_rng(seed)
    photos = [np.asarray(photo.resize((256, 256))) for photo in photographs()]
    rows = []
    for index in range(count):
        top, left = random.integers(0, 256 - 32, 2)
        buffer = io.BytesIO()
        Image.fromarray(photos[index % len(photos)][top : top + 32, left : left + 32]).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(rows, kind)}), path)


def official(img_size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The paper's augmentation by torchvision (appendix A.1: random resized crop and flip)."""
    both: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(img_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return both


def official_files(part: FilePart, img_size: int, turn: int) -> Iterator[torch.Tensor]:
    """Batches of decoded files, without end."""
    augment, numbers = official(img_size), itertools.cycle(range(len(part)))
    while True:
        images = []
        for number in itertools.islice(numbers, turn):
            with Image.open(part.path(number)) as image:
                images.append(augment(image.convert("RGB")))
        yield torch.stack(images)


def official_arrays(images_NHWC: npt.NDArray[np.uint8], img_size: int, turn: int) -> Iterator[torch.Tensor]:
    """Batches of arrays in memory, as torchvision's CIFAR hands them out, without end."""
    augment, numbers = official(img_size), itertools.cycle(range(len(images_NHWC)))
    while True:
        yield torch.stack([augment(Image.fromarray(images_NHWC[n])) for n in itertools.islice(numbers, turn)])


def our_batches(pool: Pool, count: int, turn: int) -> Iterator[torch.Tensor]:
    """Batches by the trainer's own loader, without end; every pass is another epoch."""
    numbers = itertools.count()

    def shares() -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        while True:
            some = np.array(list(itertools.islice(numbers, turn)), np.int64)
            yield int(some[0]) // count, some % count

    return (batch.images for batch in pool.train_batches(shares()))


def compare(ours: Iterator[Any], theirs: Iterator[Any], turn: int, rounds: int) -> dict[str, Any]:
    """Images/s of both, and the ratio round by round."""
    seconds = alternate({"ours": lambda: next(ours), "peer": lambda: next(theirs)}, rounds, 2)
    speeds = {side: spread([turn / value for value in values])._asdict() for side, values in seconds.items()}
    return {**speeds, "ratio": speedup(seconds["ours"], seconds["peer"])._asdict()}


def packed(folder: str, out: Path) -> Part | None:
    """The folder packed by `maekit pack` at 256 px; None where this maekit has no such command."""
    try:
        task, config = importlib.import_module("maekit.tasks.pack"), importlib.import_module("maekit.config").PackConfig
    except (ImportError, AttributeError):
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        task.main(config(data=folder, out=str(out), size=256))
    return open_source(str(out)).train


def listing(count: int) -> dict[str, Any]:
    """Seconds and peak memory (Python's and NumPy's) of listing so many files, 1,000 in each class's folder.

    Beside it: torchvision's ImageFolder on the same folder.
    """
    with tempfile.TemporaryDirectory() as root:
        for start in range(0, count, 1000):
            folder = Path(root) / f"class{start // 1000:05d}"
            folder.mkdir()
            for number in range(start, min(start + 1000, count)):
                (folder / f"image{number:08d}.jpg").touch()
        works = {"ours": lambda: open_source(root).train, "peer": lambda: datasets.ImageFolder(root).samples}
        seconds, memory = alternate(works, 1, 1), {}
        for side, work in works.items():
            tracemalloc.start()
            assert len(work()) == count
            memory[side] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    ratio = speedup(seconds["ours"], seconds["peer"])._asdict()
    return {"files": count, "seconds": seconds, "memory": memory, "ratio": ratio}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """One thread on one core, and what was before afterwards."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def measure(config: LoaderConfig) -> dict[str, Any]:
    """Every form of data; what cannot be measured here is None."""
    result: dict[str, Any] = {"clock": wall_clock.__name__, "img_size": config.img_size}
    cpu = torch.device("cpu")
    settings = PretrainConfig(img_size=(config.img_size,), crop_scale=(0.2, 1.0))
    with tempfile.TemporaryDirectory() as root, one_core():
        folder = config.data
        if folder is None:
            folder = str(Path(root) / "photos")
            Path(folder).mkdir()
            write_corpus(Path(folder), config.images)
        part = open_source(folder).train
        if not isinstance(part, FilePart):
            raise UserError(f"--data {folder}: a folder of image files is needed")
        count = min(config.images, len(part))
        files = [os.path.getsize(part.path(index)) for index in range(count)]
        result["corpus"] = {"images": count, "mean_bytes": sum(files) / count}
        theirs = official_files(part, config.img_size, config.turn)
        ours = our_batches(StreamPool(part, settings, cpu, 0), count, config.turn)
        result["folder"] = compare(ours, theirs, config.turn, config.rounds)
        shards = packed(folder, Path(root) / "packed")
        result["packed"] = None
        if shards is not None:
            ours = our_batches(StreamPool(shards, settings, cpu, 0), min(count, len(shards)), config.turn)
            result["packed"] = compare(ours, theirs, config.turn, config.rounds)
        result["memory"] = in_memory(Path(root) / "small.parquet", config)
    if config.listing:
        result["listing"] = listing(config.listing)
    return result


def in_memory(path: Path, config: LoaderConfig) -> dict[str, Any]:
    """Small images from Parquet, held in memory and augmented in batch, as with CIFAR."""
    write_small_parquet(path, config.small)
    part, many = open_source(str(path)).train, 8 * config.turn
    settings = PretrainConfig(img_size=(32,), crop_scale=(0.2, 1.0))
    pool = MemoryPool(part, settings, torch.device("cpu"), (32, 32))
    arrays = pool.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return compare(our_batches(pool, len(part), many), official_arrays(arrays, 32, many), many, config.rounds)


def table(result: dict[str, Any]) -> list[list[str]]:
    """The rows that people read."""
    rows = []
    for name in ("folder", "packed", "memory"):
        one = result[name]
        if one is None:
            rows.append([name, "this maekit has no `pack`", "-", "-"])
            continue
        speeds = (f"{one[s]['median']:,.4g} ({one[s]['low']:,.4g} to {one[s]['high']:,.4g})" for s in ("ours", "peer"))
        rows.append([name, *speeds, f"{one['ratio']['median']:.2f}"])
    return rows


def main(config: LoaderConfig) -> int:
    """Measure, print, write."""
    try:
        result = measure(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show("images/s of one core: median (quartiles)", ("data", "maekit", "official style", "ratio"), table(result))
    print(f"{result['corpus']['images']} photographs of {result['corpus']['mean_bytes'] / 1e3:.0f} KB on average")
    if "listing" in result:
        print(say_listing(result["listing"]))
    write_json(config.json, result)
    return 0


def say_listing(one: dict[str, Any]) -> str:
    """Seconds and memory of listing, on one line."""
    said = [f"{side} {one['seconds'][side][0]:.2f} s, {one['memory'][side] / 1e6:.0f} MB" for side in ("ours", "peer")]
    return f"listing {one['files']:,} files: {said[0]}; torchvision's ImageFolder: {said[1].removeprefix('peer ')}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LoaderConfig)))
