"""The evaluation card through the command line: what it holds, that no test label chooses, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file

from maekit import cli
from maekit.config import ProbeConfig, UserError
from maekit.data.order import Ids
from maekit.data.sources import open_source
from maekit.data.splits import open_splits
from maekit.tasks import probe
from maekit.training import anew, evaluation, keras_probe
from maekit.training.probe_choices import encoder_kind, reading_config, shape_of
from maekit.weights.store import load, load_as, load_each, random_model

LEVELS = {"a-dark": 60, "b-grey": 110, "c-bright": 160}
ALL = ["--probes", "lars", "few-labels", "attentive", "--attentive-epochs", "3", "--lars-epochs", "20"]


def make_weights(folder: Path, name: str = "weights", **changes: Any) -> Path:
    """Weights of a tiny encoder with a random start, whose passport does not call them random."""
    torch.manual_seed(5)
    model = random_model(tiny_config(**{"img_size": (8,), "depth": 2, **changes}), seed=7)
    model.passport.recipe = "tiny"
    path = folder / f"{name}.safetensors"
    save_file(dict(model.state_dict()), path, metadata=model.passport.to_metadata())
    return path


def make_images(
    folder: Path, levels: dict[str, int], count: int = 80, parts: tuple[str, ...] = ("train", "test")
) -> Path:
    """Noise around a level of its own for each class: most images are told apart by their brightness."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, level in levels.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count if part == "train" else count // 2):
                shift = random.normal(0, 20)
                pixels = np.clip(random.normal(level + shift, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _fewer_settings() -> Iterator[None]:
    """Fewer weight decays to choose from: small fits are most of a tiny card's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "DECAYS", (1e-4, 1e-2))
        patch.setattr(evaluation, "FEW_DECAYS", (1e-2, 1e-1))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights, and images in three classes: 240 to train on, 120 to test."""
    folder = tmp_path_factory.mktemp("card")
    return make_weights(folder), make_images(folder / "images", LEVELS)


def card_of(words: list[str], out: Path) -> dict[str, Any]:
    assert cli.main(["probe", *words, "--out", str(out), "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads((out / "card.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A card with every probe, from flipped and plain images."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return card_of([str(data[0]), "--data", str(data[1]), *ALL, "--few-labels", "0.1"], out), out


def test_a_card_holds_everything(whole: tuple[dict[str, Any], Path], data: tuple[Path, Path]) -> None:
    """Rows for the source, random weights and pixels; every probe with its setting, held-out and test numbers."""
    card, out = whole
    name = str(data[0])
    assert [score["source"] for score in card["scores"]] == [name, f"{name}, random weights", "raw pixels"]
    assert (card["training_images"], card["test_images"], card["heldout_images"]) == (240, 120, 24)
    assert (card["classes"], card["unreadable"], card["protocol"]) == (3, 0, "cached")
    assert card["most_frequent_class"] == pytest.approx(1 / 3)
    own, _, pixels = card["scores"]
    assert set(own["probes"]) == {"linear", "lars", "knn", "10 % labels", "attentive"}
    assert set(pixels["probes"]) == {"linear", "knn", "10 % labels"}
    assert [(found["block"], found["pooling"]) for found in own["search"]] == [
        (block, pooling) for block in (1, 2) for pooling in ("mean", "cls", "both")
    ]
    assert {entry["views"] for entry in own["views"]} == {1, 2}
    for score in card["scores"]:
        for name, draws in score["probes"].items():
            assert len(draws) == (3 if "labels" in name else 1)
            for found in draws:
                assert found["interval"][0] <= found["test"] <= found["interval"][1]
                assert found["heldout"] == max(entry["heldout"] for entry in found["sweep"])
                chosen = {key: found["setting"][key] for key in found["sweep"][0] if key != "heldout"}
                assert next(e for e in found["sweep"] if e["heldout"] == found["heldout"]) == chosen | {
                    "heldout": found["heldout"]
                }
        assert score["linear"] == score["probes"]["linear"][0]["test"] > 0.6
        assert score["knn"] == score["probes"]["knn"][0]["test"] > 0.5
        best = max(score["search"], key=lambda entry: (entry["linear"], entry["block"]))
        assert score["probes"]["linear"][0]["setting"]["block"] == best["block"]
        assert score["seconds"].keys() >= {"search", "linear", "knn", "test"}
    assert own["probes"]["10 % labels"][0]["setting"]["labels"] == 24
    with Image.open(out / "card.png") as picture:
        assert min(picture.size) > 400
    assert json.loads((out / "config.json").read_text())["few_labels"] == [0.1]


def choices(card: dict[str, Any]) -> list[Any]:
    """All that was chosen, and what it was chosen by."""
    kept = ("setting", "heldout", "sweep")
    return [
        [score["search"], score["views"], score["pooling"], score["heldout_linear"], score["decay"]]
        + [[{key: found[key] for key in kept} for found in draws] for draws in score["probes"].values()]
        for score in card["scores"]
    ]


def test_test_labels_choose_nothing(
    whole: tuple[dict[str, Any], Path], data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shuffled test labels all choices and held-out numbers stay as they are, and only test numbers change."""
    real = probe.open_splits

    def shuffled(*arguments: Any) -> Any:
        train, test = real(*arguments)
        return train, dataclasses.replace(test, labels=test.labels.roll(40))

    monkeypatch.setattr(probe, "open_splits", shuffled)
    words = [str(data[0]), "--data", str(data[1]), *ALL, "--few-labels", "0.1"]
    card = card_of(words, tmp_path)
    assert choices(card) == choices(whole[0])
    assert all(new["linear"] < 0.4 < old["linear"] for new, old in zip(card["scores"], whole[0]["scores"], strict=True))


def test_several_sources_make_one_table(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each architecture's random weights once, pixels once; chosen blocks only; one probe fewer where unasked."""
    other = make_weights(tmp_path, "other")
    larger = make_weights(tmp_path, "larger", embed_dim=48, depth=3)
    words = [str(data[0]), str(other), str(larger), "--data", str(data[1]), "--probes", "--blocks", "1", "-1"]
    card = card_of([*words, "--flip", "no", "--pool", "mean"], tmp_path / "card")
    names = [Path(score["source"]).name for score in card["scores"]]
    assert names == [
        "weights.safetensors", "weights.safetensors, random weights", "other.safetensors", "larger.safetensors",
        "larger.safetensors, random weights", "raw pixels",
    ]  # fmt: skip
    assert [[entry["block"] for entry in score["search"]] for score in card["scores"]][::3] == [[1, 2], [1, 3]]
    assert all(set(score["probes"]) == {"linear", "knn"} for score in card["scores"])
    table = " ".join(capsys.readouterr().out.split())
    assert "3 classes, 240 training and 120 test images" in table


def test_what_holds_for_one_source_alone(tmp_path: Path) -> None:
    """A flag that a run's passport contradicts may be meant for another file: how it is said of that one only."""
    ours, absent = str(make_weights(tmp_path)), str(tmp_path / "absent")
    plain, told = ProbeConfig(data="digits"), ProbeConfig(data="digits", num_heads=7)
    with pytest.raises(UserError) as caught:
        load_each([ours, ours], told)
    assert "--num-heads: said of every source here; a copy of one keeps" in caught.value.problems[1]
    for sources, settings in (([ours], told), ([ours, absent], plain)):
        with pytest.raises(UserError) as caught:
            load_each(sources, settings)
        assert len(caught.value.problems) == 1


def test_the_papers_protocol(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops anew in every epoch, of the images that are not held out; both poolings of the last block, all rates."""
    seen: list[tuple[int, list[int]]] = []
    real = anew.LabelledPool.batches
    pools: list[anew.LabelledPool] = []

    def batches(self: anew.LabelledPool, order: Any, steps: int, most: int) -> Any:
        pools.append(self)
        for step, images, labels in real(self, order, steps, most):
            seen.append((step, images.flatten(1).sum(dim=1).round(decimals=3).tolist()))
            yield step, images, labels

    monkeypatch.setattr(anew.LabelledPool, "batches", batches)
    words = [str(data[0]), "--data", str(data[1]), "--protocol", "paper", "--lars-epochs", "3", "--blocks", "1"]
    card = card_of([*words, "--no-baselines", "--probes", "--batch-size", "100"], tmp_path)
    (paper,) = card["scores"][0]["probes"]["paper"]
    # 216 images in parts of 100, in one batch of 216; a last epoch, of so few, is for the batch norm's statistics.
    assert [step for step, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sum(len(sums) for _, sums in seen) == 4 * 216
    first, second = ({one for _, sums in seen[part : part + 3] for one in sums} for part in (0, 3))
    assert len(first & second) < 20, "the second epoch has other crops"
    assert {entry["pooling"] for entry in paper["sweep"]} == {"mean", "cls"}
    assert paper["setting"]["block"] == 2 and {entry["block"] for entry in card["scores"][0]["search"]} == {1}
    assert paper["heldout"] == max(entry["heldout"] for entry in paper["sweep"])
    held = heldout_ids(240)
    assert len(pools[0].ids) == 216
    assert not set(pools[0].ids.tolist()) & held


def test_the_tutorials_protocol(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more column, by the tutorial's probe on the same images and labels, read in its own way."""
    monkeypatch.setattr(keras_probe, "EPOCHS", 2)
    words = [str(data[0]), "--data", str(data[1]), "--protocol", "keras", "--blocks", "2", "--no-baselines", "--probes"]
    (score,) = card_of(words, tmp_path)["scores"]
    model = load(data[0])
    reading = keras_probe.reading(model.config, str(data[1]))
    source = open_source(str(data[1]), in_chans=3)
    splits = open_splits(source, reading, torch.device("cpu"))
    train, test = (keras_probe.Labelled(split.pool, split.ids, split.labels) for split in splits)
    found = keras_probe.keras_probe(model, train, test, num_classes=3, epochs=2)
    assert score["keras"] == {"test": found.test, "train": found.train}


def test_what_sources_share_and_what_they_do_not() -> None:
    """One floor for encoders that begin alike, whatever is dropped in training; images read once where they look alike;
    and a random source is of the seed that is asked for.
    """
    one, other = (random_model(tiny_config(drop_path=share)) for share in (0.0, 0.1))
    assert encoder_kind(one) == encoder_kind(other)
    assert encoder_kind(one) != encoder_kind(random_model(tiny_config(depth=3)))
    one.passport.crop_pct = 0.875
    assert len({shape_of(reading_config(ProbeConfig(data="-"), model.passport)) for model in (one, other)}) == 2
    models = [load_as("random:vit_tiny_patch16_224", ProbeConfig(data="-", seed=seed)) for seed in (0, 0, 1)]
    first, same, third = (model.get_parameter("encoder.blocks.0.attn.qkv.weight") for model in models)
    assert torch.equal(first, same) and not torch.equal(first, third)


def heldout_ids(count: int) -> set[int]:
    return set(np.flatnonzero(evaluation.held_out_S(np.arange(count, dtype=np.int64))).tolist())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_trained_with_labels(
    precision: str, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns (its features tell brightness apart better than at the start), and never sees a held-out image."""
    used: list[Ids] = []
    real = probe.train_supervised

    def train(model: Any, pool: anew.LabelledPool, *arguments: Any, **more: Any) -> Any:
        used.append(pool.ids)
        before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
        head = real(model, pool, *arguments, **more)
        assert not torch.equal(before["blocks.0.attn.qkv.weight"], model.encoder.blocks[0].attn.qkv.weight)
        assert torch.equal(before["pos_embed"], model.encoder.pos_embed)
        images = next(iter(pool.pool.eval_batches(pool.ids, 500)))
        found = head(model.encode(model.normalize(images.images))).argmax(dim=1).numpy()
        assert (found == pool.labels_N[images.sample_ids]).mean() > 0.8
        return head

    monkeypatch.setattr(probe, "train_supervised", train)
    monkeypatch.setattr(anew, "SUPERVISED_BATCH", 54)
    words = [
        str(data[0]),
        "--data",
        str(data[1]),
        "--precision",
        precision,
        "--scratch",
        "--scratch-epochs",
        "12",
        "--probes",
    ]
    card = card_of([*words, "--no-baselines"], tmp_path)
    assert card["scores"][1]["source"] == f"{data[0]}, trained with labels"
    assert card["scores"][1]["linear"] > 0.75
    assert not set(used[0].tolist()) & heldout_ids(240)
    assert len(used[0]) == 216


ERRORS: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "flat folder": (lambda w, d: [str(w), "--data", str(d / "train" / "a-dark")], "has no labels"),
    "few labels": (
        lambda w, d: [str(w), "--data", str(d), "--few-labels", "0.001"],
        "--few-labels 0.001: 0.1 %",
    ),
    "share": (lambda w, d: [str(w), "--data", str(d), "--few-labels", "10"], "--few-labels 10: must be above 0"),
    "block": (lambda w, d: [str(w), "--data", str(d), "--blocks", "7"], "--blocks 7:"),
    "several": (lambda w, d: [str(w), "--data", "none", "--lars-epochs", "0", "--seed", "-1"], "--lars-epochs 0"),
    "run without weights": (lambda w, d: [str(d), "--data", str(d)], "not a run"),
    "out in a file": (lambda w, d: [str(w), "--data", str(d), "--out", f"{w}/card"], "cannot be written: Not a dir"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(name: str, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and one line for each thing that is wrong; all settings are looked at before any data."""
    words, expected = ERRORS[name]
    assert cli.main(["probe", *words(*data), "--device", "cpu", "--no-baselines"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) == (2 if name == "several" else 1)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0, 1] * 30, [-1] * 20, "its test split has no labels"),
        ([-1] * 60, [0, 1] * 10, "has no labels, and a probe needs them"),
        ([1] * 60, [0, 1] * 10, "are all of one class"),
        ([0, 1, 0, 1], [0, 1] * 10, "4 labelled training images are too few"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    train: list[int], test: list[int], expected: str, data: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Parquet parts without labels (-1: unlabelled), with one class, or with hardly an image."""
    files = sorted((data[1] / "train").rglob("*.png"))
    for part, labels in (("train", train), ("test", test)):
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in files[: len(labels)]]
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    words = ["probe", str(data[0]), "--data", str(tmp_path), "--label-column", "label", "--device", "cpu"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) == 1
