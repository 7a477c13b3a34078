"""Loader workers end with the process that they decode for, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.config import PretrainConfig
from maekit.data.loader import StreamPool
from maekit.data.parts import Part
from maekit.data.sources import open_source
from maekit.data.workers import in_order

PROMISE = "nothing outlives a killed run"


def children(pid: int) -> list[int]:
    """Living child processes of a process."""
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()] if listing.exists() else []


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_where_a_server_would_fork_workers_the_process_itself_does(tmp_path: Path) -> None:
    """Python 3.14's default on Linux: workers would be children of a server that the first stop signal ends, and which
    they take for the death of their trainer.
    """
    for index in range(8):
        Image.fromarray(np.full((16, 16, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        config = PretrainConfig(data=str(tmp_path), img_size=(16,), in_memory="no")
        part = open_source(str(tmp_path)).train
        pool = StreamPool(part, config, torch.device("cpu"), 2)
        batches = [batch.sample_ids for batch in pool.train_batches([(0, np.arange(4)), (0, np.arange(4, 8))])]
        assert np.concatenate(batches).tolist() == list(range(8))
        assert [found for _, found in in_order(part, read_first, [range(4), range(4, 8)], 2)] == [0, 4]
    finally:
        multiprocessing.set_start_method(before, force=True)


def read_first(part: Part, chunk: range) -> int:
    """The gray level of the first image of a chunk."""
    return int(part.read(chunk.start)[0, 0, 0])


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the workers with their parent")
def test_workers_die_with_a_killed_trainer(tmp_path: Path) -> None:
    """kill -9 of a process with two workers at work: both are gone within seconds, though they ignore SIGTERM."""
    for index in range(16):
        Image.fromarray(np.full((16, 16, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    torch.set_num_threads(1)
    trainer = os.fork()
    if not trainer:
        try:
            config = PretrainConfig(data=str(tmp_path), img_size=(16,), in_memory="no")
            pool = StreamPool(open_source(str(tmp_path)).train, config, torch.device("cpu"), 2)
            endless = ((0, np.arange(4)) for _ in range(10**9))
            for _ in pool.train_batches(endless):
                (tmp_path / "begun").touch()  # and its workers have, too
                time.sleep(0.01)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(trainer)
    assert len(workers) == 2
    time.sleep(1)
    for pid in workers:  # a stopped worker cannot notice anything by itself, as one that starts or hangs cannot
        os.kill(pid, signal.SIGSTOP)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
