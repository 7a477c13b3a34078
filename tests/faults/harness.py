"""Real processes that are stopped and killed on purpose: maekit commands in children forked from one warm parent.

Importing torch costs seconds, so the parent imports it once and forks; a child does the rest of what a fresh process
does. The parent must do no large operation, so that there are no threads which a fork would lose.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  imported before the forks, not in each child
import numpy as np
import sklearn.datasets  # noqa: F401
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import fork

from maekit import cli
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks
from maekit.tasks import pretrain
from maekit.training import checkpoint

AT_ONCE = 2
"""Trials that run side by side: as many as there are cores on a small machine."""
WALL_CLOCK = ("images_per_s", "seconds", "waited")
VERY_SMALL = (
    "--embed-dim 16 --depth 1 --num-heads 2 --decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --drop-path 0.2 "
    "--probe-every 0 --panel-every 0 --log-every 1 --device cpu --precision fp32 --compile off"
).split()
"""Any recipe as a model that steps in milliseconds; with dropped paths, so that the generators' states matter."""
DIGITS = ["pretrain", "digits", *VERY_SMALL]


def folder_words(images: Path, workers: int) -> list[str]:
    """The command for a streamed folder."""
    shape = f"--img-size 16 24 --patch-size 8 --batch-size 8 --accum 2 --workers {workers} --in-memory no".split()
    return ["pretrain", "folder", "--data", str(images), *VERY_SMALL, *shape]


def make_images(folder: Path, count: int) -> Path:
    """Small photographs of many sizes."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        height, width = (int(side) for side in random.integers(20, 60, 2))
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@dataclass(frozen=True)
class Instant:
    """A place in a run where a signal is sent: before the n-th (from 1) call since the start of training."""

    where: str
    """train: a draw of masks for a part of a batch; eval: one for held-out images; write: a file of a checkpoint."""
    number: int
    signal: int = signal.SIGTERM


def hook(record: Path | None, instant: Instant | None) -> None:
    """Write down what each part of a batch sees, and send the signal; only ever called in a child.

    A part that was fetched when the signal came, and that a stop between two steps leaves, is not written down.
    """
    counts = {"train": 0, "eval": 0, "write": 0}
    draw, write, following = MaskedAutoencoder.draw_masks, checkpoint._write_tensors, pretrain.next_part
    last: list[str] = []

    def count(where: str) -> None:
        if where != "train" and not counts["train"]:
            return  # the pass before the first step
        counts[where] += 1
        if instant is not None and (where, counts[where]) == (instant.where, instant.number):
            os.kill(os.getpid(), instant.signal)

    def drawn(self: MaskedAutoencoder, sample_ids: Any, **key: int) -> Masks:
        training = "epoch" in key and self.training
        count("train" if training else "eval")
        masks = draw(self, sample_ids, **key)
        if training:
            last[:] = [json.dumps([key["epoch"], [int(i) for i in sample_ids], masks.ids_keep_BV.tolist()]) + "\n"]
        return masks

    def followed(*arguments: Any, **named: Any) -> Any:
        part = following(*arguments, **named)
        if part is not None and record is not None:
            with record.open("a") as file:
                file.writelines(last)
        return part

    def written(*arguments: Any) -> None:
        count("write")
        write(*arguments)

    MaskedAutoencoder.draw_masks = drawn  # type: ignore[method-assign]
    checkpoint._write_tensors = written  # type: ignore[assignment]
    pretrain.next_part = followed


def command(
    words: Sequence[str], *, record: Path | None = None, instant: Instant | None = None, **environment: str
) -> Callable[[], int]:
    """A maekit command as a job for `fork`. Pictures are left out: they take half a second and touch no number."""

    def job() -> int:
        os.environ.update(environment)
        pretrain.draw_pictures = lambda job: True
        hook(record, instant)
        return cli.main(list(words))

    return job


def end_of(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(words: Sequence[str], log: Path, **named: Any) -> int:
    """A maekit command in a child, to its end."""
    return end_of(fork(command(words, **named), log))


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Poll; an assertion fails when it takes longer."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def each(trials: Sequence[tuple[str, Callable[[], int]]], folder: Path, at_once: int = AT_ONCE) -> list[str]:
    """Run trials in children, some at a time; returns what the failing ones said. A trial fails by any exception."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(enumerate(trials)), dict[int, tuple[str, Path]](), []
    while waiting or running:
        while waiting and len(running) < at_once:
            number, (name, trial) = waiting.pop(0)
            log = folder / f"trial{number}.log"
            running[fork(trial, log)] = (name, log)
        child = next(iter(running)) if at_once == 1 else _any_of(running)
        code = end_of(child)
        name, log = running.pop(child)
        if code:
            failed.append(f"{name}: exit code {code}\n{log.read_text()[-3000:]}")
    return failed


def _any_of(children: dict[int, Any]) -> int:
    """The first of these children that has ended; it is left to be waited for."""
    while True:
        for child in children:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return child
        time.sleep(0.005)


# ---- what is compared ----


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def last_checkpoint(run: Path) -> Path:
    """The newest visible one."""
    return max((run / "checkpoints").glob("step-*"))


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, generators, position, published weights and metrics are equal to the last bit."""
    first, second = last_checkpoint(one), last_checkpoint(other)
    assert first.name == second.name
    for name in ("model", "optimizer", "rng"):
        wanted, found = (load_file(path / f"{name}.safetensors") for path in (first, second))
        assert wanted.keys() == found.keys(), name
        different = [key for key in wanted if wanted[key].numpy().tobytes() != found[key].numpy().tobytes()]
        assert not different, f"{name}: {different[0]} and {len(different) - 1} more of {len(wanted)} differ"
    assert metrics(one) == metrics(other)
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    for state in states:
        del state["metrics_bytes"]  # the wall-clock fields are not equally long
    assert states[0] == states[1]
    for run, path in ((one, first), (other, second)):
        assert (run / "model.safetensors").samefile(path / "model.safetensors"), "what was published is not the newest"


def files(run: Path) -> Iterator[str]:
    """The relative paths of all files in a run's folder."""
    return (path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file())


def remove(folder: Path) -> None:
    """A trial's folder after it went well: hundreds of them would fill a small disk."""
    shutil.rmtree(folder)
