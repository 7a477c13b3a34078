"""A run that waits for its images says so once, with what helps; images far larger than the input are streamed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.config import PretrainConfig
from maekit.data.loader import MOST_SHRINKING, open_pool
from maekit.data.sources import open_source
from maekit.runtime import Choice
from maekit.training import run


def advice(waited: float, lines: int = 1, loader_speed: float = 50.0) -> list[str]:
    """What is said of 100 images in 10 s, at the line after so many others."""
    said: list[str] = []
    job: Any = SimpleNamespace(
        waited=waited, lines=lines, loader_speed=loader_speed, part=[], choices={"workers": Choice(1, "")},
        config=PretrainConfig(data="-"), console=SimpleNamespace(print=said.append),
    )  # fmt: skip
    run.advise_on_loading(job, 100, 10.0)
    assert (job.waited, job.lines) == (0.0, lines + 1)
    return said


def test_waiting_is_said_once_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second line only, from a fifth of the time on; the model's speed is that of the time left."""
    monkeypatch.setattr(run, "available_cores", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (line,) = advice(waited=5.0, loader_speed=10.0)
    assert "50% of the time went into waiting" in line
    assert "model about 20" in line
    assert "maekit pack" in line
    assert advice(waited=1.9, loader_speed=10.0) == []
    assert advice(waited=5.0, lines=0, loader_speed=10.0) == []
    assert advice(waited=5.0, lines=2, loader_speed=10.0) == []
    assert advice(waited=5.0, loader_speed=0.0) == [], "the images are in memory"
    assert advice(waited=5.0, loader_speed=50.0) == [], "the loader keeps up: something else was slow"


@pytest.mark.parametrize(("factor", "in_memory"), [(MOST_SHRINKING, True), (MOST_SHRINKING + 1, False)])
def test_images_far_above_the_input_are_streamed(factor: int, in_memory: bool, tmp_path: Path) -> None:
    for index in range(20):
        Image.fromarray(np.full((8 * factor, 8 * factor, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    config = PretrainConfig(data="-", img_size=(8,))
    part = open_source(str(tmp_path)).train
    _, choice = open_pool(part, config, torch.device("cpu"), Choice(0, ""))
    assert choice.value is in_memory
    assert in_memory or "nearer to the input's" in choice.reason
