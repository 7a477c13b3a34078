"""What is done with a segmentation run afterwards, through the command line: class maps, scores, wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_pairs import NAMES, TINY, card, leave_pictures_out, make_place, train

from maekit import cli
from maekit.config import InfoConfig
from maekit.data.pair_transforms import PairBatch
from maekit.tasks import info
from maekit.training.segmentation_inference import View, predict_classes
from maekit.training.segmentation_job import next_parts
from maekit.weights.segmenters import load_segmenter


@pytest.fixture(autouse=True)
def _without_pictures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_pictures_out(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("segment"))


def test_predictions_are_class_numbers_that_read_back(place: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a", (20, 28)), ("deep/b", (5, 3)), ("c", (64, 17))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(images / f"{name}.png")
    command = ["segment", str(place / "run"), "--predict", str(images), "--out", str(tmp_path / "masks")]
    assert cli.main([*command, "--device", "cpu"]) == 0
    model, _ = load_segmenter(place / "run" / "model.safetensors")
    for name in ("a", "deep/b", "c"):
        pixels = np.asarray(Image.open(images / f"{name}.png"))
        picture = Image.open(tmp_path / "masks" / f"{name}.png")
        expected = predict_classes(model, torch.from_numpy(pixels.copy()).permute(2, 0, 1), View()).numpy()
        assert picture.mode == "P" and picture.size == pixels.shape[1::-1]
        np.testing.assert_array_equal(np.asarray(picture), expected + 1)
        assert (tmp_path / "masks" / f"{name}-overlay.png").is_file()
    assert cli.main(command) == 2  # the folder is not empty now

    moved = tmp_path / "moved.safetensors"  # the file alone is enough
    moved.write_bytes((place / "run" / "model.safetensors").read_bytes())
    assert cli.main(["segment", str(moved), "--predict", str(images), "--out", str(tmp_path / "more")]) == 0
    assert (tmp_path / "more" / "a.png").read_bytes() == (tmp_path / "masks" / "a.png").read_bytes()
    facts = info.collect(str(moved), InfoConfig())
    assert facts["can"]["segment"] and not facts["can"]["classify"] and facts["classes"] == list(NAMES)
    assert facts["next"] == f"maekit segment {moved} --predict IMAGES --out DIR"


def test_two_processes_train_and_score_together(place: Path, tmp_path: Path) -> None:
    """What two processes count of the validation images is what one counts of the weights that they left."""
    out = tmp_path / "two"
    children = tiny_runs.fork_ranks(lambda rank: train(place, out), tmp_path)
    assert tiny_runs.ends(children) == [0, 0], (tmp_path / "rank1.log").read_text()
    found, lines, alone = card(out), tiny_runs.metrics(out), tiny_runs.metrics(place / "run")
    assert found["images"] == card(place / "run")["images"] and found["score"]["pixels"] == 3 * 19 * 28
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in alone]
    assert lines[0]["loss"] == pytest.approx(alone[0]["loss"], rel=0.2)  # batch norm sees halves of the batch
    assert cli.main(["segment", str(out), "--eval", "--device", "cpu", "--out", str(tmp_path / "one.json")]) == 0
    assert card(tmp_path, "one.json")["confusion"] == found["confusion"]
    assert cli.main(["resume", str(out)]) == 2  # on one process


def test_training_normalises_floats_as_scoring_does(place: Path) -> None:
    """Images of 16 bits or floats come from the loader in 0..1, and 8-bit ones as they are: one step sees the same."""
    model, _ = load_segmenter(place / "run" / "model.safetensors")
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    stop = SimpleNamespace(unless_stopped=lambda _, work: work())
    run = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), stop=stop, console=None)
    quarantine = SimpleNamespace(report=lambda bad, console: None)
    job: Any = SimpleNamespace(config=SimpleNamespace(accum=1), run=run, model=model, quarantine=quarantine)
    seen = []
    for images in (pixels, pixels / 255):
        parts = next_parts(job, iter([PairBatch(images, torch.zeros(2, 16, 16, dtype=torch.int64), np.arange(2), [])]))
        assert parts is not None
        seen.append(parts[0][0])
    assert torch.allclose(seen[0], seen[1], atol=1e-6) and torch.allclose(seen[1], model.normalize(pixels), atol=1e-6)


def test_unreadable_images_are_named_and_the_others_predicted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    command = ["segment", str(place / "run"), "--predict", str(tmp_path / "in"), "--no-overlays", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == 1
    assert "bad.png" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png"]


def test_eval_scores_again(place: Path, tmp_path: Path) -> None:
    command = ["segment", str(place / "run"), "--eval", "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "same.json")]) == 0
    assert card(tmp_path, "same.json")["confusion"] == card(place / "run")["confusion"]
    views = ["--inference", "slide", "--window", "16", "--stride", "8", "--flip-test", "--scales", "0.8", "1"]
    assert cli.main([*command, *views, "--part", "heldout", "--out", str(tmp_path / "more.json")]) == 0
    found = card(tmp_path, "more.json")
    assert found["images"] == 4
    assert found["view"] == {"window": [16, 16], "stride": 8, "short_side": None, "scales": [0.8, 1.0], "flip": True}
    assert found["confusion"] != card(place / "run")["confusion"]


def test_eval_says_which_images_it_scores(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other data without a validation part: all of it, read with the run's numbering; the run's own: refused,
    also once they have changed."""
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    shutil.rmtree(data / "images" / "validation")
    out = tmp_path / "own"
    assert cli.main(["segment", str(place / "mae.safetensors"), "--data", str(data), *TINY, "--out", str(out)]) == 0
    assert card(out)["images"] == {"train": 6, "held-out": 4} and card(out)["part"] == "held-out"
    command = ["segment", str(out), "--eval", "--device", "cpu", "--out", str(tmp_path / "score.json")]
    assert cli.main(command) == 2 and cli.main([*command, "--data", str(data)]) == 2
    assert "take --part heldout" in capsys.readouterr().err
    for kind in ("images", "annotations"):
        (data / kind / "training" / "00.png").unlink()
    assert cli.main(command) == 2 and cli.main([*command, "--data", str(data)]) == 2  # nobody knows which were held out
    assert "has changed since the run was trained on it" in capsys.readouterr().err
    shutil.move(data, data := tmp_path / "others")
    assert cli.main([*command, "--data", str(data)]) == 0
    found = card(tmp_path, "score.json")
    assert (found["part"], found["images"]) == ("all", 9)
    assert cli.main([*command, "--data", str(data), "--void", "none"]) == 2  # then 0 is a class without a name
    assert cli.main([*command, "--workers", "-1"]) == 2
