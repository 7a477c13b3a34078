"""A run's folder from a stranger, or damaged by a disk: `maekit resume` refuses it in one line, and at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_fuzz import bounded, spoil
from test_untrusted import PROMISE, command, run

from maekit.training import checkpoint
from maekit.weights.store import WEIGHTS_FILE

__all__ = ["PROMISE", "run"]

CONFIGS: dict[str, tuple[str, float]] = {
    "config cut": ("cut", 0.5), "config empty": ("text", 0.0), "config is a folder": ("folder", 0.0),
    "config is a pipe": ("pipe", 0.0), "config is a link to itself": ("link", 0.0),
    "config is the weights": ("swap", 0.0), "config gone": ("gone", 0.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    CONFIGS,
)
def test_resume_refuses_a_damaged_config(name: str, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    how, place = CONFIGS[name]
    spoil(copy / "config.json", how, place, "", copy / WEIGHTS_FILE)
    code, error = command("resume", str(copy))
    assert code == 2, error


@pytest.mark.parametrize("how", ["flip", "cut", "text", "pipe", "folder", "link", "gone", "swap"])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_resume_refuses_damaged_checkpoints(name: str, how: str, run: Path, tmp_path: Path) -> None:
    """All checkpoints damaged alike: none is taken."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for path in (copy / "checkpoints").iterdir():
        spoil(path / name, how, 0.5, "[/red] words", path / "state.json")
    code, error = command("resume", str(copy), "--steps", "9")
    assert code == 2, error


@pytest.mark.parametrize("field", ["depth", "decoder_depth", "embed_dim", "img_size", "reg_tokens"])
def test_resume_refuses_sizes_that_no_machine_can_build(field: str, run: Path, tmp_path: Path) -> None:
    """A config.json that asks for a billion blocks is refused at once, not built."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    huge: Any = [10**9] if field == "img_size" else 10**9
    (copy / "config.json").write_text(json.dumps(config | {field: huge}))
    with bounded():
        code, error = command("resume", str(copy), "--steps", "9")
    assert code == 2, error
    assert f"--{field.replace('_', '-')} 1000000000: at most" in error


@pytest.mark.parametrize("how", ["pipe", "folder"])
def test_resume_opens_no_pipe_as_its_log(how: str, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    spoil(copy / "metrics.jsonl", how, 0.0, "", copy / "config.json")
    with bounded():
        code, error = command("resume", str(copy), "--steps", "9")
    assert code == 2
    assert "metrics.jsonl: not a plain file" in error


@pytest.mark.parametrize("change", [{"step": -1}, {"metrics_bytes": -5}, {"train_trivial": 0.0}, {"watched": 999}])
def test_resume_refuses_a_position_that_cannot_be(change: dict[str, Any], run: Path, tmp_path: Path) -> None:
    """All checkpoints alike, each sealed again with good checksums."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for path in (copy / "checkpoints").iterdir():
        state, manifest = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
        (path / "state.json").write_text(json.dumps(state | change))
        manifest["files"]["state.json"] = checkpoint._entry(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    code, error = command("resume", str(copy), "--steps", "9")
    assert code == 2, error
    assert f"state.json: {next(iter(change))}" in error or "a trivial loss" in error
