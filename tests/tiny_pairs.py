"""Tiny images with annotations, an encoder, and a segmentation run on them, for the tests."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from maekit import cli
from maekit.tasks import segment
from maekit.weights.store import random_model
from maekit.weights.written import write_weights

NAMES = ["ground", "disc", "bar"]
TINY = (
    "--crop 16 --batch-size 4 --steps 6 --head-width 8 --eval-every 3 --log-every 1 --workers 0 --device cpu "
    "--precision fp32 --overlays 1 --lr 0.001 --drop-path 0.2 --inference whole"
).split()


def write_pairs(folder: Path, train: int = 10, val: int = 3) -> Path:
    """Bright discs and dark bars on grey, 20 x 28 px (no multiple of the patch); a border is void."""
    random = np.random.default_rng(0)
    for part, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(count):
            rows, columns = np.mgrid[:20, :28]
            truth = np.zeros((20, 28), np.uint8) + 1
            truth[(rows - random.integers(5, 15)) ** 2 + (columns - random.integers(5, 23)) ** 2 < 20] = 2
            truth[:, random.integers(2, 26) :][:, :2] = 3
            truth[0] = 0
            image = np.array([0, 120, 230, 20])[truth][..., None] + random.integers(-15, 16, (20, 28, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / part / f"{index:02d}.png")
            Image.fromarray(truth).save(folder / "annotations" / part / f"{index:02d}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def make_place(folder: Path) -> Path:
    """A folder with the pairs, the weights of an encoder, and a run of 6 steps."""
    write_pairs(folder / "data")
    model = random_model(tiny_config(depth=4), seed=5)  # not the seed that --from-scratch takes
    write_weights(folder / "mae.safetensors", model, model.passport)
    with warnings.catch_warnings():
        assert train(folder, folder / "run") == 0
    return folder


def leave_pictures_out(patch: pytest.MonkeyPatch) -> None:
    """They take most of a tiny run's time and touch no number; the run of `make_place` has them."""
    patch.setattr(segment, "draw_pictures", lambda job: True)
    patch.setattr(segment, "draw_sheet", lambda *arguments: None)


def train(place: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["segment", str(place / "mae.safetensors"), "--data", str(place / "data"), *TINY, "--out", str(out), *more]
    )


def card(run: Path, name: str = "card.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name).read_text())
    return found


def pairs_of(place: Path, part: str = "validation") -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels and classes of each pair; void is -1."""
    found = []
    for file in sorted((place / "data" / "images" / part).iterdir()):
        values = np.asarray(Image.open(place / "data" / "annotations" / part / file.name))
        found.append((np.asarray(Image.open(file)), values.astype(int) - 1))
    return found
