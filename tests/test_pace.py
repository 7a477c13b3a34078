"""What a run says of its speed: by the last lines, not by all of its past."""

from __future__ import annotations

import pytest

from maekit import terminal
from maekit.terminal import Pace


def test_a_slow_hour_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of 8 images in 10 s are 80 images/s; after a machine that slept, eleven lines later, they are again."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    pace = Pace(0, 8)
    assert pace.told(0, 10_000) == ""
    clock[0] += 10
    assert pace.told(100, 10_000) == "  80 images/s  16 min left"
    clock[0] += 3600
    assert pace.told(200, 10_000) == "  0 images/s  49.1 h left"
    for step in range(300, 1200, 100):
        clock[0] += 10
        assert not pace.told(step, 10_000).startswith("  80")
    clock[0] += 10
    assert pace.told(1200, 1300) == "  80 images/s  10 s left"
    clock[0] += 10
    assert pace.told(1300, 1300) == "  80 images/s"


def test_steps_taken_back_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    pace = Pace(50, 8)
    clock[0] = 10
    assert pace.told(150, 150) == "  80 images/s"
    assert pace.told(100, 150) == ""
    clock[0] = 20
    assert pace.told(125, 150) == "  20 images/s  10 s left"
