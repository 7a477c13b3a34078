"""Long runs: memory and open files stay flat; a log torn in mid-line costs nothing."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import DIGITS, Instant, command, each, end_of, folder_words, fork, make_images, metrics, run

from maekit.models.mae import MaskedAutoencoder

PROMISE = "long runs: memory and open files stay flat"
MEMORY_BOUND = 16 * 1024**2
"""Bytes that a process may grow from the end of the warm-up to the end of the run."""
FILES_BOUND = 2
"""Usual number of open files in the last quarter, less that in the warm-up."""


def watched(words: list[str], path: Path, every: int) -> int:
    """A run whose memory (bytes) and open files are written down every so many draws of masks."""
    draw, page = MaskedAutoencoder.draw_masks, os.sysconf("SC_PAGE_SIZE")
    count = 0

    def drawn(self: MaskedAutoencoder, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        if named.get("epoch") is not None and self.training:
            count += 1
            if count % every == 0:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
                with path.open("a") as file:
                    file.write(json.dumps([count, resident, len(os.listdir("/proc/self/fd"))]) + "\n")
        return draw(self, *arguments, **named)

    MaskedAutoencoder.draw_masks = drawn  # type: ignore[method-assign]
    return command(words)()


def growth(words: list[str], folder: Path, steps: int) -> int:
    """A run of so many steps; its first fifth is the warm-up. Prints and checks what it grew by afterwards."""
    folder.mkdir()
    path = folder / "memory.jsonl"
    ending = ["--steps", str(steps), "--out", str(folder / "run")]
    code = end_of(fork(partial(watched, [*words, *ending], path, max(1, steps // 100)), folder / "log"))
    assert code == 0, (folder / "log").read_text()[-2000:]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    warm = [line for line in lines if line[0] <= steps // 5][-1]
    late = [line for line in lines if line[0] > steps * 3 // 4]
    more = max(line[1] for line in late) - warm[1]
    # a loader that is just starting or ending has some pipes more: the usual number counts, and a leak raises it
    files = statistics.median(line[2] for line in late) - statistics.median(line[2] for line in lines[5:20])
    print(
        f"{steps} steps: {warm[1] / 2**20:.1f} MiB and {warm[2]} files, then {more / 2**20:+.2f} MiB, {files:+g} files"
    )
    assert more < MEMORY_BOUND, f"memory grew by {more / 2**20:.1f} MiB"
    assert files <= FILES_BOUND, f"{files} more files are open"
    return 0


def check(
    trials: Sequence[tuple[str, Callable[[], int]]], folder: Path, record_property: Callable[[str, Any], None]
) -> None:
    failed = each(trials, folder / "logs")
    record_property("faults", len(trials))
    record_property("losses", len(failed))
    for log in sorted((folder / "logs").glob("*.log")):
        print(log.read_text())
    assert not failed, "\n".join(failed)


def test_two_hundred_steps(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """In memory, with a line a step, and held-out passes and saves between."""
    words = [*DIGITS, "--batch-size", "64", "--eval-every", "0.5", "--save-every", "1"]
    check([("memory", partial(growth, words, tmp_path / "memory", 200))], tmp_path, record_property)


@pytest.mark.faults
def test_two_thousand_steps(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """In memory, and streamed by two workers that start anew for every held-out pass."""
    words = [*DIGITS, "--batch-size", "64", "--eval-every", "0.5", "--save-every", "1"]
    stream = [*folder_words(make_images(tmp_path / "images", 60), 2), "--eval-every", "10", "--save-every", "5"]
    trials = [
        ("memory", partial(growth, words, tmp_path / "memory", 2000)),
        ("2 workers", partial(growth, stream, tmp_path / "stream", 2000)),
    ]
    check(trials, tmp_path, record_property)


def torn(alone: Path, words: list[str], cut: int, folder: Path) -> int:
    """A log that ends within a line behind the checkpoint, then a resume: the metrics of the run left alone."""
    folder.mkdir()
    out = folder / "run"
    assert run([*words, "--out", str(out)], folder / "log", instant=Instant("train", 3)) == 143
    lost = (alone / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(lost[:cut])
    assert run(["resume", str(out)], folder / "log") == 0
    assert metrics(out) == metrics(alone)
    return 0


@pytest.mark.faults
def test_a_log_torn_anywhere(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Every tenth byte of a line may be the last one written before a crash."""
    words = [*DIGITS, "--steps", "5", "--batch-size", "64"]
    assert run([*words, "--out", str(tmp_path / "alone")], tmp_path / "log") == 0
    size = len((tmp_path / "alone" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-1])
    cuts = range(1, size + 1, 10)
    check(
        [(f"cut at {cut}", partial(torn, tmp_path / "alone", words, cut, tmp_path / str(cut))) for cut in cuts],
        tmp_path,
        record_property,
    )
