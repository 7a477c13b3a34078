"""metrics.jsonl: cut to a position, torn lines, full disks."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from maekit.config import UserError
from maekit.training.metrics import MetricsLog

PROMISE = "metrics survive a crash in mid-line"


def test_metrics_log_is_cut_to_a_position(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    assert (log.position, log.read(), path.exists()) == (0, [], False)
    log.append({"step": 1, "loss": 0.5})
    position = log.position
    assert position == path.stat().st_size  # flushed
    log.append({"step": 2})
    log.append({"step": 3})
    log.sync()
    log.close()
    resumed = MetricsLog(path)
    resumed.truncate(position)
    assert resumed.position == position
    assert resumed.read() == [{"step": 1, "loss": 0.5}]
    resumed.append({"step": 2})
    assert resumed.read() == [{"step": 1, "loss": 0.5}, {"step": 2}]
    resumed.truncate(position + 3)  # in the middle of a line
    assert resumed.position == position == path.stat().st_size
    resumed.truncate(10_000)  # a shorter log stays
    assert resumed.position == position
    resumed.truncate(0)
    assert (resumed.read(), path.stat().st_size) == ([], 0)
    resumed.append({"step": 1})
    assert resumed.read() == [{"step": 1}]


def test_metrics_log_with_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    log = MetricsLog(path)
    assert log.position == 12
    assert log.read() == [{"step": 1}]
    assert path.stat().st_size == 27  # a reader changes nothing
    log.append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"x": "' + b"x" * 200_000)  # longer than a block
    log = MetricsLog(path)
    log.truncate(150_000)
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not"):
        MetricsLog(path).read()


def test_metrics_values(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    record = {"nan": math.nan, "list": [math.inf, 1.5], "numpy": np.float32(0.5), "torch": torch.tensor(-math.inf),
              "text": "a\nb", "int": 3, "bool": True, "none": None, "nested": {"x": (1, 2)}}  # fmt: skip
    log.append(record)
    assert log.read() == [
        {"nan": None, "list": [None, 1.5], "numpy": 0.5, "torch": None, "text": "a\nb", "int": 3, "bool": True,
         "none": None, "nested": {"x": [1, 2]}}
    ]  # fmt: skip
    position = log.position
    with pytest.raises(TypeError):
        log.append({"x": object()})
    assert log.position == position == log.path.stat().st_size


def test_metrics_log_on_a_full_disk_ends_with_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    real = os.write
    written: list[int] = []

    def partly(handle: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, "full")
        written.append(real(handle, data[:4]))
        return 4

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", partly)
        with pytest.raises(OSError, match="full"):
            log.append({"step": 2})
    log.append({"step": 3})
    assert log.path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: real(handle, data[:4]))  # a little at a time
        log.append({"step": 4})
    assert log.read() == [{"step": 1}, {"step": 3}, {"step": 4}]
