"""Damaged and hostile checkpoints are named and skipped, never read as if they were whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import make_checkpoint

from maekit.config import UserError
from maekit.training import checkpoint as module
from maekit.training.checkpoint import latest, load, save, verify

PROMISE = "a damaged checkpoint is found by its checksum and the one before is taken"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, become_pipe])
@pytest.mark.parametrize("name", module.FILES)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for step in (1, 2):
        save(tmp_path, step, make_checkpoint(float(step)), keep=2)
    damage(tmp_path / "step-000002" / name)
    path, messages = latest(tmp_path)
    assert path == tmp_path / "step-000001"
    assert len(messages) == 1
    assert messages[0].startswith("step-000002 skipped: ")
    assert name.split(".")[0] in messages[0]
    with pytest.raises(UserError, match=name.split(".")[0]):
        load(tmp_path / "step-000002")
    save(tmp_path, 3, make_checkpoint(3.0), keep=2)
    assert latest(tmp_path) == (tmp_path / "step-000003", [])


def test_any_flipped_bit_of_the_manifest_shows(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_checkpoint(), keep=1)
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    for index in range(0, len(data), 3):
        manifest.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        assert verify(path), (index, data[index : index + 1])
    manifest.write_bytes(data)
    assert verify(path) == []


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") == (None, [])
    assert latest(tmp_path) == (None, [])
    (tmp_path / "step-000001").mkdir()
    path, messages = latest(tmp_path)
    assert path is None
    assert messages == ["step-000001 skipped: manifest.json: No such file or directory"]


@pytest.mark.parametrize("outside", ["../../x", "/etc/hostname", "sub/model.safetensors", "extra.bin"])
def test_a_manifest_names_only_the_fixed_files(tmp_path: Path, outside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, make_checkpoint(), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    for files in (
        {**manifest["files"], outside: {"size": 0, "sha256": ""}},
        {outside: {"size": 0, "sha256": ""}},
        [outside],
    ):
        (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        assert "must name" in verify(path)[0]
        assert outside in verify(path)[0]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_entry", lambda path: pytest.fail(f"{path} was opened"))
            with pytest.raises(UserError, match="must name"):
                load(path)


def reseal(path: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: module._entry(path / name) for name in module.FILES[:-1]}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", b"[" * 200_000, "nested too deeply"),
        ("state.json", b" " * ((16 << 20) + 1), "larger than"),
        ("state.json", b"[]", "not a JSON object"),
        ("state.json", b"\xff\xfe{", "not JSON"),
        ("model.safetensors", b"\xff" * 64, "(?i)header"),
        ("rng.safetensors", b"", "(?i)header"),
    ],
)
def test_hostile_files_with_right_checksums_are_errors_not_crashes(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = save(tmp_path, 1, make_checkpoint(), keep=1)
    (path / name).write_bytes(content)
    reseal(path)
    assert verify(path) == []
    with pytest.raises(UserError, match=words):
        load(path)


def test_a_manifest_of_another_format_or_step_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_checkpoint(), keep=1)
    copy = Path(shutil.copytree(path, tmp_path / "best"))
    assert verify(copy) == []
    shutil.copytree(path, tmp_path / "step-000005")
    assert verify(tmp_path / "step-000005") == ["manifest.json: belongs to step 1"]
    manifest = json.loads((path / "manifest.json").read_text())
    for change, words in (({"version": 2}, "format version 2"), ({"format": "other"}, "not the manifest of a maekit")):
        (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert words in verify(path)[0]
