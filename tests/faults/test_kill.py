"""Kill -9 at random instants: a whole checkpoint is always found, and the run ends as if nobody had touched it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import (
    DIGITS,
    assert_same_run,
    command,
    each,
    end_of,
    files,
    folder_words,
    fork,
    last_checkpoint,
    make_images,
    metrics,
    remove,
    run,
)

from maekit.training import checkpoint, saving
from maekit.training import run as run_module

PROMISE = "kill -9: a whole checkpoint is found, no more than the work since it is repeated"
SAVE_STEPS = 2
MEMORY = [*DIGITS, "--steps", "40", "--batch-size", "128", "--save-every", "0.182", "--eval-every", "1"]  # 11 an epoch
STREAM = ["--accum", "1", "--steps", "40", "--save-every", "0.333", "--eval-every", "1"]  # 6 steps an epoch
LEFTOVERS = 12
"""Files of one save that a kill interrupted (5 in its folder, 5 in one put aside, a published one, the lock)."""


def seen(record: Path) -> list[str]:
    """What each step saw; a line that the kill tore is left out."""
    return record.read_text().splitlines() if record.exists() else []


def kill_until_done(alone: Path, words: list[str], kills: int, seed: int, folder: Path) -> int:
    """Kill a run again and again, its every resume too, then let it end and compare it with the one left alone."""
    folder.mkdir(parents=True)
    out, record, log = folder / "run", folder / "record.jsonl", folder / "log"
    chance, wanted = random.Random(seed), seen(alone.with_suffix(".jsonl"))
    most = len(list(files(alone))) + LEFTOVERS
    start = ["pretrain", *words[1:], "--out", str(out)]
    for _ in range(kills):
        resuming = (out / "config.json").exists()  # else it was killed before it said what it is, and is begun again
        floor = int(last_checkpoint(out).name[5:]) if checkpoint.latest(out / "checkpoints")[0] is not None else 0
        record.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        child = fork(command(["resume", str(out)] if resuming else start, record=record), log)
        time.sleep(chance.uniform(0.2, 2.0))
        os.kill(child, signal.SIGKILL)
        assert end_of(child) in (0, -signal.SIGKILL), log.read_text()
        if resuming and (went_on := re.search(r"continuing from step-(\d+)", log.read_text())):
            assert int(went_on[1]) >= floor, f"step {floor} was saved, the run went on from {went_on[0]}"
            now = seen(record)
            assert now[:1] in ([], wanted[int(went_on[1]) : int(went_on[1]) + 1]), "the next step saw other samples"
            assert now[:-1] == wanted[int(went_on[1]) : int(went_on[1]) + len(now)][:-1]
            newest = int(last_checkpoint(out).name[5:])
            lost = int(went_on[1]) + len(now) - newest
            assert lost <= SAVE_STEPS + 1, f"{lost} steps were lost, a save is due every {SAVE_STEPS}"
        if out.exists():
            found = list(files(out))
            assert len(found) <= most, f"{len(found)} files, {found}"
    code = run(["resume", str(out)] if (out / "config.json").exists() else start, log)
    assert code == 0, log.read_text()
    assert_same_run(alone, out)
    assert set(files(out)) == set(files(alone)), "something was left behind"
    remove(folder)
    return 0


def check(
    words: list[str], trials: int, kills: int, folder: Path, record_property: Callable[[str, Any], None], seed: int
) -> None:
    alone = folder / "alone"
    code = run([*words, "--out", str(alone)], folder / "alone.log", record=alone.with_suffix(".jsonl"))
    assert code == 0, (folder / "alone.log").read_text()
    jobs = [
        (f"kills with seed {seed + n}", partial(kill_until_done, alone, words, kills, seed + n, folder / str(n)))
        for n in range(trials)
    ]
    failed = each(jobs, folder / "logs")
    record_property("faults", trials * kills)
    record_property("losses", len(failed))
    assert not failed, "\n".join(failed[:3])


def test_five_kills(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """One run in memory, killed five times on its way."""
    check(MEMORY, 1, 5, tmp_path, record_property, seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["memory", "2 workers"])
def test_a_hundred_kills_each(name: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """With the data in memory, and with loader workers that outlive the killed process for a while."""
    words = MEMORY
    if name == "2 workers":
        words = [*folder_words(make_images(tmp_path / "images", 60), 2), *STREAM]
    check(words, 10, 10, tmp_path, record_property, seed=100)


def kill_at_config(out: Path) -> int:
    """Die by kill -9 in the instant in which config.json is open and still empty."""
    original = Path.write_text

    def write_text(self: Path, *arguments: Any, **named: Any) -> int:
        if "config.json" in self.name:  # it, or what is renamed to it
            self.open("w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **named)

    Path.write_text = write_text  # type: ignore[method-assign]
    return command(["resume", str(out)])()


def test_a_kill_while_the_config_is_written(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """A resume writes config.json again: killed in the middle of that, the run must not be lost with its settings."""
    out, log = tmp_path / "run", tmp_path / "log"
    words = [*DIGITS, "--steps", "3", "--batch-size", "64"]
    assert run([*words, "--out", str(out)], log) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"steps": 4}))
    end_of(fork(partial(kill_at_config, out), log))
    record_property("faults", 1)
    code = run(["resume", str(out)], log)
    record_property("losses", int(code != 0))
    assert code == 0, log.read_text()[-500:]


def kill_before_the_first_checkpoint(out: Path, words: list[str], place: str) -> int:
    """Die by kill -9 after config.json is written and before the checkpoint of step 0 is whole."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "while the trivial losses are measured":
        vars(run_module)["training_trivial"] = die
    elif place == "after a line of metrics":
        vars(saving)["save"] = die
    elif place == "before config.json has its name":
        vars(os)["replace"] = die
    else:
        vars(checkpoint)["_write_tensors"] = die
    return command([*words, "--out", str(out)])()


