"""`--init`: a pretraining that begins with somebody's weights, resized to the run, with a schedule of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import SMALLEST, assert_same_run, run, tensors

import maekit
from maekit import cli
from maekit.tasks import pretrain

WORDS = ["pretrain", "digits", *SMALLEST, "--batch-size", "128", "--steps", "4", "--warmup-steps", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to begin with."""
    out = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(WORDS, out) == 0
    return out


@pytest.fixture(scope="module")
def encoder(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of that run alone, as timm has it."""
    out = tmp_path_factory.mktemp("encoder") / "timm"
    assert cli.main(["convert", str(first), "--to", "timm", "--out", str(out)]) == 0
    return out


def step_zero(out: Path) -> dict[str, torch.Tensor]:
    return tensors(out, step="step-000000")


def test_it_begins_with_all_weights(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step they are the other run's to the bit; the schedule begins anew."""
    out = tmp_path / "run"
    assert run([*WORDS, "--init", str(first), "--keep", "5", "--mean", "0.5", "--std", "0.5"], out) == 0
    given = load_file(first / "model.safetensors")
    begun = step_zero(out)
    assert begun.keys() == given.keys()
    assert all(torch.equal(begun[name], given[name]) for name in given)
    assert any(not torch.equal(tensors(out)[name], given[name]) for name in given)
    said = " ".join(capsys.readouterr().out.split())
    assert "begins with" in said
    assert "decoder alone" not in said
    config = json.loads((out / "config.json").read_text())
    assert (config["mean"], config["decoder_warmup_epochs"]) == ([0.5], 0.0)
    assert maekit.load(out).passport.origin == str(first)


def test_an_encoder_waits_for_its_decoder(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six steps by its flag: not a bit of the encoder changes in them, decay included; stopped within, too."""
    words = [*WORDS, "--steps", "6", "--init", str(encoder), "--decoder-warmup-epochs", "0.1818", "--keep", "9"]
    words += ["--save-every", "0.09", "--num-heads", "2"]
    assert run(words, tmp_path / "alone") == 0
    assert "decoder alone the first 2 steps" in " ".join(capsys.readouterr().out.split())
    at = {step: tensors(tmp_path / "alone", step=f"step-{step:06d}") for step in (0, 2, 3)}
    ours = [name for name in at[0] if name.startswith("encoder.")]
    assert all(torch.equal(at[0][name], at[2][name]) for name in ours)
    assert not torch.equal(at[0]["decoder.pred.weight"], at[2]["decoder.pred.weight"])
    assert not torch.equal(at[2]["encoder.blocks.0.attn.qkv.weight"], at[3]["encoder.blocks.0.attn.qkv.weight"])
    watch = pretrain.watch

    def stop(job: Any, *rest: Any) -> bool:
        if job.position.step == 1:
            job.stop.number = 15
        return watch(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "watch", stop)
        assert run(words, tmp_path / "run") == 143
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize(
    ("length", "said"),
    [(["--steps", "6"], "the decoder alone for 11 of 6 steps"), (["--epochs", "1"], "is as long as the run")],
)
def test_an_encoder_must_not_wait_for_ever(
    encoder: Path, length: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, *length, "--init", str(encoder), "--decoder-warmup-epochs", "1"]
    assert run(words, tmp_path / "run") == 2
    assert said in capsys.readouterr().err


def test_by_default_a_twentieth_of_the_run(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run([*WORDS, "--steps", "40", "--init", str(encoder)], out) == 0
    assert json.loads((out / "config.json").read_text())["decoder_warmup_epochs"] == pytest.approx(2 / 11)


def test_sizes_are_adapted(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the image, so four times the patches: positions are resized, and that is said."""
    assert run([*WORDS, "--init", str(first), "--img-size", "16"], tmp_path / "run") == 0
    assert "resized" in " ".join(capsys.readouterr().out.split())
    own = step_zero(tmp_path / "run")
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert torch.equal(own[name], load_file(first / "model.safetensors")[name])
    assert own["decoder.pos_embed"].shape[1] == 4 * 16 + 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--depth", "3"], "has depth 2, the run 3: --depth 2"),
        (["--decoder-dim", "12"], "--decoder-dim 8, or --no-init-decoder"),
        (["--target", "norm-pixels"], "has target pixels, the run norm-pixels"),
    ],
)
def test_other_architectures_are_refused(
    flags: list[str], says: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with the flag that would fit; nothing is left behind."""
    assert run([*WORDS, "--init", str(first), *flags], tmp_path / "run") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_licence_is_carried_along(first: Path, tmp_path: Path) -> None:
    """Of the weights that it began with, also after a resume."""
    weights = tmp_path / "w.safetensors"
    model = maekit.load(first)
    model.passport.weights_license = "CC-BY-NC-4.0"
    from safetensors.torch import save_file

    save_file(dict(model.state_dict()), weights, metadata=model.passport.to_metadata())
    assert run([*WORDS, "--init", str(weights), "--no-init-decoder"], tmp_path / "run") == 0
    assert maekit.load(tmp_path / "run").passport.weights_license == "CC-BY-NC-4.0"
    assert cli.main(["resume", str(tmp_path / "run"), "--steps", "5"]) == 0
    assert maekit.load(tmp_path / "run").passport.weights_license == "CC-BY-NC-4.0"


def test_no_such_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--init", str(tmp_path / "none.pth")], tmp_path / "run") == 2
    assert "no such run or file" in capsys.readouterr().err
