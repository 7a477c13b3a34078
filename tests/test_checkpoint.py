"""Checkpoints: bit-equal round trips, a crash at every operation of a save, full disks, what is kept, publishing."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import signal
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maekit.config import UserError
from maekit.training import checkpoint as module
from maekit.training.checkpoint import Checkpoint, latest, load, publish, save, verify


def make_checkpoint(value: float = 1.0) -> Checkpoint:
    weights = {"a": torch.full((3, 4), value), "b": torch.arange(5)}
    return Checkpoint(weights, {"step/a": torch.tensor(value)}, {"torch_cpu/rank0": torch.zeros(8, dtype=torch.uint8)},
                      {"value": value}, {"kind": "mae"})  # fmt: skip


def value_of(path: Path) -> float:
    """The value that all parts of a checkpoint agree on."""
    read = load(path)
    assert (read.model["a"] == read.optimizer["step/a"]).all()
    assert read.state["value"] == read.optimizer["step/a"].item()
    return float(read.state["value"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, flat.numpy().tobytes()


# ---- round trips ----


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {
        "tied": shared,
        "tied again": shared,
        "transposed": shared.t(),
        "slice": torch.randn(100)[7:9],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "bfloat16": torch.randn(5).bfloat16(),
        "float64": torch.tensor([math.pi, -0.0, math.inf, math.nan], dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    state = {"step": 7, "nested": {"list": [1, None, "\u00e9"]}, "float": 0.1 + 0.2, "best": math.inf}
    metadata = {"kind": "mae", "mean": "[0.485]", "text": "\u00e9\n\0"}
    path = save(tmp_path / "checkpoints", 7, Checkpoint(tensors, {"x": torch.ones(2)}, {}, state, metadata), keep=1)
    read = load(path)
    assert {name: bits(t) for name, t in read.model.items()} == {name: bits(t) for name, t in tensors.items()}
    assert read.optimizer["x"].tolist() == [1, 1]
    assert read.rng == {}
    assert read.state == state
    assert read.model_metadata == metadata
    assert path.name == "step-000007"
    assert names(path) == sorted(module.FILES)
    assert save(tmp_path / "checkpoints", 12345678, make_checkpoint(), keep=1).name == "step-12345678"


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_checkpoint(2.0), keep=1)
    read = load(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(path / "model.safetensors")))
    assert (read.model["a"] == 2).all()


def test_files_follow_the_umask(tmp_path: Path) -> None:
    """A published file is for others to read, too; safetensors itself writes 0600."""
    before = os.umask(0o022)
    try:
        path = save(tmp_path, 1, make_checkpoint(), keep=1)
    finally:
        os.umask(before)
    assert {os.stat(path / name).st_mode & 0o777 for name in module.FILES} == {0o644}


# ---- crashes ----


class DiedError(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


class Crasher:
    """Counts the operations that change the disk; the k-th fails half way, or kills the process (k = 0: none)."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, dies: bool) -> None:
        self.count, self.at, self.dies = 0, at, dies
        for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir"):
            patch.setattr(os, name, self.wrapped(getattr(os, name)))
        patch.setattr(os, "fsync", self.wrapped(lambda handle: None))  # the disk's time is not what is tested
        patch.setattr(module, "save_file", self.wrapped(save_file, lambda tensors, path: path))
        patch.setattr(module, "open", self.wrapped(open, lambda path, mode: path if mode == "wb" else None), False)

    def wrapped(self, real: Callable[..., Any], written: Callable[..., Path | None] | None = None) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.dies and 0 < self.at <= self.count:
                raise DiedError
            self.count += 1
            if self.count == self.at:
                if written and (path := written(*args)):
                    path.write_bytes(b"half")
                raise DiedError if self.dies else OSError(errno.EIO, "simulated")
            return real(*args, **kwargs)

        return operation


