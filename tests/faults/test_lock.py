"""Two runs into one folder: the second is refused, a crash leaves no lock, and readers always see a whole file."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from harness import DIGITS, command, each, end_of, folder_words, fork, make_images, metrics, run, wait_until
from safetensors.torch import save_file

import maekit
from maekit.config import UserError
from maekit.training import lock
from maekit.weights.store import random_model

PROMISE = "one folder, one run; readers see whole files"
ENDLESS = [*DIGITS, "--steps", "1000000", "--batch-size", "64", "--save-every", "0.046"]
Record = Callable[[str, Any], None]


def note(record_property: Record, faults: int) -> None:
    """For the summary; losses are what fails the test."""
    record_property("faults", faults)


def has_stepped(out: Path) -> bool:
    return (out / "metrics.jsonl").exists() and '"step", "step"' in (out / "metrics.jsonl").read_text()


def begun(words: list[str], out: Path) -> int:
    """A run that has made its first step; returns the child's number."""
    child = fork(command([*words, "--out", str(out)]), out.with_suffix(".log"))
    wait_until(lambda: has_stepped(out), "the first step")
    return child


def refused(words: list[str], log: Path, child: int) -> None:
    """The command ends with code 2 and names the process that is there."""
    assert run(words, log) == 2, log.read_text()
    assert f"process {child} on {platform.node()} is training" in log.read_text() or "is not empty" in log.read_text()


def test_the_second_is_refused_and_a_crash_leaves_no_lock(tmp_path: Path, record_property: Record) -> None:
    """`resume` and `pretrain` beside a living run: code 2, and the run goes on. After kill -9 of it, with loader
    workers that live on for seconds, `resume` begins at once."""
    out, log = tmp_path / "run", tmp_path / "second.log"
    words = folder_words(make_images(tmp_path / "images", 60), 2)
    child = begun([*words, "--steps", "1000000", "--save-every", "0.3"], out)
    refused(["resume", str(out)], log, child)
    assert f"process {child} on" in log.read_text()
    refused([*words, "--out", str(out)], log, child)
    wait_until(lambda: any((out / "checkpoints").glob("step-*")), "a checkpoint")
    os.kill(child, signal.SIGKILL)
    end_of(child)
    second = fork(command(["resume", str(out)], record=tmp_path / "second.jsonl"), log)
    wait_until((tmp_path / "second.jsonl").exists, "the second run's first step")
    os.kill(second, signal.SIGTERM)
    assert end_of(second) == 143, log.read_text()
    assert (out / lock.FILE).read_text() == ""
    note(record_property, 3)


def try_to_take(out: Path, taken: Path) -> int:
    """As a run would; the winner holds on until the test lets it go."""
    try:
        lock.take(out, fresh=True)
    except UserError as error:
        return 2 if "is training" in str(error) else 3
    (taken / str(os.getpid())).touch()
    wait_until((taken / "done").exists, "the end of the race")
    return 0


def test_of_many_at_once_one_wins(tmp_path: Path, record_property: Record) -> None:
    """Eight processes reach for one new folder, ten times: always exactly one gets it."""
    for round_number in range(10):
        taken = tmp_path / f"taken{round_number}"
        taken.mkdir()
        children = [fork(partial(try_to_take, tmp_path / f"run{round_number}", taken), taken / "log") for _ in range(8)]
        wait_until(lambda taken=taken: any(taken.glob("[0-9]*")), "a winner")  # type: ignore[misc]
        time.sleep(0.05)
        (taken / "done").touch()
        codes = [end_of(child) for child in children]
        assert sorted(codes) == [0] + [2] * 7, (taken / "log").read_text()
    note(record_property, 10)


def test_a_lock_is_let_go(tmp_path: Path) -> None:
    """By a job that ends or fails in this process; a folder in which no run has begun is removed with it."""
    out = tmp_path / "run"

    @lock.letting_go
    def job(fails: bool) -> None:
        lock.take(out)
        lock.take(out)  # it is ours
        assert end_of(fork(lambda: try_to_take(out, tmp_path), tmp_path / "log")) == 2
        if fails:
            raise UserError("no such data")
        (out / "config.json").touch()

    with pytest.raises(UserError, match="no such data"):
        job(fails=True)
    assert not out.exists()
    job(fails=False)
    assert (out / lock.FILE).read_text() == ""
    with pytest.raises(UserError, match="another run has just begun"):
        lock.take(out, fresh=True)
    lock.take(out)
    lock.release()


def read_again_and_again(out: Path, seconds: float) -> int:
    """`maekit.load` in a loop: every time a whole model, never older than the one before."""
    end, count, newest = time.monotonic() + seconds, 0, 0
    seen = set()
    while time.monotonic() < end:
        model = maekit.load(out)
        assert model.passport is not None
        assert model.passport.steps >= newest, "an older file came back"
        newest, count = model.passport.steps, count + 1
        seen.add(newest)
    print(f"{count} loads of {len(seen)} different files")
    assert len(seen) > 2, "the file did not change while it was read"
    return 0


def read_while_training(tmp_path: Path, seconds: float) -> None:
    out = tmp_path / "run"
    child = begun(ENDLESS, out)
    wait_until((out / "model.safetensors").exists, "weights")
    failed = each([("reader", partial(read_again_and_again, out, seconds))] * 2, tmp_path / "logs")
    os.kill(child, signal.SIGTERM)
    assert end_of(child) == 143
    assert not failed, failed[0]
    assert metrics(out)


def test_a_reader_sees_whole_files(tmp_path: Path, record_property: Record) -> None:
    """Two readers beside a run that publishes new weights after every step."""
    read_while_training(tmp_path, 3)
    note(record_property, 1)


def test_a_file_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors opens by name twice: a run that publishes in between must not mix two files, nor break a reader."""
    old, new = random_model(tiny_config()), random_model(tiny_config(), seed=1)
    path, published = tmp_path / "model.safetensors", tmp_path / "next.safetensors"
    for model, where, more in ((old, path, {}), (new, published, {"later": "x" * 16})):
        save_file(dict(model.state_dict()), where, metadata=model.passport.to_metadata() | more)
    opened = torch.UntypedStorage.from_file

    def from_file(*arguments: Any, **named: Any) -> Any:
        if published.exists():
            os.replace(published, path)
        return opened(*arguments, **named)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", from_file)
    found = maekit.load(path)
    assert not published.exists(), "the file was not replaced in the middle"
    for name, value in found.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]), name


@pytest.mark.faults
def test_readers_for_a_minute(tmp_path: Path, record_property: Record) -> None:
    """The same for longer; faults: the loads that were tried."""
    read_while_training(tmp_path, 60)
    note(record_property, sum(int(path.read_text().split()[-6]) for path in (tmp_path / "logs").glob("*.log")))


@pytest.mark.faults
def test_torchrun_is_refused_as_a_whole(tmp_path: Path, record_property: Record) -> None:
    """A second run on two processes: the first of them is refused, and the launcher ends the other within seconds."""
    out = tmp_path / "run"
    child = begun(ENDLESS, out)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "maekit", "resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *words, str(out)], env=environment, capture_output=True, timeout=120)
    os.kill(child, signal.SIGTERM)
    assert end_of(child) == 143
    assert done.returncode != 0
    assert f"process {child} on" in done.stderr.decode()
    note(record_property, 1)
