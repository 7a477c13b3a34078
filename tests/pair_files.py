"""Small images with annotations for the tests, in ADE20K's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maekit.config import UserError

RNG = np.random.default_rng(7)
SIZE_HW = (6, 9)


def picture(path: Path, size_hw: tuple[int, int] = SIZE_HW, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size_hw, 3), np.uint8)).save(path, **options)


def annotation(path: Path, values: Any = None, kind: str = "L") -> np.ndarray[Any, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = RNG.integers(0, 4, SIZE_HW, np.uint8) if values is None else np.asarray(values, np.uint8)
    image = Image.fromarray(values)
    if kind == "P":
        image.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
    return values


def ade(root: Path, parts: tuple[str, ...] = ("training", "validation"), count: int = 3, classes: int = 3) -> Path:
    """A small data set in ADE20K's layout."""
    for part in parts:
        for index in range(count):
            picture(root / "images" / part / f"{index}.jpg")
            annotation(root / "annotations" / part / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(f"thing {i}" for i in range(classes)))
    return root


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)
