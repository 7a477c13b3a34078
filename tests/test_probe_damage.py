"""Images that cannot be read have no part in a probe: their stand-ins are other images, under labels not their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file

from maekit import cli
from maekit.data.loader import open_pool
from maekit.data.sources import open_source
from maekit.weights.store import random_model

BAD = 6


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Weights; and dark and bright images, of which the last of the dark ones are cut, so that bright ones stand in."""
    model = random_model(tiny_config())
    weights = tmp_path / "weights.safetensors"
    save_file(dict(model.state_dict()), weights, metadata=model.passport.to_metadata())
    random = np.random.default_rng(0)
    images = tmp_path / "images"
    for part, count in (("train", 40), ("test", 12)):
        for name, level in (("a-dark", 20), ("b-bright", 200)):
            folder = images / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((16, 24 + index % 2, 3), level, np.uint8) + random.integers(0, 30, (1, 1, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
                if name == "a-dark" and index >= count - BAD:
                    path = folder / f"{index:02d}.png"
                    path.write_bytes(path.read_bytes()[:-30])
    return weights, images


@pytest.mark.parametrize("sizes", ["one size", "many sizes"])
def test_unreadable_images_are_left_out_and_named(
    sizes: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In memory and streamed: whoever kept the stand-ins under the dark ones' labels could not be right about all."""
    weights, images = folders
    if sizes == "one size":
        for path in images.rglob("*.png"):
            if int(path.stem) % 2:
                path.unlink()
    bad = BAD // 2 if sizes == "one size" else BAD
    words = ["probe", str(weights), "--data", str(images), "--out", str(tmp_path / "card"), "--device", "cpu"]
    assert cli.main(words) == 0
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["unreadable"] == 2 * bad
    whole = 20 if sizes == "one size" else 40
    assert (card["training_images"], card["test_images"]) == (2 * whole - bad, (2 * whole * 12) // 40 - bad)
    assert [score["linear"] for score in card["scores"] if score["source"] == "raw pixels"] == [1.0]
    said = " ".join(capsys.readouterr().out.split())
    assert "unreadable, left out: train/a-dark/" in said or "unreadable, left out: a-dark/" in said
    assert "truncated" in said


def test_a_pool_tells_what_it_could_not_read(folders: tuple[Path, Path]) -> None:
    """A streamed one as far as it has come."""
    import torch

    from maekit.config import PretrainConfig
    from maekit.runtime import Choice

    part = open_source(str(folders[1])).train
    config = PretrainConfig(data="-", img_size=(16,), max_bad_share=1.0)
    pool, _ = open_pool(part, config, torch.device("cpu"), Choice(0, ""))
    assert pool.unreadable == {}
    list(pool.eval_batches(np.arange(len(part)), 16))
    assert sorted(pool.unreadable) == list(range(40 - BAD, 40))


def test_online_probes_leave_out_the_same(folders: tuple[Path, Path]) -> None:
    """Stand-ins, and images without a label."""
    import torch

    from maekit.config import PretrainConfig
    from maekit.runtime import Choice
    from maekit.training.monitor import _labelled

    part = open_source(str(folders[1])).train
    config = PretrainConfig(data="-", img_size=(16,), max_bad_share=1.0)
    pool, _ = open_pool(part, config, torch.device("cpu"), Choice(0, ""))
    list(pool.eval_batches(np.arange(len(part)), 16))
    assert part.labels is not None
    labels = part.labels.copy()
    labels[60] = -1
    ids = np.array([3, 38, 41, 60])
    features, found = _labelled(pool, ids, torch.arange(4.0)[:, None], labels)
    assert features.flatten().tolist() == [0.0, 2.0]
    assert found.tolist() == [0, 1]
