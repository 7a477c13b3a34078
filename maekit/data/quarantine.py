"""quarantine.jsonl: which files could not be read, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from maekit.config import UserError
from maekit.data.parts import Part


class Quarantine:
    """Files that could not be read, listed once each in quarantine.jsonl; stops the run above a stated share."""

    def __init__(self, path: Path, part: Part, max_share: float) -> None:
        self.path, self.part, self.max_share = path, part, max_share
        self._known = self._read()

    def add(self, bad: Iterable[tuple[int, str]]) -> list[str]:
        """Record (sample id, reason) pairs; returns a line for each that is new.

        Raises:
            UserError: more than the allowed share of the images cannot be read.
        """
        lines = []
        bad = [(sample_id, reason) for sample_id, reason in bad if sample_id not in self._known]
        if bad:
            self._known |= self._read()  # other processes write here too, mostly the same
        for sample_id, reason in bad:
            if sample_id in self._known:
                continue
            self._known.add(sample_id)
            record = {"id": sample_id, "name": self.part.name(sample_id), "reason": reason}
            with self.path.open("a+b") as file:
                end = file.seek(0, 2)
                file.seek(max(0, end - 1))
                torn = end > 0 and file.read(1) != b"\n"  # by a crash: what follows must not be lost with it
                file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
            lines.append(f"{record['name']}: {reason}")
        if lines:
            self._known |= self._read()
            share = len(self._known) / len(self.part)
            if share > self.max_share:
                raise UserError(
                    f"{len(self._known)} of {len(self.part)} images cannot be read ({share:.1%}): more than "
                    f"--max-bad-share {self.max_share:g}; {self.path} names them with their reasons"
                )
        return lines

    def _read(self) -> set[int]:
        known = set()
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                try:
                    sample_id = json.loads(line)["id"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line torn by a crash
                if isinstance(sample_id, int) and 0 <= sample_id < len(self.part):
                    known.add(sample_id)
        return known
