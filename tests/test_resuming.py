"""Going on with a run: under other circumstances, and by the command that began it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import DIGITS, folder_words, make_images, metrics, run, state, without_pictures

from maekit import cli
from maekit.config import FinetuneConfig, PretrainConfig, ResumeConfig, UserError, asked_again, changed
from maekit.training import supervised


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    without_pictures(monkeypatch)


def test_a_command_that_is_given_again_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It begins the run, then continues it, then finds it finished; the numbers are those of a run left alone."""
    words = [*DIGITS, "--or-resume"]
    assert run([*DIGITS, "--steps", "4"], tmp_path / "alone") == 0
    assert run([*words, "--steps", "4"], tmp_path / "run") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["or_resume"] is False
    newest = tmp_path / "run/checkpoints/step-000004"
    assert newest.is_dir()
    shutil.rmtree(newest)  # as if it had been stopped before
    assert run([*words, "--steps", "4", "--device", "cpu"], tmp_path / "run") == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    assert state(tmp_path / "run") == state(tmp_path / "alone")
    capsys.readouterr()
    assert run([*words, "--steps", "4"], tmp_path / "run") == 0
    assert "the run is finished" in capsys.readouterr().out
    assert run([*words, "--steps", "4", "--lr", "1e-3", "--seed=7"], tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "for lr, not 0.001; a new run needs another --out" in said
    assert "has 0 for seed, not 7" in said


@pytest.mark.parametrize(
    ("words", "task", "said"),
    [
        (["pretrain", "digits", "--or-resume"], "", "give --out"),
        (["pretrain", "digits", "--or-resume", "--out", "OUT"], "segment", "holds a run of maekit segment"),
        (["finetune", "SRC", "--data", "D", "--or-resume", "--out", "OUT"], "", "holds a run of maekit pretrain"),
        (["segment", "SRC", "--data", "D", "--or-resume", "--out", "OUT"], "finetune", "holds a run of maekit finet"),
    ],
)
def test_what_is_no_run_of_this_command(
    words: list[str], task: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": task} if task else {}))
    assert cli.main([str(tmp_path) if word == "OUT" else word for word in words]) == 2
    assert said in capsys.readouterr().err


def test_only_what_was_said_is_compared() -> None:
    """A run's config holds what its machine chose; paths may be spelled anew; the machine may be another."""
    held = FinetuneConfig(source="runs/a", data="/data", out="/runs/b", precision="fp32", workers=3, lr=1e-3)
    asked = FinetuneConfig(source="runs/a", data="data", out="b", workers=8, lr=1e-3)
    typed = ["--data", "--out", "--workers", "--lr", "--precision", "--or-resume"]
    assert asked_again(asked, held, typed, "b") == ResumeConfig(data="data", workers=8)
    with pytest.raises(UserError, match="has True for flip, not False"):
        asked_again(dataclasses.replace(asked, flip=False), held, ["--no-flip"], "b")
    asked.source, asked.seed = "runs/other", 1
    with pytest.raises(UserError) as caught:
        asked_again(asked, held, typed, "b")
    assert [problem.split("for ")[1] for problem in caught.value.problems] == [
        "source, not 'runs/other'; a new run needs another --out"
    ]


def test_one_length_at_most() -> None:
    config = PretrainConfig(steps=10, epochs=None)
    longer = changed(config, ResumeConfig(epochs=3), "out")
    assert (longer.epochs, longer.steps, longer.out) == (3, None, "out")
    assert changed(config, ResumeConfig(accum=2), "out").steps == 10
    with pytest.raises(UserError, match="either as --epochs or as --steps"):
        changed(config, ResumeConfig(epochs=3, steps=4), "out")


def test_a_run_goes_on_where_its_images_are_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moved images, less memory, and a bad file too many: what the messages advise is accepted."""
    images, moved, out = make_images(tmp_path / "images"), tmp_path / "moved", tmp_path / "run"
    assert run(folder_words(images), out, "--steps", "2") == 0
    images.rename(moved)
    assert cli.main(["resume", str(out), "--steps", "4"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    more = "--accum 2 --max-bad-share 0.5 --clip-grad 1 --grad-checkpoint True --precision fp32".split()
    assert cli.main(["resume", str(out), "--steps", "4", "--data", str(moved), *more]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["data"], config["accum"], config["clip_grad"]) == (str(moved), 2, 1)
    assert (config["max_bad_share"], config["grad_checkpoint"]) == (0.5, True)
    assert cli.main(["resume", str(out), "--steps", "6"]) == 0, "the new place is kept"


def test_a_fine_tuning_that_was_killed_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder has a config and nothing to go on from: it begins at step 0."""
    source = tmp_path / "source"
    assert run([*DIGITS, "--steps", "1"], source) == 0
    words = ["finetune", str(source), "--data", "digits", "--steps", "2", "--device", "cpu", "--compile", "off"]
    out = tmp_path / "run"

    def killed(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(supervised.SupervisedRun, "save", killed)
        assert run(words, out) == 130
    assert (out / "config.json").is_file()
    assert run([*words, "--or-resume"], out) == 0
    assert (out / "card.json").is_file()
