"""Whole runs through the command line, on real images that packages bundle: what is written, resumed, probed, drawn."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_data
from PIL import Image
from safetensors.torch import load_file

import maekit
from maekit import cli
from maekit.config import PretrainConfig, UserError
from maekit.configfile import from_json
from maekit.data.sources import open_source
from maekit.models.masking import make_masks
from maekit.processes import check_processes
from maekit.rng import Purpose
from maekit.stopping import StopRequest

HERE = Path(__file__).parent
SMALL = (
    "--steps 24 --batch-size 64 --log-every 5 --eval-every 0.5 --probe-every 1 --panel-every 0 --save-every 1 "
    "--device cpu --precision fp32 --compile off"
).split()
WALL_CLOCK = ("images_per_s", "seconds", "waited")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def environment() -> dict[str, str]:
    """For a fresh process: one thread, and the package importable."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, left alone."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main(["pretrain", "digits", *SMALL, "--out", str(out)]) == 0
    return out


def test_the_folder_holds_what_the_design_says(run: Path) -> None:
    """Config and environment as JSON, metrics, curves, panels, checkpoints, weights with a passport; and it learnt."""
    config = from_json(PretrainConfig, (run / "config.json").read_text(), "config.json")
    assert (config.steps, config.epochs, config.precision, config.in_memory) == (24, None, "fp32", "yes")
    assert config.mean is not None
    assert config.embed_dim == 64
    assert {"versions", "command", "cpu", "commit"} <= json.loads((run / "env.json").read_text()).keys()
    lines = metrics(run)
    kinds = [line["kind"] for line in lines]
    assert (kinds.count("step"), kinds.count("heldout"), kinds.count("probe")) == (5, 4, 2)
    losses = [line["loss"] for line in lines if line["kind"] == "heldout"]
    assert losses[-1] < 0.9 * losses[0]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [5, 10, 15, 20, 24]
    for picture in (run / "curves.png", run / "panels" / "epoch-0001_step-00000024.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000022", "step-000024"]
    assert not (run / "quarantine.jsonl").exists()


def test_weights_load_without_masking_or_shuffling(run: Path) -> None:
    """`maekit.load` gives the trained weights with their passport; features do not depend on the batch."""
    mae = maekit.load(run)
    assert (mae.passport.steps, mae.passport.data, mae.passport.recipe) == (24, "digits", "digits")
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    features = mae.encode(images, pool="mean")
    assert features.shape == (5, 64)
    torch.testing.assert_close(mae.encode(images[2:3]), features[2:3], rtol=1e-5, atol=1e-5)
    random = maekit.load("random:vit_tiny_patch16_224")
    assert random.encode(torch.zeros(1, 3, 224, 224), pool="cls").shape == (1, 192)
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in mae.state_dict().items())


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loop of a new run find a SIGTERM after the given step."""
    steps = itertools.count(1)

    def agreed(self: StopRequest, accelerator: object, save_is_due: bool) -> tuple[bool, bool]:
        now = next(steps) == step
        self.number = signal.SIGTERM if now else 0
        return now, False

    monkeypatch.setattr(StopRequest, "agreed", agreed)


@pytest.mark.parametrize("step", [3, 22])
def test_a_stopped_run_continues_bit_equal(
    step: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two log lines, or at an epoch's end, then resumed: the weights, optimiser and metrics of the
    run that was left alone."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        stop_at(step, patched)
        assert cli.main(["pretrain", "digits", *SMALL, "--out", str(out)]) == 128 + signal.SIGTERM
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 99, "los')  # what a crash may leave behind the checkpoint
    assert cli.main(["resume", str(out)]) == 0
    for name in ("model", "optimizer", "rng"):
        alone = load_file(run / "checkpoints" / "step-000024" / f"{name}.safetensors")
        resumed = load_file(out / "checkpoints" / "step-000024" / f"{name}.safetensors")
        assert alone.keys() == resumed.keys()
        assert all(torch.equal(alone[key], resumed[key]) for key in alone), name
    assert metrics(out) == metrics(run)


def test_a_longer_run_restarts_the_cosine(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`resume --steps` lengthens a finished run, says so, and the rate starts at its peak again."""
    out = tmp_path / "longer"
    shutil.copytree(run, out)
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--steps", "30"]) == 0
    assert "the cosine starts again" in " ".join(capsys.readouterr().out.split())
    rates = {line["step"]: line["lr"] for line in metrics(out) if line["kind"] == "step"}
    assert rates[25] == pytest.approx(0.001)  # blr 4e-3 x 64 / 256
    assert rates[30] < rates[25]
    for flags, code in ((["--steps", "9", "--epochs", "2"], 2), (["--steps", "9"], 2), ([], 0)):
        assert cli.main(["resume", str(out), *flags]) == code
    assert "the run is finished" in capsys.readouterr().out


