"""Images on another scale than the weights know are told by the commands that use weights; others are not."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tiny_classes
import tiny_pairs
import tiny_runs
from conftest import tiny_config
from PIL import Image

from maekit import cli
from maekit.data.levels import levels_remark
from maekit.data.parts import loose_files
from maekit.weights.store import random_model
from maekit.weights.written import write_weights

SAID = "Bring both to one scale"


def tiles(folder: Path, low: int, high: int, count: int = 12) -> list[str]:
    """16-bit gray TIFFs of values low..high, and the same pictures as 8 bits from black to white beside them."""
    random, names = np.random.default_rng(0), []
    for kind in ("a", "b"):
        for bits in (8, 16):
            (folder / str(bits) / kind).mkdir(parents=True)
        for index in range(count // 2):
            share = random.uniform(0, 1, (8, 8))
            names.append(str(folder / "16" / kind / f"{index}.tif"))
            tifffile.imwrite(names[-1], (low + (high - low) * share).astype(np.uint16))
            Image.fromarray((255 * share).astype(np.uint8)).save(folder / "8" / kind / f"{index}.png")
    return names


@pytest.mark.parametrize(
    ("mean", "std", "word"),
    [
        ((0.024,), (0.013,), ""),
        ((0.024, 0.024, 0.024), (0.013, 0.013, 0.013), ""),
        ((0.03,), (0.1,), ""),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "about one gray"),
        ((0.0001,), (0.0001,), "far outside"),
        ((30000.0,), (900.0,), "far outside"),
    ],
)
def test_what_is_far_from_what_weights_know(
    mean: Sequence[float], std: Sequence[float], word: str, tmp_path: Path
) -> None:
    part = loose_files(tiles(tmp_path, 100, 3000), len(mean))
    lines = levels_remark([part], mean, std)
    assert len(lines) == bool(word)
    assert all(word in line and SAID in line and "deviation 0.01" in line for line in lines)


def test_nothing_is_said_of_what_cannot_be_seen(tmp_path: Path) -> None:
    """One channel of several on its own scale, a blank image, and files that are none."""
    values = np.stack([np.full((8, 8), 20000), np.arange(64).reshape(8, 8)]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "two.tif", values, photometric="minisblack")
    assert levels_remark([loose_files([str(tmp_path / "two.tif")], 2)], (0.01, 0.0005), (0.01, 0.0003)) == []
    Image.new("L", (8, 8), 128).save(tmp_path / "blank.png")
    assert levels_remark([loose_files([str(tmp_path / "blank.png")], 1)], (0.5,), (0.2,)) == []
    (tmp_path / "empty.png").write_bytes(b"")
    assert levels_remark([loose_files([str(tmp_path / "empty.png")], 1)], (0.5,), (0.2,)) == []


def test_a_slow_disk_delays_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = loose_files(tiles(tmp_path, 100, 3000), 1)
    read: list[int] = []

    def reads(index: int) -> Any:
        read.append(index)
        return np.zeros((2, 2, 1), np.uint8)

    monkeypatch.setattr(part, "read", reads)
    clock = iter(range(100))
    monkeypatch.setattr("maekit.data.parts.time.monotonic", lambda: 0.3 * next(clock))
    levels_remark([part, part], (0.5,), (0.2,))
    assert len(read) == 1


def test_a_large_scan_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = loose_files(tiles(tmp_path, 100, 3000)[:1], 1)
    scan = np.random.default_rng(0).integers(0, 256, (4000, 3000, 1), np.uint8)
    monkeypatch.setattr(part, "read", lambda _: scan)
    tracemalloc.start()
    (line,) = levels_remark([part], (0.01,), (0.01,))
    assert tracemalloc.get_traced_memory()[1] < scan.nbytes
    tracemalloc.stop()
    assert "mean 0.5 and deviation 0.29," in line


def test_commands_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that know 8 bits, and images of 16: once each; and not a word where both are the same."""
    tiny_runs.without_pictures(monkeypatch)
    sixteen = tiles(tmp_path, 100, 3000)[0]
    first = {"16": sixteen, "8": sixteen.replace("/16/", "/8/").replace(".tif", ".png")}
    source = str(tiny_classes.write_encoder(tmp_path / "source"))
    device = ["--device", "cpu", "--workers", "0"]
    tiny = [*tiny_runs.SMALLEST, "--in-chans", "1", "--img-size", "8", "--patch-size", "4", "--batch-size", "4"]
    training = [*device, "--batch-size", "4", "--steps", "1", "--warmup-steps", "0", "--compile", "off"]
    for bits, count in (("16", 1), ("8", 0)):
        data, run = str(tmp_path / bits), str(tmp_path / f"run-{bits}")
        pretraining = ["--data", data, *tiny, "--steps", "1"]
        commands = {
            "embed": ["embed", source, "--data", data, "--out", str(tmp_path / f"{bits}.npz"), "--device", "cpu"],
            "finetune": ["finetune", source, "--data", data, *training, "--out", run],
            "predict": ["predict", run, "--data", data, "--out", str(tmp_path / f"{bits}.csv"), *device],
            "pretrain": ["pretrain", "folder", *pretraining, "--out", f"{run}-new"],
            "init": ["pretrain", "folder", "--init", source, *pretraining, "--out", f"{run}-init"],
            "resume": ["resume", f"{run}-new", "--steps", "2"],
            "probe": ["probe", source, "--data", data, "--no-baselines", "--probes", "--out", f"{run}-card"],
            "score": ["reconstruct", f"{run}-init", "--data", data, "--out", f"{run}-score.png"],
            "attend": ["attend", f"{run}-init", "--image", first[bits], "--out", f"{run}-maps.png"],
            "reconstruct": ["reconstruct", f"{run}-init", "--image", first[bits], "--out", f"{run}-panel.png"],
        }
        for name, words in commands.items():
            assert cli.main(words) == 0, (name, capsys.readouterr().err)
            text = " ".join(capsys.readouterr().out.split())
            said = text.count(SAID)
            if name == "pretrain" and bits == "16":
                mean, deviation = map(
                    float, re.findall(r"pixels mean (\S+) and deviation (\S+) become 0 and 1", text)[0]
                )
                assert mean == pytest.approx(0.024, abs=2e-3) and deviation == pytest.approx(0.013, abs=2e-3)
            assert said == (0 if name in ("pretrain", "resume") else count), (name, bits)


@pytest.mark.parametrize(("mean", "count"), [(0.45, 0), (0.01, 1)])
def test_segmentation_says_it_in_training_and_for_new_images(
    mean: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, weights, run = tiny_pairs.write_pairs(tmp_path / "data"), tmp_path / "mae.safetensors", tmp_path / "run"
    model = random_model(tiny_config(depth=4), (mean,) * 3, (mean / 2,) * 3, seed=0)
    write_weights(weights, model, model.passport)
    tiny_pairs.leave_pictures_out(monkeypatch)
    new = str(data / "images" / "validation")
    for words in (
        ["segment", str(weights), "--data", str(data), *tiny_pairs.TINY, "--steps", "1", "--out", str(run)],
        ["segment", str(run), "--eval", "--device", "cpu"],
        ["segment", str(run), "--predict", new, "--out", str(tmp_path / "masks"), "--device", "cpu"],
    ):
        assert cli.main(words) == 0, capsys.readouterr().err
        assert " ".join(capsys.readouterr().out.split()).count(SAID) == count, words
