"""What a command says and refuses where a launcher has started several processes of it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs

from maekit import cli, processes, recipes, terminal
from maekit.config import UserError
from maekit.data.quarantine import Quarantine
from maekit.failures import in_words
from maekit.models.classifier import Classifier
from maekit.models.mae import MaskedAutoencoder
from maekit.training import prepare


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two on a machine."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal, "FIRST_SPEAKS", 0.3)


def test_the_others_let_the_first_process_speak(second: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Until its launcher would have ended them; what the first does not say they say, with their number."""
    begun = time.monotonic()
    assert cli.main(["pretrain", "nothing"]) == 2
    assert time.monotonic() - begun > 0.25
    assert capsys.readouterr().err.startswith("maekit: error [process 1]: ")


def test_each_process_names_the_files_that_it_could_not_read(
    second: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read by one process each, and the console of all but the first is silent."""
    part: Any = type("Part", (), {"name": lambda _, i: f"[{i}].png", "__len__": lambda _: 100})()
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", part, 0.5)
    quarantine.report([(7, "empty file")], terminal.make_console())
    quarantine.report([(7, "empty file")], terminal.make_console())
    out, err = capsys.readouterr()
    assert (out, err) == ("", "[process 1] unreadable, the next image takes its place: [7].png: empty file\n")
    monkeypatch.setenv("RANK", "0")
    quarantine.report([(8, "empty file")], terminal.make_console(), "another image")
    assert capsys.readouterr() == ("unreadable, another image takes its place: [8].png: empty file\n", "")


def test_the_first_process_speaks_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    assert cli.main(["pretrain", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("maekit: error: ")


@pytest.mark.parametrize(("local", "speaks"), [("0", True), ("1", False)])
def test_an_unknown_flag_is_told_by_one_process_of_a_machine(
    local: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them end with 2; the first of each machine speaks, whose command may be another one."""
    monkeypatch.setenv("LOCAL_RANK", local)
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "digits", "--data", "digits", "--epochz", "3"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert ("epochz" in said.out + said.err) is speaks


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["probe", "run", "--data", "x"], "probe"),
        (["selftest", "resume", "digits"], "selftest"),
        (["check-data", "--data", "x"], "check-data"),
        (["finetune", "run", "--data", "x", "--eval"], "finetune --eval"),
        (["segment", "run", "--eval"], "segment --eval"),
        (["segment", "run", "--predict", "x", "--out", "y"], "segment --predict"),
        (["plan", "digits", "--data", "x"], "plan"),
    ],
)
def test_what_one_process_does_is_refused_to_several(
    words: list[str], name: str, second: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would do it all, and write the same files."""
    assert cli.main(words) == 2
    assert f"maekit {name} runs in one process" in capsys.readouterr().err


def test_a_cluster_that_sets_the_number_of_its_nodes_is_no_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(["recipes", "digits"]) == 0
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_lie_in_memory_as_their_weights_do(channels: int) -> None:
    """Otherwise DistributedDataParallel warns of it, in six lines of each process."""
    config = dataclasses.replace(recipes.get("digits"), in_chans=channels)
    middle = (0.5,) * channels
    model = MaskedAutoencoder(config, middle, middle)
    images = torch.randn(2, channels, *config.size_hw)
    model(images).loss.backward()
    classifier: Any = Classifier(model.config, ("a", "b"), middle, middle, "mean")
    classifier(images).sum().backward()
    for one in (model, classifier):
        for name, weight in one.named_parameters():
            assert weight.grad is None or weight.grad.stride() == weight.stride(), name


@pytest.mark.parametrize(
    ("batch", "accum", "world", "fewer"), [(64, 1, 3, "2 processes"), (8, 4, 4, "2 processes"), (9, 1, 2, "1 process")]
)
def test_a_run_keeps_its_batch_so_it_goes_on_with_processes_that_share_it(
    batch: int, accum: int, world: int, fewer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch, which a new run is told to take, is none that a resumed one could have."""
    monkeypatch.setattr(prepare, "start_accelerator", lambda *_: SimpleNamespace(num_processes=world))
    config = dataclasses.replace(recipes.get("digits"), batch_size=batch, accum=accum)
    with pytest.raises(UserError) as caught:
        prepare.open_machine(config, Path(), goes_on=True)
    said = str(caught.value)
    assert f"--batch-size {batch} is not divisible by {world} processes" in said
    assert said.endswith(f"a run that goes on keeps it: start {fewer}") and not re.search("such as", said)


def test_processes_wait_longer_than_nccl_would_for_one_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes, after which NCCL kills them, are less than a large model may take to a slow disk."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("accelerate.Accelerator", lambda **named: given.update(named) or SimpleNamespace(log_with=[]))
    processes.start_accelerator(torch.device("cpu"), (), tmp_path)
    waits = [one for one in given["kwargs_handlers"] if isinstance(one, InitProcessGroupKwargs)]
    assert [one.to_kwargs() for one in waits] == [{"timeout": timedelta(minutes=30)}]  # of whatever backend it is


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes"), True),
        (RuntimeError("NCCL error ...: ncclRemoteError: A call failed possibly due to ..."), True),
        (RuntimeError("NCCL error ...: unhandled cuda error"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # of the hub, say
    ],
)
def test_what_tells_of_a_lost_process(error: Exception, lost: bool) -> None:
    assert (in_words(error) is not None) == lost


LEAVES = """
import os, sys, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
dist.barrier()
os._exit(9)
"""


def test_a_lost_process_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As gloo really says it: the second process ends between two steps."""
    meet = (tmp_path / "store").as_uri()
    other = subprocess.Popen([sys.executable, "-c", LEAVES, meet])
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=2)
    try:
        torch.distributed.barrier()
        assert other.wait(30) == 9

        def step(_: list[str]) -> int:
            torch.distributed.all_reduce(torch.ones(4))
            return 0

        monkeypatch.setitem(cli.COMMANDS, "pretrain", step)
        assert cli.main(["pretrain"]) == 2
    finally:
        torch.distributed.destroy_process_group()
        other.kill()
    error = capsys.readouterr().err
    assert error.startswith("maekit: error: another process of this run has ended") and "--or-resume" in error