def test_another_folder_of_data_is_refused_on_resume(run: Path, tmp_path: Path) -> None:
    """Exact resume needs the same images: a changed fingerprint is an error."""
    out = tmp_path / "moved"
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"data": "photos", "in_memory": "auto"}))
    assert cli.main(["resume", str(out), "--steps", "30"]) == 2


def test_two_processes_see_what_one_sees(run: Path, tmp_path: Path) -> None:
    """torchrun with two processes: in every step the same samples with the same masks, and the same losses."""
    words = ["pretrain", "digits", *SMALL]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "record_samples.py"), str(tmp_path), *words, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [
        [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    first_of_training = len(ranks[0]) - 24  # before it, masks are drawn for the trivial predictors
    mae = maekit.load(run)
    from maekit.data.loader import SampleOrder, split_heldout

    train_ids, _ = split_heldout(1438, 0.02)
    order = SampleOrder(train_ids, 64, seed=0)
    for step in range(24):
        epoch, ids = order.step_ids(step)
        keep = mae.draw_masks(ids, seed=0, epoch=epoch).ids_keep_BV.tolist()
        seen = [ranks[rank][first_of_training + step] for rank in range(2)]
        assert seen[0][0] + seen[1][0] == ids.tolist()
        assert seen[0][1] + seen[1][1] == keep
    for one, two in zip(metrics(run), metrics(tmp_path / "two"), strict=True):
        assert one["kind"] == two["kind"]
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_accumulation_changes_no_sample_and_no_loss(run: Path, tmp_path: Path) -> None:
    """A batch is global: two parts of 32 give the losses of one of 64."""
    out = tmp_path / "parts"
    assert cli.main(["pretrain", "digits", *SMALL, "--accum", "2", "--out", str(out)]) == 0
    for one, two in zip(metrics(run), metrics(out), strict=True):
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_sigterm_saves_and_exits_with_143(tmp_path: Path) -> None:
    """A real signal to a real process: the step is finished, a checkpoint written, the code is 128 + 15."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "maekit", "pretrain", "digits", *SMALL, "--steps", "100000", "--out", str(out)]
    command += ["--log-every", "1"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count('"step", "step"') < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "maekit resume" in output
    assert len(list((out / "checkpoints").glob("step-*"))) >= 1


def test_probe_and_reconstruct(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card beats chance for all sources and holds what the table shows; a panel is drawn for any image."""
    assert cli.main(["probe", str(run), "--data", "digits"]) == 0
    card = json.loads((run / "probe-digits" / "card.json").read_text())
    assert [score["source"] for score in card["scores"]] == [str(run), f"{run}, random weights", "raw pixels"]
    assert all(score["linear"] > 0.5 and score["knn"] > 0.2 for score in card["scores"])
    assert (card["training_images"], card["test_images"]) == (1438, 359)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8), "RGBA")
    photo.save(tmp_path / "photo.png")
    capsys.readouterr()
    panel = tmp_path / "panel.png"
    words = ["reconstruct", str(run), "--image", str(tmp_path / "photo.png"), "--out", str(panel)]
    assert cli.main([*words, "--mask-ratio", "0.75", "--seed", "3"]) == 0
    assert panel.stat().st_size > 1000
    for bad, expected in ((["--mask-ratio", "1"], "--mask-ratio 1"), (["--out", "panel.jpg"], ".png")):
        assert cli.main([*words, *bad]) == 2
        assert expected in capsys.readouterr().err
    assert cli.main(["reconstruct", str(run), "--image", str(tmp_path / "none.png"), "--out", str(panel)]) == 2