def crash(action: Callable[[], object], at: int, dies: bool) -> tuple[bool, int]:
    """Act with a failure at one operation; whether that raised, and the number of operations."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crasher = Crasher(patch, at, dies)
        try:
            action()
        except (OSError, DiedError):
            return True, crasher.count
    return False, crasher.count


SCENARIOS: dict[str, tuple[tuple[int, ...], int, int]] = {  # steps that are there, step that is saved, keep
    "first": ((), 3, 2),
    "next": ((1, 2), 3, 2),
    "same step": ((1, 2), 2, 2),
    "same step, the only one": ((2,), 2, 1),
}


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, scenario: str, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    there, step, keep = SCENARIOS[scenario]
    before = tmp_path / "before"
    for other in there:
        save(before / "checkpoints", other, make_checkpoint(float(other)), keep=2)
    before.mkdir(exist_ok=True)
    operations = at = 0
    while at <= operations:
        shutil.copytree(before, tmp_path / str(at))
        folder = tmp_path / str(at) / "checkpoints"
        raised, count = crash(lambda folder=folder: save(folder, step, make_checkpoint(9.0), keep), at, dies)  # type: ignore[misc]
        if at == 0:
            operations = count
            assert not raised
            assert operations >= 20
            assert all(name.startswith("step-") for name in names(folder))
        if folder.exists():
            assert all(verify(path) == [] for path in folder.glob("step-*")), (at, "half of one has a good name")
        path, _ = latest(folder)
        value = value_of(path) if path else None
        assert value in ((max(there) if there else None, 9.0) if raised else (9.0,)), (at, value)
        if raised and not dies:
            assert not [name for name in names(folder) if ".tmp-" in name] if folder.exists() else True, at
            assert all(verify(folder / f"step-{other:06d}") == [] for other in there), at
        save(folder, 4, make_checkpoint(4.0), keep)
        assert len(names(folder)) <= keep, (at, names(folder))
        assert all(verify(folder / name) == [] for name in names(folder)), (at, names(folder))
        newest, messages = latest(folder)
        assert (newest, messages) == (folder / "step-000004", [])
        shutil.rmtree(folder)
        at += 1


def test_a_killed_process_leaves_nothing_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, make_checkpoint(1.0), keep=2)
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(module, "save_file", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, 2, make_checkpoint(2.0), keep=2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(names(tmp_path)) == 2
    assert f".tmp-{child}@" in names(tmp_path)[0]
    path, messages = latest(tmp_path)
    assert path == tmp_path / "step-000001"
    assert messages == []
    assert names(tmp_path) == ["step-000001"]


def test_files_of_a_living_process_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, make_checkpoint(), keep=1)
    living = tmp_path / f".step-000009.tmp-{os.getppid()}@{module._host()}"
    elsewhere = tmp_path / ".step-000008.tmp-1@another-host"
    own = tmp_path / f".step-000007.tmp-{os.getpid()}@{module._host()}"
    for path in (living, elsewhere, own):
        path.mkdir()
    latest(tmp_path)
    assert living.exists()
    assert elsewhere.exists()  # a reader cannot know; a save on that host may be under way
    assert own.exists()  # perhaps another thread's
    save(tmp_path, 2, make_checkpoint(), keep=1)
    assert names(tmp_path) == [living.name, "step-000002"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def rename(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        real_rename(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = tmp_path / "checkpoints"
    save(folder, 1, make_checkpoint(), keep=1)
    temporary = module._hidden(folder, 1, "tmp").name
    assert events[0] == tmp_path.name  # checkpoints/ itself is new there
    assert set(events[1:-3]) == set(module.FILES)
    assert events[-3:] == [temporary, f"{temporary} -> step-000001", "checkpoints"]


@pytest.mark.parametrize("fault", ["value", "name", "metadata"])
def test_what_is_read_back_must_equal_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    save(tmp_path, 1, make_checkpoint(1.0), keep=1)

    def faulty(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if fault == "value":
            tensors = {name: t + 1 if name == "a" else t for name, t in tensors.items()}
        elif fault == "name":
            tensors = {name: t for name, t in tensors.items() if name != "a"}
        else:
            metadata = None
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", faulty)
    with pytest.raises(OSError, match="read back differently"):
        save(tmp_path, 2, make_checkpoint(2.0), keep=1)
    assert names(tmp_path) == ["step-000001"]
    assert value_of(tmp_path / "step-000001") == 1.0


# ---- full disks ----


def test_a_disk_without_room_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = make_checkpoint()
    big.model["big"] = torch.zeros(10_000_000, dtype=torch.uint8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_900_000))
    with pytest.raises(OSError, match=r"needs 11\.0 MB, 10\.9 MB are free.*--keep") as caught:
        save(tmp_path, 1, big, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 11_100_000))
    save(tmp_path, 1, big, keep=1)


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """A limit on file sizes stops the real writer in the middle, as a quota does; the error keeps its number."""
    save(tmp_path, 1, make_checkpoint(1.0), keep=1)
    big = make_checkpoint()
    big.optimizer["big"] = torch.zeros(1_000_000, dtype=torch.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"optimizer\.safetensors") as caught:
            save(tmp_path, 2, big, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["step-000001"]
    assert value_of(tmp_path / "step-000001") == 1.0


def test_state_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = make_checkpoint()
    bad.state["tensor"] = torch.ones(1)
    with pytest.raises(TypeError):
        save(tmp_path / "new", 1, bad, keep=1)
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    with pytest.raises(UserError, match="at most 10"):
        save(tmp_path / "new", 1, make_checkpoint(), keep=1)
    assert not (tmp_path / "new").exists()


# ---- which ones are kept ----


def test_keep(tmp_path: Path) -> None:
    for step in (5, 999_999, 1_000_000, 1_000_001):  # in the order of numbers, not of letters
        save(tmp_path, step, make_checkpoint(), keep=2)
    assert names(tmp_path) == ["step-1000000", "step-1000001"]
    assert latest(tmp_path)[0] == tmp_path / "step-1000001"
    save(tmp_path, 1_000_002, make_checkpoint(), keep=1)
    assert names(tmp_path) == ["step-1000002"]


def test_going_back_behind_a_damaged_checkpoint(tmp_path: Path) -> None:
    """What the run continued from is kept; the damaged one is not, a whole one is never removed for being newer."""
    for step in (10, 30, 40):
        save(tmp_path, step, make_checkpoint(), keep=3)
    (tmp_path / "step-000030" / "state.json").write_bytes(b"")
    save(tmp_path, 20, make_checkpoint(), keep=2)
    assert names(tmp_path) == ["step-000010", "step-000020", "step-000040"]


# ---- publishing ----


@pytest.mark.parametrize("links", [True, False], ids=["link", "copy"])
def test_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    run = tmp_path / "run"
    destination = run / "model.safetensors"
    paths = [save(run / "checkpoints", step, make_checkpoint(float(step)), keep=2) for step in (1, 2)]
    (run / ".model.safetensors.tmp-1@another-host").write_bytes(b"left over")
    for path in (paths[0], paths[0], paths[1], paths[1]):  # the same again: a rename over itself would leave a file
        publish(path, destination)
        assert destination.read_bytes() == (path / "model.safetensors").read_bytes()
        assert names(run) == ["checkpoints", "model.safetensors"]
    assert os.path.samefile(destination, paths[1] / "model.safetensors") == links
    published = destination.read_bytes()
    for step in (3, 4):
        save(run / "checkpoints", step, make_checkpoint(float(step)), keep=1)
    assert destination.read_bytes() == published


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_a_crash_while_publishing_leaves_the_old_or_the_new_file(tmp_path: Path, dies: bool) -> None:
    destination = tmp_path / "model.safetensors"
    one, two = (save(tmp_path / "checkpoints", step, make_checkpoint(float(step)), keep=2) for step in (1, 2))
    whole = [(path / "model.safetensors").read_bytes() for path in (one, two)]
    operations = crash(lambda: publish(two, destination), 0, dies)[1]
    assert operations >= 3
    for at in range(1, operations + 1):
        publish(one, destination)
        raised, _ = crash(lambda: publish(two, destination), at, dies)
        assert destination.read_bytes() in (whole if raised else whole[1:])
        publish(two, destination)
        assert names(tmp_path) == ["checkpoints", "model.safetensors"]
