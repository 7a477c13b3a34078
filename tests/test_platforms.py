"""Systems that these tests do not run on, as far as one can stand in for them."""

from __future__ import annotations

import os
import platform
import select
from pathlib import Path

import pytest

from maekit import terminal
from maekit.config import UserError
from maekit.training import lock


@pytest.mark.parametrize("told", ["POLLERR", "POLLHUP"])  # Linux; macOS and BSD
def test_a_pipe_that_nobody_reads_any_more_is_known(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poll:
        def register(self, handle: int, events: int) -> None:
            assert (handle, events) == (1, select.POLLOUT)

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            return [(1, getattr(select, told))]

    silenced = []

    def silence(source: int, target: int) -> None:
        os.close(source)
        silenced.append(target)

    with monkeypatch.context() as here:  # undone at once: pytest's own capture uses both
        here.setattr(select, "poll", Poll)
        here.setattr(os, "dup2", silence)
        closed = terminal.output_is_closed()
    assert closed and silenced == [1]


def test_windows_is_told_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run begins there; the sentence says what to do, and nothing is left behind."""
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    with pytest.raises(UserError, match=r"does not train on Windows.*WSL"):
        lock.take(tmp_path / "run")
    assert not list(tmp_path.iterdir())
