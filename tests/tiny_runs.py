"""Runs of a fraction of a second, in this process or in forked ones, for the tests that make them go wrong."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from maekit import cli
from maekit.models import encoder
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import pretrain

SMALLEST = (
    "--embed-dim 16 --depth 2 --num-heads 2 --decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --drop-path 0.2 "
    "--probe-every 0 --panel-every 0 --log-every 1 --device cpu --precision fp32 --compile off"
).split()
DIGITS = ["pretrain", "digits", *SMALLEST, "--batch-size", "128"]
"""11 steps an epoch, in memory."""
WALL_CLOCK = ("images_per_s", "seconds", "waited")


def folder_words(images: Path, workers: int = 0) -> list[str]:
    """A streamed folder; 40 images make 4 steps an epoch."""
    shape = f"--img-size 16 --patch-size 8 --batch-size 8 --workers {workers} --in-memory no".split()
    return ["pretrain", "folder", "--data", str(images), *SMALLEST, *shape]


def make_images(folder: Path, count: int = 40) -> Path:
    """Small images of noise, one an id."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{index:03d}.png")
    return folder


_plain_vit = functools.cache(encoder.plain_vit)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """They take half a second and touch no number, and so does a model that is built to be asked for its sizes."""
    patch.setattr(pretrain, "draw_pictures", lambda job: True)
    patch.setattr(encoder, "plain_vit", _plain_vit)


def run(words: list[str], out: Path, *more: str) -> int:
    """A maekit command in this process; its exit code."""
    return cli.main([*words, "--out", str(out), *more])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their wall-clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def state(run: Path) -> dict[str, Any]:
    """The position of the newest checkpoint; the length of the metrics depends on wall-clock fields."""
    found: dict[str, Any] = json.loads((run / "checkpoints" / checkpoints(run)[-1] / "state.json").read_text())
    del found["metrics_bytes"]
    return found


def tensors(run: Path, name: str = "model", step: str = "") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / (step or checkpoints(run)[-1]) / f"{name}.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(alone: Path, other: Path) -> None:
    """Weights, optimiser, generators, position and metrics are equal to the last bit."""
    assert checkpoints(alone)[-1] == checkpoints(other)[-1]
    for name in ("model", "optimizer", "rng"):
        assert equal(tensors(alone, name), tensors(other, name)), name
    assert metrics(alone) == metrics(other)
    assert state(alone) == state(other)


def spoil_loss(patch: pytest.MonkeyPatch, spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Pass the loss of each training part (the n-th from 0 in this process) through a function."""
    real, count = MaskedAutoencoder.loss, [0]

    def loss(self: MaskedAutoencoder, *arguments: Any) -> torch.Tensor:
        value = real(self, *arguments)
        if self.training and torch.is_grad_enabled():
            count[0] += 1
            return spoil(count[0] - 1, value)
        return value

    patch.setattr(MaskedAutoencoder, "loss", loss)


def fork(job: Callable[[], int], log: Path, **environment: str) -> int:
    """Run a job in a child process, its output at the end of a file; returns the child's number.

    The parent must do no large operation before, so that there are no threads which a fork would lose.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        torch.set_num_threads(1)
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._shared_state.clear()  # the parent may have run a command itself
        try:
            code = job()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def fork_ranks(job: Callable[[int], int], folder: Path, world: int = 2) -> list[int]:
    """The processes of one run, as torchrun would start them; their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        children.append(fork(functools.partial(job, rank), folder / f"rank{rank}.log", **place))
    return children


def ends(children: list[int]) -> list[int]:
    """Exit codes; minus the signal for a child that one ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
