"""quarantine.jsonl: which files could not be read, and why; and how many may be before a command stops."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from maekit.config import UserError
from maekit.data.parts import Part
from maekit.terminal import say_of_own

ALWAYS_ALLOWED = 10
"""A few unreadable files end no run, however small their share makes the data: so many, up to a quarter of all."""
NAMED = 3
"""Files that a message names."""


def allowed_bad(max_share: float, images: int) -> int:
    """How many of so many images may be unreadable under --max-bad-share: ten in any case, up to a quarter of them.

    A share of 0 allows none.
    """
    if max_share == 0:
        return 0
    return max(int(max_share * images + 1e-9), min(ALWAYS_ALLOWED, images // 4))


def too_many(bad: int, images: int, max_share: float, lines: Iterable[str], way_out: str) -> str:
    """The message where more than are allowed cannot be read: the first ones with their reasons, and what to do."""
    named = list(islice(lines, NAMED))
    more = f"; and {bad - len(named):,} more" if bad > len(named) else ""
    return (
        f"{bad:,} of {images:,} images cannot be read, and --max-bad-share {max_share:g} allows "
        f"{allowed_bad(max_share, images):,} ({'; '.join(named)}{more}). {way_out}"
    )


def share_for(bad: int, images: int) -> str:
    """The smallest round share that lets so many unreadable images pass, for a message."""
    return f"{-(-100 * bad // images) / 100:g}"


class Quarantine:
    """Files that could not be read, listed once each in quarantine.jsonl; stops the run above a stated share."""

    def __init__(self, path: Path, part: Part, max_share: float) -> None:
        self.path, self.part, self.max_share = path, part, max_share
        self._known = self._read()
        # What an earlier sitting could not read may be whole again (a disk that was away), so each counts for itself.
        self._before = set(self._known)
        self._met: set[int] = set()

    def add(self, bad: Iterable[tuple[int, str]]) -> list[str]:
        """Record (sample id, reason) pairs; returns a line for each that is new.

        Raises:
            UserError: more of the images than are allowed cannot be read, those of other processes counted too.
        """
        bad = list(bad)
        lines = []
        if any(sample_id not in self._known for sample_id, _ in bad):
            self._known |= self._read()  # other processes write here too, mostly the same
        for sample_id, reason in bad:
            self._met.add(sample_id)
            if sample_id in self._known:
                continue
            self._known[sample_id] = reason
            record = {"id": sample_id, "name": self.part.name(sample_id), "reason": reason}
            with self.path.open("a+b") as file:
                end = file.seek(0, 2)
                file.seek(max(0, end - 1))
                torn = end > 0 and file.read(1) != b"\n"  # by a crash: what follows must not be lost with it
                file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
            lines.append(f"{record['name']}: {reason}")
        if bad:
            self._known |= self._read()
            self._check()
        return lines

    def report(self, bad: list[tuple[int, str]], console: Console, instead: str = "the next image") -> None:
        """Record (sample id, reason) pairs and name the new ones; where the file cannot be written, say that.

        Raises:
            UserError: as of `add`.
        """
        if not bad:
            return
        try:
            lines = self.add(bad)
        except OSError as error:
            say_of_own(console, f"[red]{escape(str(self.path))} cannot be written:[/red] {error}; training goes on")
            return
        for line in lines:
            say_of_own(console, f"[yellow]unreadable, {instead} takes its place:[/yellow] {escape(line)}")

    def _check(self) -> None:
        """Stop above what is allowed."""
        found = sorted(self._met | self._known.keys() - self._before)
        allowed = allowed_bad(self.max_share, len(self.part))
        if len(found) <= allowed:
            return
        bad, images = len(found), len(self.part)
        lines = (f"{self.part.name(sample_id)}: {self._known[sample_id]}" for sample_id in found)
        way_out = (
            f"{self.path} names them. Mend or remove them and begin a new run, or go on without them: maekit resume "
            f"{self.path.parent} --max-bad-share {share_for(bad, images)}"
        )
        raise UserError(too_many(bad, images, self.max_share, lines, way_out))

    def _read(self) -> dict[int, str]:
        known = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    sample_id, reason = record["id"], record.get("reason")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # a line torn by a crash
                if isinstance(sample_id, int) and 0 <= sample_id < len(self.part):
                    known[sample_id] = str(reason)
        return known
