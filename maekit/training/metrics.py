"""metrics.jsonl: one JSON object per line, which a checkpoint can point into and a resumed run cuts to that point."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maekit.config import UserError

_BLOCK = 1 << 16
"""Bytes read at a time when looking for the end of a line from behind."""


class MetricsLog:
    """An append-only log of records; only one process writes to it. UserError: something else has its name.

    Each line is handed to the system at once, so it outlives the process but not a power cut: call `sync` before a
    checkpoint records `position`. Nothing is created before the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._position = 0
        if path.exists():
            if not path.is_file():  # a pipe would block whoever opens it
                raise UserError(f"{path}: not a plain file")
            self._position = self._line_end(path.stat().st_size)

    @property
    def position(self) -> int:
        """Bytes of whole lines; the next record begins here."""
        return self._position

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinities become null, scalars of numpy and torch become numbers.

        Raises:
            OSError: the disk is full or fails; the log then still ends with its last whole line.
            TypeError: a value has no JSON form; nothing is written.
        """
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        handle = self._open()
        try:
            written = 0
            while written < len(line):  # the system may take less than it is given
                written += os.write(handle, line[written:])
        except BaseException:
            os.ftruncate(handle, self._position)
            raise
        self._position += len(line)

    def truncate(self, position: int) -> None:
        """Keep the first `position` bytes, less an unfinished line at their end; a shorter log is kept whole."""
        assert position >= 0, position
        if not self.path.exists():
            self._position = 0
            return
        self._position = self._line_end(min(position, self.path.stat().st_size))
        os.ftruncate(self._open(), self._position)

    def read(self) -> list[dict[str, Any]]:
        """All records; an unfinished last line is left out.

        Raises:
            UserError: another line is not a JSON object; names it.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is unfinished
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{self.path}: line {number} is not a JSON object: {line[:80]!r}")
            records.append(record)
        return records

    def sync(self) -> None:
        """Make all lines so far durable."""
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Give back the file handle; a later `append` opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._handle, self._position)  # an unfinished line of a killed process
        return self._handle

    def _line_end(self, end: int) -> int:
        """The end of the last whole line within the first `end` bytes."""
        with open(self.path, "rb") as file:
            while end > 0:
                start = max(0, end - _BLOCK)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
        return 0


def read_leniently(path: Path, most: int = 1 << 28) -> tuple[list[dict[str, Any]], int]:
    """The records of a file of JSON lines that may be damaged, forged, or written at this moment.

    An unfinished last line is left out in silence, as is what follows the first `most` bytes; NaN, infinities and
    numbers beyond 64 bits become None.

    Returns: the records, and how many whole lines are no JSON objects.

    Raises:
        OSError: no such file, or not a plain one (a pipe would block whoever opens it).
    """
    if not path.is_file():
        raise OSError(f"{path}: not a plain file")
    with path.open("rb") as file:
        lines = file.read(most).split(b"\n")
    records, broken = [], 0
    for line in lines[:-1]:
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda _: None, parse_int=_whole, parse_float=_finite)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    return records, broken


def _whole(text: str) -> int | None:
    return int(text) if len(text) < 19 else None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """The value in types that JSON has, or unchanged where it has none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str | int) and callable(getattr(value, "item", None)):
        return _plain(value.item())
    return value