@pytest.mark.parametrize(
    "place", ["while the trivial losses are measured", "after a line of metrics", "in the checkpoint"]
)
def test_a_kill_before_the_first_checkpoint(
    place: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """`maekit resume` begins such a run at step 0; nothing of the first try stays."""
    words = [*DIGITS, "--steps", "3", "--batch-size", "64"]
    alone, out, log = tmp_path / "alone", tmp_path / "run", tmp_path / "log"
    assert run([*words, "--out", str(alone)], log) == 0
    assert end_of(fork(partial(kill_before_the_first_checkpoint, out, words, place), log)) == -signal.SIGKILL
    assert (out / "config.json").exists()
    record_property("faults", 1)
    code = run(["resume", str(out)], log)
    record_property("losses", int(code != 0))
    assert code == 0, log.read_text()[-500:]
    assert "killed before its first checkpoint: the run begins at step 0" in " ".join(log.read_text().split())
    assert_same_run(alone, out)
    assert set(files(out)) == set(files(alone)), "something was left behind"


def test_a_kill_before_anything_is_said(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Without config.json there is nothing to resume, and the same command begins the run again."""
    words = [*DIGITS, "--steps", "3", "--batch-size", "64"]
    out, log = tmp_path / "run", tmp_path / "log"
    place = "before config.json has its name"
    assert end_of(fork(partial(kill_before_the_first_checkpoint, out, words, place), log)) == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == [".config.json.tmp", "lock"]
    record_property("faults", 1)
    assert run(["resume", str(out)], log) == 2
    assert run([*words, "--out", str(out)], log) == 0, log.read_text()[-500:]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(tmp_path: Path) -> None:
    """Somebody removed them, or all are damaged: its metrics are not thrown away in silence."""
    words = [*DIGITS, "--steps", "3", "--batch-size", "64"]
    out, log = tmp_path / "run", tmp_path / "log"
    assert run([*words, "--out", str(out)], log) == 0
    shutil.rmtree(out / "checkpoints")
    (out / "model.safetensors").unlink()
    before = metrics(out)
    assert run(["resume", str(out)], log) == 2
    assert "no whole checkpoint" in log.read_text()
    assert metrics(out) == before
