"""Wrong input gets one clear line with the value and the flag, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import docstring_parser
import numpy as np
import pytest
import torch
from PIL import Image

from maekit import cli, recipes
from maekit.config import ModelConfig, PretrainConfig, ProbeConfig, UserError, adapt_durations
from maekit.configfile import from_json, to_json


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and stderr of one command."""
    try:
        code = cli.main(list(words))
    except SystemExit as stop:  # tyro's own errors
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


PRETRAIN_ERRORS = {
    "unknown recipe": (["cifar11"], ["cifar11", "did you mean cifar10"]),
    "no recipe": (["--data", "digits"], ["recipe comes first"]),
    "unknown model": (["digits", "--model", "vit_tinny_patch16_224"], ["--model", "did you mean vit_tiny_patch16_224"]),
    "refused model": (["digits", "--model", "resnet18"], ["--model resnet18", "ResNet"]),
    "no such data": (["folder", "--data", "nowhere/images"], ["--data nowhere/images", "no such file or folder"]),
    "no data": (["folder"], ["--data is missing"]),
    "size": (["digits", "--img-size", "9"], ["--img-size 9", "--patch-size 2"]),
    "epochs": (["digits", "--epochs", "0"], ["--epochs 0", "above 0"]),
    "negative epochs": (["digits", "--epochs", "-3"], ["--epochs -3", "above 0"]),
    "steps": (["digits", "--steps", "0"], ["--steps 0", "above 0"]),
    "warm-up": (["digits", "--warmup-epochs", "-1"], ["--warmup-epochs -1", "negative"]),
    "long warm-up": (["digits", "--epochs", "2", "--warmup-epochs", "3"], ["--warmup-epochs 3", "--epochs 2"]),
    "two lengths": (["digits", "--epochs", "3", "--steps", "9"], ["either as --epochs or as --steps"]),
    "mask ratio": (["digits", "--mask-ratio", "0.99"], ["--mask-ratio 0.99", "0.95"]),
    "batch": (["digits", "--batch-size", "5000"], ["--batch-size 5000", "1409 training images"]),
    "accumulation": (["digits", "--batch-size", "64", "--accum", "7"], ["--batch-size 64", "--accum 7"]),
    "heads": (["digits", "--num-heads", "5"], ["--embed-dim 64", "--num-heads 5"]),
    "device": (["digits", "--device", "tpu"], ["--device tpu"]),
    "absent device": (["digits", "--device", "mps"], ["--device mps", "not available"]),
    "statistics": (["digits", "--mean", "0.5", "0.5", "--std", "1"], ["--mean has 2 values", "--in-chans is 1"]),
    "processes": (["digits", "--processes", "2"], ["2 processes were asked for, but 1 started", "torchrun"]),
    "config file": (["nowhere.json"], ["nowhere.json", "no such config file"]),
}