def test_reconstruct_scores_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and skill on the test digits are those of the same crops and masks by hand."""
    panel = tmp_path / "panel.png"
    assert cli.main(["reconstruct", str(run), "--data", "digits", "--out", str(panel)]) == 0
    told = capsys.readouterr().out
    assert panel.stat().st_size > 1000 and "digits, test part" in told
    model = maekit.load(run)
    part = open_source("digits", in_chans=1).test
    assert part is not None
    images = torch.stack([torch.from_numpy(part.read(i)).permute(2, 0, 1) for i in range(len(part))])
    ids = np.arange(len(part))
    masks = make_masks(
        model.config.mask, model.grid_hw, model.config.mask_ratio, ids, seed=0, purpose=Purpose.HELDOUT_MASK
    )
    with torch.no_grad():
        normal = model.normalize(images)
        loss = float(model(normal, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM).loss)
    assert f"{loss:.4f} on hidden patches" in told
    words = ["reconstruct", str(run), "--out", str(panel)]
    assert cli.main(words) == 2 and cli.main([*words, "--data", "digits", "--seed", "1"]) == 2
    assert cli.main([*words, "--data", "digits", "--part", "val"]) == 2
    assert "has no such part; choose train, test" in capsys.readouterr().err


def make_photographs(folder: Path, count: int) -> None:
    """Photographs of many sizes, some grayscale, in nested folders."""
    random = np.random.default_rng(0)
    for index in range(count):
        height, width = (int(side) for side in random.integers(20, 60, 2))
        pixels = np.kron(random.integers(0, 256, (height // 4, width // 4, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
        image = Image.fromarray(pixels).convert("L" if index % 5 == 0 else "RGB")
        path = folder / f"part{index % 3}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


FOLDER = (
    "--img-size 16 24 --patch-size 8 --embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 16 --decoder-depth 1 "
    "--decoder-heads 2 --batch-size 8 --epochs 2 --log-every 1 --probe-every 0 --device cpu --max-bad-share 0.2"
).split()


def test_a_folder_with_bad_files_goes_on(tmp_path: Path) -> None:
    """Damaged files are named, the next one takes their slot, the other samples keep theirs; and the number of
    workers changes nothing."""
    make_photographs(tmp_path / "images", 50)
    broken = tmp_path / "images" / "part1" / "007.png"
    broken.write_bytes(broken.read_bytes()[:60])
    runs = []
    for workers in ("0", "2"):
        out = tmp_path / f"workers{workers}"
        words = ["pretrain", "folder", "--data", str(tmp_path / "images"), *FOLDER, "--out", str(out)]
        assert cli.main([*words, "--workers", workers]) == 0
        named = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert [entry["name"] for entry in named] == ["part1/007.png"]
        runs.append(metrics(out))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 13  # 10 steps of 8 out of 42 images, 3 held-out passes


def test_too_many_bad_files_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above --max-bad-share the run ends with the share and the list's place."""
    make_photographs(tmp_path / "images", 50)
    for index in range(0, 50, 3):
        (tmp_path / "images" / "part0" / f"{index:03d}.png").write_bytes(b"broken")
    words = ["pretrain", "folder", "--data", str(tmp_path / "images"), *FOLDER, "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--workers", "0"]) == 2
    assert "--max-bad-share 0.2" in capsys.readouterr().err


def test_the_number_of_processes_that_was_asked_for() -> None:
    """`accelerate launch` may start fewer than asked for: an error, said aloud."""
    check_processes(None, 1)
    check_processes(2, 2)
    with pytest.raises(UserError, match="2 processes were asked for, but 1 started"):
        check_processes(2, 1)


@pytest.mark.slow
def test_cifar10_from_the_shared_parquet(tmp_path: Path) -> None:
    """One step on the shared CIFAR-10: 50,000 encoded images are read, 1,000 held out, ten classes known."""
    out = tmp_path / "c10"
    words = ["pretrain", "cifar10", "--data", str(shared_data("cifar10")), "--out", str(out), "--steps", "1"]
    words += ["--probe-every", "0", "--depth", "1", "--batch-size", "64", "--decoder-depth", "1"]
    assert cli.main(words) == 0
    assert maekit.load(out).passport.data == "cifar10"
