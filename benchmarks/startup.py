"""What a user waits for before anything happens: fresh processes, one after the other, in turn; medians.

    python -m benchmarks.startup --rounds 5

`import torch` stands beside them for scale: what maekit answers without it is felt.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks.timing import Spread, alternate, show, spread, write_json

COMMANDS = {
    "maekit --help": ["-m", "maekit", "--help"],
    "import maekit": ["-c", "import maekit"],
    "maekit pretrain photos --help": ["-m", "maekit", "pretrain", "photos", "--help"],
    "import torch": ["-c", "import torch"],
    "python alone": ["-c", ""],
}


@dataclass
class StartupConfig:
    """Seconds from typing a command to its end."""

    rounds: int = 5
    """Rounds that count, after one that fills the disk's cache."""
    json: str | None = None
    """File for all numbers."""


def run(words: list[str]) -> Callable[[], Any]:
    """A fresh Python with these words."""
    return lambda: subprocess.run([sys.executable, *words], capture_output=True, check=True)


def measure(rounds: int, warmup: int = 1, commands: dict[str, list[str]] = COMMANDS) -> dict[str, Spread]:
    """Seconds of each command."""
    seconds = alternate({name: run(words) for name, words in commands.items()}, rounds, warmup)
    return {name: spread(values) for name, values in seconds.items()}


def main(config: StartupConfig) -> int:
    """Measure, print, write."""
    found = measure(config.rounds)
    show("fresh processes", ("command", "s: median (quartiles)"), [[name, str(one)] for name, one in found.items()])
    write_json(config.json, {name: one._asdict() for name, one in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(StartupConfig)))
