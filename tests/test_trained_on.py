"""A score on images that a model was trained on is called that: by fingerprints, by paths, by the run's own config."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_classes import TRAINING, write_encoder, write_images

from maekit import cli
from maekit.config import FinetuneConfig, UserError
from maekit.data.sources import open_source
from maekit.tasks import finetune
from maekit.training.trained_on import training_of
from maekit.weights.sources import read_passport

WORDS = [word for word in TRAINING if word not in ("--data", "digits")]
CLASSES = {"cat": 20, "dog": 20}


def fine_tuned(data: Path, run: Path) -> Path:
    encoder = write_encoder(run.parent / "encoder")
    words = [str(encoder), "--data", str(data), *WORDS, "--batch-size", "8", "--steps", "2", "--out", str(run)]
    assert cli.main(["finetune", *words]) == 0
    return run


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """40 images without parts, and a classifier of 32 of them: the other fifth is kept for the report."""
    folder = tmp_path_factory.mktemp("flat")
    data = write_images(folder / "data", CLASSES)
    return fine_tuned(data, folder / "run"), data


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with a test part: a classifier of all training images."""
    folder = tmp_path_factory.mktemp("parted")
    write_images(folder / "data" / "train", CLASSES)
    write_images(folder / "data" / "test", {"cat": 5, "dog": 6})
    return fine_tuned(folder / "data", folder / "run"), folder / "data"


def used_of(run: Path, data: Path) -> dict[str, int]:
    """How many images of each part are known to be trained on; empty where nothing says so."""
    passport = read_passport(run / "model.safetensors")
    source = open_source(str(data), in_chans=1)
    training = training_of(str(run), passport, source, str(data))
    parts = {"train": source.train, "val": source.val, "test": source.test}
    if training is None:
        return {}
    return {name: int(training.among(part).sum()) for name, part in parts.items() if part is not None}


def test_the_run_knows_what_it_was_trained_on(flat: tuple[Path, Path], parted: tuple[Path, Path]) -> None:
    """All but the report's fifth; the training part with its held-out images; the same when asked of a folder in it."""
    assert used_of(*flat) == {"train": 32}
    assert used_of(*parted) == {"train": 40, "test": 0}
    # The fifth of the training folder that would be kept for a report was not kept from this run.
    assert used_of(parted[0], parted[1] / "train") == {"train": 40}
    assert used_of(parted[0], parted[1] / "test") == {"train": 0}


def test_files_are_known_by_their_paths(flat: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder around the data, a folder of a class, a list of files, a link; not a copy under other names."""
    run, data = flat
    assert used_of(run, data.parent) == {"train": 32}
    kept = 40 - 32
    cats = used_of(run, data / "cat")["train"]
    assert 20 - kept <= cats < 20
    files = sorted(path for path in data.rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, files[:10])) + "\n")
    assert 0 < used_of(run, tmp_path / "list.txt")["train"] <= 10
    (tmp_path / "link").symlink_to(data / "cat")
    assert used_of(run, tmp_path / "link") == {"train": cats}
    shutil.copytree(data / "cat", tmp_path / "copy")
    assert used_of(run, tmp_path / "copy") == {}


def test_weights_without_their_run_know_the_fingerprint(
    flat: tuple[Path, Path], parted: tuple[Path, Path], tmp_path: Path
) -> None:
    """Then it is what a run on data of this form would have used."""
    for name, (run, data) in {"flat": flat, "parted": parted}.items():
        (tmp_path / name).mkdir()
        shutil.copy(run / "model.safetensors", tmp_path / name)
        assert used_of(tmp_path / name, data) == ({"train": 32} if name == "flat" else {"train": 40, "test": 0})
    assert used_of(tmp_path / "flat", flat[1] / "cat") == {}


def test_predict_tells_them_apart(flat: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Next to the numbers, in a column, and in the metadata of a Parquet file."""
    run, data = flat
    for out in ("p.parquet", "p.csv"):
        words = ["predict", str(run), "--data", str(data), "--out", str(tmp_path / out), "--device", "cpu"]
        assert cli.main([*words, "--workers", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train, the images that it was not trained on: " in said and ", 8 images)" in said
    assert "train, 32 images: " in said
    assert "not a test: the model was trained on these images, so this says little of new ones" in said
    table = pq.read_table(tmp_path / "p.parquet")
    assert sum(table["trained_on"].to_pylist()) == 32
    about: dict[str, Any] = json.loads(table.schema.metadata[b"maekit"])
    assert about["trained_on"] == {"train": "32 of 40 images"} and about["weights"] == str(run)
    with (tmp_path / "p.csv").open(newline="") as file:
        assert [row["trained_on"] for row in csv.DictReader(file)].count("true") == 32


def test_new_images_have_no_such_column(flat: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_images(tmp_path / "new", {"cat": 3, "dog": 3})
    words = ["predict", str(flat[0]), "--data", str(data), "--out", str(tmp_path / "p.csv"), "--device", "cpu"]
    assert cli.main([*words, "--workers", "0"]) == 0
    assert "trained_on" not in (tmp_path / "p.csv").read_text()


def test_a_score_says_that_it_is_no_test(parted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The fixed fifth of a folder that the run was trained on as a whole; not its own test part."""
    run, data = parted
    for folder, count in ((data / "train", 8), (data, 0)):
        words = ["finetune", str(run), "--data", str(folder), "--eval", "--device", "cpu", "--workers", "0"]
        assert cli.main(words) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("not a test: the model was trained on these images" in said) == (count > 0)
        card = json.loads((run / f"eval-{folder.name}" / "card.json").read_text())
        assert card["trained_on"] == count
        low, high = card["top5_interval_95"]
        assert low < card["top5"] <= high


def test_a_score_on_changed_data_says_so(
    flat: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the data with one file more, of which the run knows nothing: the kept fifth is another one there."""
    run, data = flat
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    shutil.copy(changed / "cat" / "0.png", changed / "cat" / "new.png")
    for folder, warned in ((changed, True), (data, False)):
        words = ["finetune", str(run), "--data", str(folder), "--eval", "--device", "cpu", "--workers", "0"]
        assert cli.main([*words, "--out", str(tmp_path / f"eval-{warned}")]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("no test split, and not the data that the run saw" in said) == warned


def test_a_fine_tuning_does_not_train_where_a_score_was_asked_for() -> None:
    with pytest.raises(UserError, match="finetune_score"):
        finetune.main("run", FinetuneConfig(data="digits", eval=True))
