"""Images of 16 bits, of floats and of many channels go through fine-tuning with the defaults, and what is left out of
these is said; what was asked for is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tiny_classes
from PIL import Image

from maekit import cli
from maekit.config import FinetuneConfig
from maekit.tasks import finetune
from maekit.weights.sources import read_passport

WORDS = (
    "--batch-size 8 --steps 4 --warmup-steps 1 --log-every 1 --device cpu --precision fp32 --compile off --workers 0 "
    "--crop-pct 1"
).split()


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(finetune, "draw_training", lambda *_, **__: None)
    yield
    patch.undo()


def sixteen_bit(path: Path, values_HW: np.ndarray) -> None:
    Image.fromarray((values_HW * 4095).astype(np.uint16)).save(path.with_suffix(".png"))


def floats(path: Path, values_HW: np.ndarray) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), (values_HW * 300 - 40).astype(np.float32))


def channels(path: Path, values_HW: np.ndarray) -> None:
    stack = np.stack([values_HW * scale for scale in (1, 0.5, 0.2, 0.1, 0.7)], axis=2)
    np.save(path.with_suffix(".npy"), (stack * 255).astype(np.uint8))


KINDS: dict[str, tuple[Callable[[Path, np.ndarray], None], int, str]] = {
    "sixteen": (sixteen_bit, 1, "a/00.png has more"),
    "floats": (floats, 1, "a/00.tif has more"),
    "channels": (channels, 5, "these have 5 channels"),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Images of two classes of one kind in data/, and an encoder of as many channels in source/."""
    write, in_chans, _ = KINDS[request.param]
    random = np.random.default_rng(3)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(20):
            write(tmp_path / "data" / name / f"{index:02d}", random.random((8, 8)))
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny_classes, "MEAN", (0.3,) * in_chans)
    patch.setattr(tiny_classes, "STD", (0.4,) * in_chans)
    tiny_classes.write_encoder(tmp_path / "source", in_chans=in_chans)
    patch.undo()
    return str(request.param)


def run(place: Path, out: str, *more: str) -> int:
    words = ["finetune", str(place / "source"), "--data", str(place / "data"), *WORDS, "--out", str(place / out)]
    return cli.main([*words, *more])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_the_defaults_take_them_and_say_what_is_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, in the run's config, and so that a resumed run is the same run."""
    assert run(tmp_path, "whole") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("only shears, shifts and rotations are made") == 1
    assert KINDS[kind][2] in said
    assert "rand-m9-mstd0.5-inc1 (of it shears, shifts and rotations)" in said
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["policy_parts"] == "geometric"

    assert run(tmp_path, "parts", "--steps", "4", "--save-minutes", "0.0000001", "--keep", "9") == 0
    out = tmp_path / "parts"
    for name in ("step-000003", "step-000004"):
        assert (out / "checkpoints" / name).is_dir()
    for path in sorted((out / "checkpoints" / "step-000004").iterdir()):
        path.unlink()
    (out / "checkpoints" / "step-000004").rmdir()
    capsys.readouterr()
    assert cli.main(["resume", str(out)]) == 0
    assert "only shears" not in capsys.readouterr().out, "it was said when the run began"
    assert losses(out) == losses(tmp_path / "whole")
    assert read_passport(out / "model.safetensors").classes == ("a", "b")
    assert cli.main(["predict", str(out), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "p.csv")]) == 0
    words = ["finetune", str(out), "--data", str(tmp_path / "data"), "--eval", "--device", "cpu"]
    assert cli.main([*words, "--out", str(tmp_path / "eval")]) == 0
    cards = [json.loads((folder / "card.json").read_text()) for folder in (out, tmp_path / "eval")]
    assert cards[0]["top1"] == cards[1]["top1"]


@pytest.mark.parametrize(
    "asked", [["--auto-augment", "rand-m9-mstd0.5-inc1"], ["--color-jitter", "0.4"], ["--policy-parts", "all"]]
)
def test_what_was_asked_for_is_refused(
    kind: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the way out that the message names is one."""
    assert run(tmp_path, "run", *asked) == 2
    error = capsys.readouterr().err
    assert KINDS[kind][2] in error
    assert "--policy-parts geometric --color-jitter 0 moves pixels only" in error
    if kind == "channels":
        assert run(tmp_path, "run", *asked, "--policy-parts", "geometric", "--color-jitter", "0") == 0


def test_photographs_keep_the_whole_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_classes.write_images(tmp_path / "data", {"a": 20, "b": 20})
    tiny_classes.write_encoder(tmp_path / "source")
    assert run(tmp_path, "run") == 0
    assert "shears" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["policy_parts"] == "all"


def test_nothing_is_left_of_augmix() -> None:
    config = FinetuneConfig(data="x", auto_augment="augmix-m5-w4", policy_parts="geometric")
    assert any("augmix" in problem for problem in config.problems())
