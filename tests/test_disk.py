"""A disk that fails: no save that fails ends a run, the checkpoints before it stand, and everybody hears of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import DIGITS, assert_same_run, checkpoints, metrics, run

from maekit import cli
from maekit.tasks import pretrain
from maekit.training import checkpoint, saving
from maekit.training.saving import SaveClock, _ordinal

PROMISE = "a disk that fails: the old checkpoint stands, training goes on, loudly"

WORDS = [*DIGITS, "--steps", "8", "--save-every", "0.1818", "--eval-every", "0.2728"]  # saves after 2, 4, 6 and 8


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.without_pictures(monkeypatch)
    monkeypatch.setattr(saving, "URGENT_WAITS", (0.0, 0.0))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose disk is well."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(WORDS, out) == 0
    return out


def breaking(patch: pytest.MonkeyPatch, number: int, breaks: Callable[[int], bool]) -> list[int]:
    """Let the writing of a checkpoint's n-th file (from 0) fail half way; returns the numbers of those that failed."""
    real, count, failed = checkpoint._write_tensors, [0], []

    def write(path: Path, *rest: Any) -> None:
        count[0] += 1
        if breaks(count[0] - 1):
            failed.append(count[0] - 1)
            path.write_bytes(b"half of a fi")
            raise OSError(number, os.strerror(number), str(path))
        real(path, *rest)

    patch.setattr(checkpoint, "_write_tensors", write)
    return failed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_save_does_not_end_the_run(
    number: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves 2 and 3 of 5 fail (each save writes three files); the run ends as one whose disk is well."""
    stand: list[list[str]] = []
    failed = breaking(monkeypatch, number, lambda file: 4 <= file <= 5)  # two saves, in the middle of each
    real = saving.save

    def save(*arguments: Any, **named: Any) -> bool:
        good = real(*arguments, **named)
        stand.append(checkpoints(tmp_path / "run"))
        assert not checkpoint.verify(tmp_path / "run" / "checkpoints" / stand[-1][-1])
        return good

    monkeypatch.setattr(pretrain, "save", save)
    assert run(WORDS, tmp_path / "run") == 0
    assert failed == [4, 5]
    assert stand[:2] == [["step-000000"], ["step-000000"]]
    assert stand[2:] == [["step-000000", "step-000006"], ["step-000006", "step-000008"]]
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint failed (1st time, 0 min without one)" in said
    assert "checkpoint failed (2nd time, 0 min without one)" in said
    assert os.strerror(number) in said
    assert "training goes on, next try in 2 min" in said
    assert_same_run(alone, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs (root)")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_really_full(
    foreseen: bool, alone: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody fills it after step 2 and makes room after step 5: two saves fail, and the run ends as it should.

    Found before anything is written, or (as when others write at the same time) by the write that fails.
    """
    if not foreseen:
        monkeypatch.setattr(checkpoint, "_check_space", lambda *_: None)
    ballast = small_disk / "ballast"

    def watch(job: Any, *rest: Any) -> bool:
        if job.position.step == 3:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        elif job.position.step == 5:
            assert checkpoints(out) == ["step-000000", "step-000002"]
            assert not checkpoint.verify(out / "checkpoints" / "step-000002")
            ballast.unlink()
        return watched(job, *rest)

    out, watched = small_disk / "run", pretrain.watch
    monkeypatch.setattr(pretrain, "watch", watch)
    assert run(WORDS, out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint failed (1st time" in said
    assert ("MB are free" in said) == foreseen
    assert_same_run(alone, out)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_slow_disk(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save takes ten times as long as the time between two of them: there is a step between any two, and no harm."""
    real, write, saved = saving.save, checkpoint._write_tensors, []

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        write(*arguments)

    def save(job: Any, *arguments: Any, **named: Any) -> bool:
        saved.append(job.position.step)
        return real(job, *arguments, **named)

    monkeypatch.setattr(checkpoint, "_write_tensors", slow)
    monkeypatch.setattr(pretrain, "save", save)
    assert run([*WORDS, "--save-minutes", "0.00025"], tmp_path / "run") == 0
    assert len(set(saved)) == len(saved) > 4
    assert_same_run(alone, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_s"] > 128 / 0.15 for line in lines if line["kind"] == "step"), "saving was counted"


def test_retries_come_soon_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2, 4 ... minutes after a failure, at most --save-minutes; a success sets it back."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = SaveClock(10, 60)
    waits = []
    for _ in range(6):
        waited = 0
        while not clock.is_due():
            now[0] += 30
            waited += 1
        waits.append(waited / 2)
        clock.note(False)
    assert waits == [10, 1, 2, 4, 8, 10]
    assert clock.unsaved == 35
    clock.note(True)
    assert (clock.wait, clock.unsaved, clock.failures) == (10, 0, 0)
    assert [_ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th"]
    )


def test_too_long_without_a_save_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half an hour a step: after the fourth the stated hour is over. Code 2, the words, and a run to resume."""
    real, late = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])

    def watch(job: Any, *rest: Any) -> bool:
        late[0] += 29 * 60 if job.position.step else 0
        return True

    monkeypatch.setattr(pretrain, "watch", watch)
    with monkeypatch.context() as patch:
        breaking(patch, errno.ENOSPC, lambda file: file >= 3)
        assert run([*WORDS, "--max-unsaved-minutes", "60"], tmp_path / "run") == 2
    said = capsys.readouterr()
    assert "checkpoint failed (2nd time, 116 min without one)" in " ".join(said.out.split())
    assert "could be written for 116 min (--max-unsaved-minutes 60)" in said.err
    assert checkpoints(tmp_path / "run") == ["step-000000"]
    monkeypatch.undo()
    tiny_runs.without_pictures(monkeypatch)
    assert cli.main(["resume", str(tmp_path / "run"), "--steps", "2"]) == 0


def test_a_last_save_that_fails_is_no_success(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tries, then exit code 1; later the run is resumed, and ends as it should have."""
    with monkeypatch.context() as patch:
        failed = breaking(patch, errno.ENOSPC, lambda file: file >= 12)
        assert run(WORDS, tmp_path / "run") == 1
    assert failed == [12, 13, 14]
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint failed (3rd time" in said
    assert "the run ends at step 8 without its checkpoint" in said
    assert checkpoints(tmp_path / "run")[-1] == "step-000006"
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert_same_run(alone, tmp_path / "run")


def test_a_stop_whose_save_fails_is_no_clean_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code 1 instead of 143, which would say that nothing is lost."""
    breaking(monkeypatch, errno.EIO, lambda file: file >= 3)
    monkeypatch.setattr(pretrain, "watch", lambda job, *rest: job.position.step < 3 or stop(job))
    assert run(WORDS, tmp_path / "run") == 1


def stop(job: Any) -> bool:
    job.stop.number = 15
    return False


def test_a_first_save_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is trained: code 2, naming --out."""
    breaking(monkeypatch, errno.EROFS, lambda file: True)
    assert run(WORDS, tmp_path / "run") == 2
    assert f"--out {tmp_path / 'run'}: the first checkpoint cannot be written" in capsys.readouterr().err


def test_free_space_is_checked_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three checkpoints (two are kept, one is written): weights and two moments of each. Nothing is left behind."""
    real = shutil.disk_usage
    weights = sum(t.nbytes for t in tiny_weights(tmp_path).values())

    def usage(path: Any) -> Any:
        return real(path)._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = int(3 * 3 * weights * 0.9)
    assert run(WORDS, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert f"--out {tmp_path / 'run'}: 3 checkpoints of" in message
    assert "--keep" in message
    assert not (tmp_path / "run").exists()
    free = int(3 * 3 * weights * 1.2)
    assert run(WORDS, tmp_path / "run", "--steps", "1") == 0
    free = 0
    assert cli.main(["resume", str(tmp_path / "run"), "--steps", "2"]) == 2


def tiny_weights(folder: Path) -> Any:
    assert run(WORDS, folder / "weights", "--steps", "1") == 0
    return tiny_runs.tensors(folder / "weights")


def test_metrics_that_cannot_be_written_wait(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk takes 11 bytes of a line, then nothing for a while; in the end all lines are there, in order."""
    real, count = os.write, [0]

    def write(handle: int, data: bytes) -> int:
        if not data.startswith(b'{"kind"') and count[0] not in (4, 5):
            return real(handle, data)
        count[0] += 1
        if count[0] == 4:
            return real(handle, data[:11])
        if 5 <= count[0] <= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    assert run(WORDS, tmp_path / "run") == 0
    assert count[0] > 12
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl cannot be written (time 1)" in said
    assert "(time 4)" in said
    assert "(time 3)" not in said
    assert metrics(tmp_path / "run") == metrics(alone)


def test_pictures_that_cannot_be_written_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()

    def draw(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pretrain, "draw", draw)
    assert run([*DIGITS, "--steps", "1"], tmp_path / "run") == 0
    assert "the pictures cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_is_named(
    damage: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by its checksum, said aloud; the one before is taken, and the run ends as it did."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    path = out / "checkpoints" / "step-000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "flipped byte":
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    assert cli.main(["resume", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged checkpoint: step-000008 skipped: optimizer.safetensors" in said
    assert "continuing from step-000006" in said
    assert_same_run(alone, out)


def test_processes_agree_on_a_failed_save(tmp_path: Path) -> None:
    """Only the first process writes; the last save fails, and both end with code 1."""

    def job(rank: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            tiny_runs.without_pictures(patch)
            patch.setattr(saving, "URGENT_WAITS", (0.0,))
            breaking(patch, errno.ENOSPC, lambda file: file >= 3)
            return run(WORDS, tmp_path / "run", "--steps", "2")

    assert tiny_runs.ends(tiny_runs.fork_ranks(job, tmp_path)) == [1, 1], (tmp_path / "rank1.log").read_text()
