"""Images that cannot be read have no part in a probe: their stand-ins are other images, under labels not their own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file

import maekit
from maekit import cli
from maekit.config import PretrainConfig
from maekit.data.loader import open_pool
from maekit.data.sources import open_source
from maekit.runtime import Choice
from maekit.training import evaluation
from maekit.training.capacity import free_bytes
from maekit.training.monitor import _labelled, online_probe
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
    part = open_source(str(folders[1])).train
    config = PretrainConfig(data="-", img_size=(16,), max_bad_share=1.0)
    pool, _ = open_pool(part, config, torch.device("cpu"), Choice(0, ""))
    assert pool.unreadable == {}
    list(pool.eval_batches(np.arange(len(part)), 16))
    assert sorted(pool.unreadable) == list(range(40 - BAD, 40))


def test_online_probes_leave_out_the_same(folders: tuple[Path, Path]) -> None:
    """Stand-ins, and images without a label."""
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


@pytest.mark.parametrize(
    ("labelled", "accuracies"), [((), False), ((3,), False), ((60,), False), ((3, 60), False), ((3, 41, 60), True)]
)
def test_online_probes_of_hardly_any_labels(
    folders: tuple[Path, Path], labelled: tuple[int, ...], accuracies: bool
) -> None:
    """A partly labelled set pretrains like any other: without a label on either side there is no accuracy."""
    weights, images = folders
    part = open_source(str(images)).train
    model = maekit.load(weights)
    config = PretrainConfig(data="-", img_size=model.config.img_size, max_bad_share=1.0)
    pool, _ = open_pool(part, config, torch.device("cpu"), Choice(0, ""))
    labels = np.full(len(part), -1)
    labels[list(labelled)] = [0, 1, 0][: len(labelled)]
    numbers = online_probe(model, pool, np.array([3, 41, 42]), np.array([60, 61]), labels, 4)
    assert numbers.keys() == {"rankme", *(("knn", "linear", "images", "largest_class") if accuracies else ())}
    assert all(math.isfinite(value) for value in numbers.values())


def test_an_image_of_both_splits_is_left_out_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Without a test part a fifth of the training images is for the report: one pool, which is asked twice."""
    weights, images = folders
    words = ["probe", str(weights), "--data", str(images / "train"), "--out", str(tmp_path / "card"), "--no-baselines"]
    assert cli.main([*words, "--device", "cpu", "--probes"]) == 0
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["unreadable"] == BAD
    assert card["test"] == "a fixed fifth of the images, which no probe is fitted on"


def test_classes_that_cannot_be_read_are_missed(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streamed, so it shows only while features are taken."""
    weights, images = folders
    for path in (images / "train" / "a-dark").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    words = ["probe", str(weights), "--data", str(images), "--out", str(tmp_path / "card"), "--device", "cpu"]
    assert cli.main(words) == 2
    assert "40 labelled training images are all of one class" in capsys.readouterr().err


def test_broken_weights_are_named_and_cost_no_finished_row(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, images = folders
    model = random_model(tiny_config())
    with torch.no_grad():
        model.get_parameter("encoder.blocks.0.mlp.fc1.bias")[0] = torch.nan
    broken, out = tmp_path / "broken.safetensors", tmp_path / "card"
    save_file(dict(model.state_dict()), broken, metadata=model.passport.to_metadata())
    words = ["probe", str(weights), str(broken), "--data", str(images), "--out", str(out), "--device", "cpu"]
    assert cli.main([*words, "--no-baselines", "--probes"]) == 2
    assert f"{broken}: features after block 1 are not finite" in capsys.readouterr().err
    kept = json.loads((out / "card-unfinished.json").read_text())
    assert [score["source"] for score in kept["scores"]] == [str(weights)]
    assert not (out / "card.json").exists()


def test_what_makes_a_card_doubtful_is_said(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few held-out images, and a classifier that was trained with these labels."""
    weights, images = folders
    model = random_model(tiny_config())
    model.passport.kind, model.passport.classes = "classifier", ("a-dark", "b-bright")
    model.passport.recipe = "finetune, small"
    model.passport.fingerprint = open_source(str(images)).train.fingerprint
    tuned = tmp_path / "tuned.safetensors"
    tensors = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    head = {"head.weight": torch.zeros(2, model.encoder.embed_dim), "head.bias": torch.zeros(2)}
    width = model.encoder.embed_dim
    norm = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
    save_file({**tensors, **norm, **head}, tuned, metadata=model.passport.to_metadata())
    words = ["--data", str(images), "--out", str(tmp_path / "card"), "--device", "cpu", "--no-baselines", "--probes"]
    assert cli.main(["probe", str(weights), *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 held-out images choose blocks and settings: expect rough choices" in said
    assert "trained with these labels" not in said
    assert cli.main(["probe", str(tuned), *words]) == 0
    assert "was trained with these labels" in " ".join(capsys.readouterr().out.split())


def test_of_equal_blocks_the_last_is_taken(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "share_right", lambda *_: 0.5)
    weights, images = folders
    words = ["--data", str(images), "--out", str(tmp_path / "card"), "--device", "cpu", "--no-baselines", "--probes"]
    assert cli.main(["probe", str(weights), *words]) == 0
    (score,) = json.loads((tmp_path / "card" / "card.json").read_text())["scores"]
    last = max(entry["block"] for entry in score["search"])
    assert last > 1
    assert {score["probes"][name][0]["setting"]["block"] for name in ("linear", "knn")} == {last}


def test_memory_that_files_hold_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container counts what it read from disk as used, though it makes room at once."""
    texts = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 200\ninactive_file 600\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[path.name])
    assert free_bytes(torch.device("cpu")) == 1000 - (900 - 600)
