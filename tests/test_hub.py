"""maekit push and hub: sources, against a stand-in on this machine for the few calls that huggingface_hub makes.

The client is the real one; nothing here leaves the loopback interface.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from fake_hub import Hub, stand_in
from safetensors.torch import save_file

from maekit import cli
from maekit.config import UserError
from maekit.weights import hub
from maekit.weights.store import load, random_model

__all__ = ["stand_in"]

huggingface_hub: Any = pytest.importorskip("huggingface_hub")


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's folder with weights and a probe's card."""
    model = random_model(tiny_config(img_size=(8,)))
    for name, value in {"data": "digits", "epochs": 12.0, "steps": 345, "recipe": "digits", **changes}.items():
        setattr(model.passport, name, value)
    run = folder / "run"
    (run / "probe-digits").mkdir(parents=True)
    save_file(model.state_dict(), run / "model.safetensors", metadata=model.passport.to_metadata())
    scores = [{"source": "/home/me/secret/run", "pooling": "mean", "linear": 0.912, "knn": 0.834}]
    card = {"data": "digits", "training_images": 1437, "test_images": 360, "scores": scores}
    (run / "probe-digits" / "card.json").write_text(json.dumps(card))
    (run / "config.json").write_text('{"data": "/home/me/secret"}')
    return run


def test_what_is_pushed_comes_back(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert cli.main(["push", str(run), "me/mae-digits", "--private", "--license", "apache-2.0"]) == 0
    assert f"uploaded: {stand_in.address}/me/mae-digits/commit/" in capsys.readouterr().out
    held = stand_in.files["me/mae-digits"]
    assert held.keys() == {"model.safetensors", "README.md"}
    assert stand_in.private == {"me/mae-digits"}
    assert len(stand_in.commits) == 1, "both files in one commit"
    assert any(line.startswith("PUT ") for line in stand_in.asked), "weights go as a large object"
    card = held["README.md"].decode()
    for word in ("license: apache-2.0", "12 epochs (345 steps) on digits", 'maekit.load("hub:me/mae-digits")',
                 "| run | mean | 91.2 | 83.4 |", "1,437 training and 360 test images"):  # fmt: skip
        assert word in card
    assert "secret" not in card
    assert "home" not in card

    folder = hub.fetch("hub:me/mae-digits")
    found, sent = load(folder), load(run)
    assert all(torch.equal(value, sent.state_dict()[name]) for name, value in found.state_dict().items())
    assert found.passport.weights_license == "apache-2.0"
    assert found.passport.data == "digits"


def test_files_that_explain_weights_come_along(stand_in: Hub) -> None:
    stand_in.files["them/vit"] = {"model.safetensors": b"w", "config.json": b"{}", "run.py": b"evil()", "a.bin": b"x"}
    folder = hub.fetch("them/vit")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert hub.fetch(f"them/vit@{folder.name}") == folder


def test_the_cache_serves_without_a_hub(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.files["them/vit"] = {"model.safetensors": b"w"}
    folder = hub.fetch("them/vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("them/vit") == folder
    with pytest.raises(UserError, match="cannot be reached, and the cache does not hold"):
        hub.fetch("them/other")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("them/nothing", "no such repository, or a private one"),
        ("them/vit@v9", "no such revision"),
        ("them/empty", "there is no model.safetensors or pytorch_model.bin in it"),
        ("a/b/c", "no name of a repository"),
        ("", "no name of a repository"),
    ],
)
def test_what_cannot_be_fetched_is_said(stand_in: Hub, name: str, word: str) -> None:
    stand_in.files |= {"them/vit": {"model.safetensors": b"w"}, "them/empty": {"README.md": b""}}
    with pytest.raises(UserError, match=word):
        hub.fetch(name)


def test_nothing_is_uploaded_by_a_dry_run(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(make_run(tmp_path)), "me/mae", "--dry-run"]) == 0
    assert "license: unknown" in capsys.readouterr().out
    assert not stand_in.asked


def test_a_licence_stays(tmp_path: Path, stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, weights_license="CC-BY-NC-4.0")
    assert cli.main(["push", str(run), "me/mae", "--license", "mit"]) == 2
    assert "another one already (CC-BY-NC-4.0)" in capsys.readouterr().err
    assert not stand_in.asked


def test_who_may_not_write_is_told(
    tmp_path: Path, stand_in: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    run = make_run(tmp_path)
    assert cli.main(["push", str(run), "me/mae"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert cli.main(["push", str(run), "me/mae"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    for words, word in ((["random:vit_tiny_patch16_224", "me/mae"], "only files can be pushed"),
                        ([str(run), "mae"], "write owner/name"), ([str(run)], "a name on the hub")):  # fmt: skip
        assert cli.main(["push", *words]) == 2
        assert word in capsys.readouterr().err
