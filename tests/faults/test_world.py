"""World size: 1, 2 and 4 processes see the same samples with the same masks, and hand a run over to each other."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DIGITS, Instant, command, each, end_of, folder_words, fork, make_images, metrics, run
from safetensors.torch import load_file

PROMISE = "world size: 1, 2, 4 processes and changes between them see the same"
WORDS = [*DIGITS, "--drop-path", "0", "--steps", "13", "--batch-size", "128", "--eval-every", "0.4"]
"""Without dropped paths: those draw from each process's generator, which no two world sizes share."""
FLOAT32 = 1e-4
"""Relative error of a loss after 13 steps with sums in another order."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on(world: int, words: Sequence[str], folder: Path, instant: Instant | None = None) -> list[int]:
    """A command on several processes, as torchrun starts them; each adds to its record; returns the exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    if world == 1:
        return [run(words, folder / "log", record=folder / "rank0.jsonl", instant=instant)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    children = []
    for rank in range(world):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # the signal reaches the last process only: the others must learn of it
        job = command(
            words,
            record=folder / f"rank{rank}.jsonl",
            instant=instant if rank == world - 1 else None,
            **place, **size, **who,
        )  # fmt: skip
        children.append(fork(job, folder / f"log{rank}"))
    return [end_of(child) for child in children]


def steps(folder: Path, world: int, accum: int) -> list[list[Any]]:
    """What each global step saw: its epoch, and all ids with their visible patches, put together in order."""
    ranks = [[json.loads(line) for line in (folder / f"rank{rank}.jsonl").open()] for rank in range(world)]
    assert len({len(lines) for lines in ranks}) == 1, "the processes took different numbers of parts"
    found: list[list[Any]] = []
    for first in range(0, len(ranks[0]), accum):
        parts = [ranks[rank][first + part] for part in range(accum) for rank in range(world)]
        assert len({epoch for epoch, _, _ in parts}) == 1
        pairs = [pair for _, ids, masks in parts for pair in zip(ids, masks, strict=True)]
        found.append([parts[0][0], *[list(pair) for pair in pairs]])
    return found


def assert_same_losses(one: Path, other: Path) -> None:
    first, second = metrics(one), metrics(other)
    assert [(line["kind"], line["step"]) for line in first] == [(line["kind"], line["step"]) for line in second]
    for a, b in zip(first, second, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=FLOAT32), (a, b)


def compare(folder: Path, words: list[str], world: int, accum: int) -> int:
    """One world size against one process."""
    place = folder / f"world{world}-accum{accum}"
    codes = on(world, [*words, "--accum", str(accum), "--out", str(place / "run")], place)
    assert codes == [0] * world, (codes, (place / "log0").read_text())
    assert steps(place, world, accum) == steps(folder / "alone", 1, 1)
    assert_same_losses(folder / "alone" / "run", place / "run")
    return 0


def hand_over(folder: Path, words: list[str], worlds: tuple[int, int], number: int) -> int:
    """Stopped on some processes in the given step, resumed on others."""
    before, after = worlds
    place = folder / f"{before}to{after}-{number}"
    codes = on(before, [*words, "--out", str(place / "run")], place / "first", Instant("train", number))
    assert codes == [128 + signal.SIGTERM] * before, codes
    codes = on(after, ["resume", str(place / "run")], place / "second")
    assert codes == [0] * after, codes
    seen = steps(place / "first", before, 1) + steps(place / "second", after, 1)
    assert seen == steps(folder / "alone", 1, 1)
    assert_same_losses(folder / "alone" / "run", place / "run")
    return 0


def check(
    words: list[str],
    worlds: Sequence[tuple[int, int]],
    handovers: Sequence[tuple[tuple[int, int], int]],
    folder: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    """The run on one process, then (world, accum) and ((before, after), step) trials against it."""
    assert on(1, [*words, "--accum", "1", "--out", str(folder / "alone" / "run")], folder / "alone") == [0]
    trials = [(f"world {w}, accum {a}", partial(compare, folder, words, w, a)) for w, a in worlds]
    trials += [
        (f"{pair} at {step}", partial(hand_over, folder, [*words, "--accum", "1"], pair, step))
        for pair, step in handovers
    ]
    failed = each(trials, folder / "logs", at_once=1)
    record_property("faults", len(trials))
    record_property("losses", len(failed))
    assert not failed, "\n".join(failed[:3])


def test_two_hand_over_to_one(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Saved by two processes, continued by one: the same data order, masks and losses."""
    check(WORDS, [], [((2, 1), 5)], tmp_path, record_property)


def test_each_process_drops_its_own_paths(tmp_path: Path) -> None:
    """The generators that stochastic depth draws from differ from process to process."""
    words = [*DIGITS, "--steps", "1", "--out", str(tmp_path / "run")]
    assert on(2, words, tmp_path) == [0, 0]
    states = load_file(tmp_path / "run/checkpoints/step-000000/rng.safetensors")
    assert not torch.equal(states["torch_cpu/rank0"], states["torch_cpu/rank1"])


@pytest.mark.faults
def test_one_two_and_four(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """All world sizes, with and without accumulation, and every change between them, also across an epoch's end."""
    worlds = [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    pairs = [(2, 1), (2, 4), (1, 2), (1, 4), (4, 1), (4, 2)]
    check(WORDS, worlds, [(pair, step) for pair in pairs for step in (1, 6, 11)], tmp_path, record_property)


@pytest.mark.faults
def test_a_streamed_folder(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """The same with crops and flips drawn in loader workers."""
    images = make_images(tmp_path / "images", 60)
    words = [*folder_words(images, 1), "--drop-path", "0", "--steps", "13", "--eval-every", "0.4"]
    check(words, [(2, 1), (4, 2)], [((2, 1), 5), ((2, 4), 5)], tmp_path, record_property)
