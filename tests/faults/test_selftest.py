"""`maekit selftest resume`: what it compares, what it refuses; all of it in fresh processes by make test-faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DIGITS, run

from maekit import cli
from maekit.tasks.selftest import differences, first_difference

PROMISE = "exact resume: stopped anywhere, continued bit-equal"


def test_differences_are_found(tmp_path: Path) -> None:
    """The last bit of a tensor, a lost tensor and a changed metric are seen; wall-clock fields are not."""
    one = torch.tensor([0.0, 1.0])
    assert first_difference({"a": one}, {"a": one.clone()}) == ""
    assert first_difference({"a": one}, {"a": torch.tensor([-0.0, 1.0])}) == "a by up to 0"
    assert first_difference({"a": one, "b": one}, {"a": one}) == "b is missing"
    alone, other = tmp_path / "alone", tmp_path / "other"
    assert run([*DIGITS, "--steps", "3", "--batch-size", "64", "--out", str(alone)], tmp_path / "log") == 0
    shutil.copytree(alone, other)
    assert differences(alone, other) == {}
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines[1]["seconds"] = 99.0
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(alone, other) == {}
    lines[1]["loss"] += 1e-12
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(alone, other).keys() == {"metrics"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["resume"], "one recipe at a time"),
        (["crash", "digits"], "choose from resume"),
        (["resume", "digits", "--steps", "2"], "--steps 2"),
        (["resume", "digits", "--steps", "4", "--stops", "4"], "--stops 4"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By code 2 and a line that names it."""
    assert cli.main(["selftest", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.faults
def test_selftest_in_fresh_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, Any], None]
) -> None:
    """As a user types it: every stop is resumed bit-equal."""
    words = "selftest resume digits --steps 300 --stops 2 --device cpu --out".split()
    assert cli.main([*words, str(tmp_path / "runs")]) == 0
    assert "2 stopped and resumed, 0 lost" in capsys.readouterr().out
    record_property("promise", "exact resume: stopped anywhere, continued bit-equal")
    record_property("faults", 2)
