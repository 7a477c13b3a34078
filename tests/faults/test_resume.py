"""Exact resume: a run that was stopped anywhere and resumed is, to the last bit, the run that was left alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import DIGITS, Instant, assert_same_run, each, files, folder_words, make_images, remove, run

PROMISE = "exact resume: stopped anywhere, continued bit-equal"
STEPS, ACCUM = 13, 2
ENDING = ["--steps", str(STEPS), "--eval-every", "0.4", "--save-every", "100"]


class Case(NamedTuple):
    """A command, and the run that was left alone with what it saw."""

    name: str
    words: list[str]
    alone: Path
    record: Path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Digits in memory, and a streamed folder with 0 and 2 loader workers; 11 and 6 steps an epoch."""
    root = tmp_path_factory.mktemp("alone")
    images = make_images(root / "images", 60)
    commands = {
        "memory": [*DIGITS, "--batch-size", "128", "--accum", str(ACCUM), *ENDING],
        "0 workers": [*folder_words(images, 0), *ENDING],
        "2 workers": [*folder_words(images, 2), *ENDING],
    }
    found = {name: Case(name, words, root / name, root / f"{name}.jsonl") for name, words in commands.items()}
    trials = [(case.name, partial(leave_alone, case)) for case in found.values()]
    assert not (failed := each(trials, root / "logs")), "\n".join(failed)
    return found


def leave_alone(case: Case) -> int:
    return run([*case.words, "--out", str(case.alone)], Path(f"{case.alone}.log"), record=case.record)


def stopped_and_resumed(case: Case, instant: Instant, folder: Path) -> int:
    """One fault: the signal, the stop with its checkpoint, the resume; and everything equal."""
    folder.mkdir(parents=True)
    out, record, log = folder / "run", folder / "record.jsonl", folder / "log"
    code = run([*case.words, "--out", str(out)], log, record=record, instant=instant)
    # in the last step there is nothing left to stop
    assert code in (0, 128 + instant.signal), f"exit code {code}\n{log.read_text()}"
    code = run(["resume", str(out)], log, record=record)
    assert code == 0, f"resume: exit code {code}\n{log.read_text()}"
    assert_same_run(case.alone, out)
    assert record.read_text() == case.record.read_text(), "other samples, another order or other masks"
    assert len(list(files(out))) == len(list(files(case.alone))), "something was left behind"
    remove(folder)
    return 0


def check(points: Iterable[tuple[Case, Instant]], folder: Path, record_property: Callable[[str, Any], None]) -> None:
    trials = [
        (f"{case.name}, {instant}", partial(stopped_and_resumed, case, instant, folder / str(number)))
        for number, (case, instant) in enumerate(points)
    ]
    failed = each(trials, folder / "logs")
    record_property("faults", len(trials))
    record_property("losses", len(failed))
    assert not failed, f"{len(failed)} of {len(trials)} were not the same:\n" + "\n".join(failed[:3])


def test_resume_at_six_points(
    cases: dict[str, Case], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """The first step; in the middle of an accumulation; in a held-out pass; in the second epoch; while saving."""
    memory, plain, workers = cases.values()
    points = [
        (memory, Instant("train", 1)),
        (memory, Instant("eval", 1)),
        (memory, Instant("train", 24, signal.SIGINT)),
        (plain, Instant("train", 8)),
        (workers, Instant("train", 7)),
        (workers, Instant("eval", 2)),
    ]
    check(points, tmp_path, record_property)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["memory", "0 workers", "2 workers"])
def test_resume_at_every_point(
    name: str, cases: dict[str, Case], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """In every part of every step, every held-out pass, and every file of the last save."""
    passes = 4 if name == "memory" else 7  # every 4 of 11 steps an epoch, every 2 of 6, and at the end
    instants = [Instant("train", number) for number in range(1, STEPS * ACCUM + 1)]
    instants += [Instant("eval", number) for number in range(1, passes + 1)]
    instants += [Instant("write", number) for number in (1, 2, 3)]
    check([(cases[name], instant) for instant in instants], tmp_path, record_property)