@pytest.mark.parametrize("name", PRETRAIN_ERRORS)
def test_pretrain_names_the_value_and_the_flag(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the words, no traceback, and no folder is begun."""
    monkeypatch.chdir(tmp_path)
    words, expected = PRETRAIN_ERRORS[name]
    code, error = run(capsys, "pretrain", *words, *(["--out", "run"] if len(words) > 1 else []))
    assert code == 2
    assert all(text in error for text in expected), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_all_config_problems_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Three mistakes, three lines, before any data is read."""
    words = ["pretrain", "folder", "--data", "nowhere", "--mask-ratio", "2", "--img-size", "33", "--epochs", "0"]
    code, error = run(capsys, *words)
    assert code == 2
    assert [line for line in error.splitlines() if "--mask-ratio 2" in line]
    assert [line for line in error.splitlines() if "--img-size 33" in line]
    assert [line for line in error.splitlines() if "--epochs 0" in line]


def test_other_commands_explain_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command, a missing source, a folder that is no run, a file that is no weights."""
    (tmp_path / "weights.safetensors").write_bytes(b"no")
    for words, expected in (
        (["pretran"], "did you mean pretrain"),
        (["probe", "--data", "digits"], "a source of weights is missing"),
        (["probe", str(tmp_path), "--data", "digits"], "not a run"),
        (["probe", str(tmp_path / "weights.safetensors"), "--data", "digits"], "not a readable safetensors file"),
        (["probe", "nowhere", "--data", "digits"], "no such run or file"),
        (["resume", str(tmp_path)], "holds no run"),
        (["reconstruct", "random:vit_tinny", "--image", "x.png"], "no such model"),
        (["recipes", "cifar11"], "no such recipe"),
        (["pretrain", "digits", "--mask-ration", "0.5"], "mask-ratio"),
        (["pretrain", "digits", "--epochs", "many"], "epochs"),
    ):
        code, error = run(capsys, *words)
        assert (code, expected in error) == (2, True), (words, error)


def test_a_folder_without_a_readable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty, without images, and with images that are none; and one with too few images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("x")
    (tmp_path / "broken").mkdir()
    for index in range(20):
        (tmp_path / "broken" / f"{index}.jpg").write_bytes(b"no image")
    (tmp_path / "few").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "few" / "one.png")
    tiny = ["--img-size", "16", "--patch-size", "8", "--embed-dim", "16", "--depth", "1", "--batch-size", "4"]
    tiny += ["--num-heads", "2"]
    for folder, expected in (
        ("empty", "empty"),
        ("texts", "texts"),
        ("broken", "none of 20 sampled images can be read"),
        ("few", "too few"),
    ):
        words = ["pretrain", "folder", "--data", str(tmp_path / folder), "--out", str(tmp_path / "run"), *tiny]
        code, error = run(capsys, *words, "--workers", "0")
        assert (code, expected in error) == (2, True), (folder, error)
        assert not (tmp_path / "run").exists()


def test_help_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    """Help names every command and the recipes' listing every recipe, with cost and expected result."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipes.names())
    assert cli.main(["--version"]) == 0
    assert "maekit 0." in capsys.readouterr().out


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_complete_and_sound(name: str) -> None:
    """Each has its header, its own name, no problem but perhaps the data, and survives JSON."""
    config = recipes.get(name)
    says = recipes.header(name)
    assert says.keys() - {"deviations"} == {"what", "command", "cost", "expected", "source"}, says.keys()
    assert f"maekit pretrain {name} " in says["command"]
    assert all("--data" in problem for problem in config.problems()), config.problems()
    assert from_json(PretrainConfig, to_json(config), "here") == config


def test_config_files_are_checked() -> None:
    """Unknown fields, wrong types and nonsense are named together; nothing else is raised."""
    with pytest.raises(UserError) as caught:
        from_json(PretrainConfig, json.dumps({"epoch": 3, "batch_size": "x", "mask": "stripes", "flip": 1}), "c.json")
    assert len(caught.value.problems) == 4
    assert "did you mean epochs" in str(caught.value)
    for text in ("", "[]", "nul", "3", '{"img_size": [[[1]]]}', "[" * 100_000):
        with pytest.raises(UserError):
            from_json(ModelConfig, text, "c.json")


def test_durations_of_a_shortened_run() -> None:
    """The warm-up keeps its share of a shorter run, unless it is given; steps replace the recipe's epochs."""
    base = recipes.get("cifar10")

    def adapted(*words: str, **changes: float | int | None) -> PretrainConfig:
        config = PretrainConfig(**{**base.__dict__, **changes})
        adapt_durations(config, base, words)
        return config

    assert adapted(epochs=20.0).warmup_epochs == pytest.approx(1.0)
    assert adapted(epochs=200.0).warmup_epochs == 5
    assert adapted(epochs=20.0, warmup_epochs=2.0).warmup_epochs == 2
    assert adapted("--warmup_epochs=5", epochs=20.0).warmup_epochs == 5  # as the recipe's, but typed
    shorter = adapted(steps=200)
    assert (shorter.epochs, shorter.warmup_epochs, shorter.warmup_steps) == (None, None, 10)
    assert not shorter.problems()


def test_ctrl_c_and_a_reader_that_has_enough_are_no_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """130 with one word; and what `maekit COMMAND --help | head` does to the rest of the text, in silence."""

    def stopped(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "probe", stopped)
    assert cli.main(["probe", "a"]) == 130
    assert capsys.readouterr().err == "maekit: stopped\n"

    def broken(_: list[str]) -> int:
        raise BrokenPipeError  # of a loader's process, say: the output is whole

    monkeypatch.setitem(cli.COMMANDS, "probe", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["probe", "a"])
    command = f"{sys.executable} -m maekit finetune --help"
    found = subprocess.run(
        ["bash", "-c", f"set -o pipefail; (sleep 0.2; {command}) | true; echo $?"], capture_output=True, text=True
    )
    assert (found.stdout, found.stderr) == ("141\n", "")


def test_help_is_running_text() -> None:
    """As wide as a terminal is: no flag's text breaks where a line of the source ends."""
    wide = os.environ | {"COLUMNS": "4000"}
    command = [sys.executable, "-m", "maekit", "probe", "--help"]  # afresh: tyro remembers what it has read
    found = subprocess.run(command, capture_output=True, text=True, env=wide)
    assert (found.returncode, found.stderr) == (0, "")
    texts = [one.description for one in docstring_parser.parse_from_object(ProbeConfig).params]
    assert max(text.count("\n") for text in texts if text) > 2
    assert [text for text in texts if text and " ".join(text.split()) not in found.stdout] == []


def test_a_recipe_tells_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """A word and a colon at the beginning of a line are no new field."""
    assert cli.main(["recipes", "keras-6x2-m75"]) == 0
    assert "published: 48.16 %" in capsys.readouterr().out
    assert cli.main(["recipes", "--help"]) == 0
    assert cli.main(["probe", "--data", "digits", "runs/a"]) == 2
    assert "a source of weights is missing, which stands before the flags" in capsys.readouterr().err


def no_memory(where: str) -> None:
    """Run out of it, as torch on a CPU and NumPy do, or as others say it."""
    if where == "torch":
        torch.empty(2**60, dtype=torch.uint8)
    elif where == "numpy":
        np.empty(2**55, np.uint8)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried ...") if where == "cuda" else RuntimeError(where)


@pytest.mark.parametrize(
    "where", ["torch", "numpy", "cuda", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ...", "MPS backend out of memory"]
)
def test_out_of_memory_names_the_flags(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "recipes", lambda _: no_memory(where))
    code, error = run(capsys, "recipes")
    assert code == 2 and error.startswith("maekit: error: out of memory: lower --batch-size, or keep it with --accum")
    assert len(error.splitlines()) == 1


def test_other_errors_are_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "recipes", lambda _: no_memory("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["recipes"])
