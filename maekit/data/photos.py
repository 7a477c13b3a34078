"""`--data photos`: small crops of the photographs that scikit-image and scikit-learn ship; nothing is downloaded.

The class is the photograph. Each photograph is shrunk so that its shorter side is 256 px. Columns are counted from the
left, W of them: crops for testing lie in the last W // 4 columns, crops for training in the first W - W // 4 - 16.
So no pixel is in both; and the 16 columns between them are wider than the shrinking filter's reach (3 px to each
side), so that no pixel of the photograph itself contributes to both.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from maekit.config import UserError
from maekit.data.images import BadImage, decode
from maekit.data.parts import ArrayPart, Source
from maekit.rng import Purpose, random_bits

CROP = 32
"""Side of a crop in pixels."""
TRAIN_CROPS = 384
"""Training crops of each photograph."""
TEST_CROPS = 64
"""Test crops of each photograph."""
SHORTER_SIDE = 256
GAP = 16
"""Columns between the training and the test part of a photograph."""

_PACKAGES = {
    "skimage": ("data", "pip install 'maekit[demo]'"),
    "sklearn": ("datasets/images", "pip install scikit-learn"),
}
PHOTOS = {
    "astronaut": "skimage/astronaut.png",
    "brick": "skimage/brick.png",
    "camera": "skimage/camera.png",
    "chelsea": "skimage/chelsea.png",
    "china": "sklearn/china.jpg",
    "coffee": "skimage/coffee.png",
    "coins": "skimage/coins.png",
    "flower": "sklearn/flower.jpg",
    "grass": "skimage/grass.png",
    "gravel": "skimage/gravel.png",
    "hubble": "skimage/hubble_deep_field.jpg",
    "ihc": "skimage/ihc.png",
    "moon": "skimage/moon.png",
    "motorcycle": "skimage/motorcycle_left.png",
    "retina": "skimage/retina.jpg",
    "rocket": "skimage/rocket.jpg",
}
"""Class name -> package / file."""


def open_photos(in_chans: int) -> Source:
    """The crops as a source: 384 for training and 64 for testing per photograph, ordered by class.

    Raises:
        UserError: scikit-image is not installed, or does not ship one of the files.
    """
    crops: dict[str, list[npt.NDArray[np.uint8]]] = {"train": [], "test": []}
    for index, path in enumerate(PHOTOS.values()):
        photo_HWC = _load(path)
        for part, found in crops.items():
            found.append(_crops(photo_HWC, crop_corners(index, part, *photo_HWC.shape[:2])))
    names = list(PHOTOS)
    labels = {part: np.repeat(np.arange(len(names), dtype=np.int64), len(found[0])) for part, found in crops.items()}
    train, test = (ArrayPart(np.concatenate(crops[p]), labels[p], names, in_chans) for p in ("train", "test"))
    return Source("photos", train, test=test)


def crop_corners(photo: int, part: str, height: int, width: int) -> npt.NDArray[np.int64]:
    """Top-left corners [crops, 2] as (row, column) of one photograph's crops for a part, 'train' or 'test'.

    height and width are those of the shrunk photograph in pixels.
    """
    test_start = width - width // 4
    left, right = (test_start, width) if part == "test" else (0, test_start - GAP)
    count = TEST_CROPS if part == "test" else TRAIN_CROPS
    ids = photo * (TRAIN_CROPS + TEST_CROPS) + (TRAIN_CROPS if part == "test" else 0) + np.arange(count)
    bits = random_bits(ids, 2, seed=0, purpose=Purpose.CROP)
    rows = bits[:, 0] % np.uint64(height - CROP + 1)
    columns = bits[:, 1] % np.uint64(right - left - CROP + 1) + np.uint64(left)
    return np.stack([rows, columns], axis=1).astype(np.int64)


def _crops(photo_HWC: npt.NDArray[np.uint8], corners: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return np.stack([photo_HWC[row : row + CROP, column : column + CROP] for row, column in corners])


def _load(path: str) -> npt.NDArray[np.uint8]:
    """A photograph H W 3, shrunk; read as a file, so that neither package is imported."""
    package, file = path.split("/")
    folder, remedy = _PACKAGES[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--data photos: needs the photographs that {package} ships: {remedy}")
    try:
        image = Image.fromarray(decode(Path(spec.submodule_search_locations[0], folder, file), 3))
    except BadImage as error:
        raise UserError(f"--data photos: the installed {package} has no {folder}/{file} ({error}): {remedy}") from None
    scale = SHORTER_SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
