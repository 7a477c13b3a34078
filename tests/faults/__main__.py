"""`make test-faults`: every test that kills, stops and damages, with a table of promises, faults tried and losses.

A file of tests takes part by its constant PROMISE. A test is one fault tried, or says how many by
`record_property("faults", ...)`, and how many were lost by "losses"; one that fails without saying so lost one.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


class Summary:
    """A pytest plugin that adds up what the tests record."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.promises: dict[str, str] = {}
        self.began = time.monotonic()

    def pytest_itemcollected(self, item: Any) -> None:
        """The promise that each test's file keeps."""
        self.promises[item.nodeid] = item.module.PROMISE

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Once for each phase of a test; a fixture that fails is a loss too."""
        if report.when != "call" and not report.failed:
            return
        said = dict(report.user_properties)
        row = self.rows[self.promises[report.nodeid]]
        row[0] += 1
        row[1] += int(said.get("faults", 1))
        row[2] += max(int(said.get("losses", 0)), int(report.failed))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table."""
        write = terminalreporter.write_line
        wide = max([len("promise"), *map(len, self.rows)])
        write("")
        write(f"{'promise':<{wide}}  tests  faults  losses")
        for promise, (tests, faults, losses) in sorted(self.rows.items()):
            write(f"{promise:<{wide}}  {tests:5d}  {faults:6d}  {losses:6d}")
        total = [sum(row[column] for row in self.rows.values()) for column in range(3)]
        write(f"{'together':<{wide}}  {total[0]:5d}  {total[1]:6d}  {total[2]:6d}")
        write(f"in {(time.monotonic() - self.began) / 60:.1f} minutes")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    files = sorted(str(path) for path in here.parent.rglob("test_*.py") if "PROMISE" in path.read_text())
    sys.exit(pytest.main(["-m", "not gpu", *files, *sys.argv[1:]], plugins=[Summary()]))
