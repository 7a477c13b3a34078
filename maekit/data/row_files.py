"""Tables that a command writes, a row for each image, to .csv or .parquet: whole or not at all.

Rows are dicts; a file takes from them the columns that it has.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from maekit.config import UserError
from maekit.keeping import keeping

Row = Mapping[str, Any]


class Writer(Protocol):
    """A file that takes rows."""

    count: int

    def rows(self, rows: Sequence[Row]) -> None:
        """Write some."""


class ParquetRows:
    """Rows to a Parquet file, a row group for each call."""

    def __init__(self, path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
        self.schema, self.count = schema, 0
        self.file = pq.ParquetWriter(path, schema, compression="zstd")

    def rows(self, rows: Sequence[Row]) -> None:
        self.count += len(rows)
        self.file.write_table(pa.Table.from_pylist(rows, schema=self.schema))

    def close(self) -> None:
        """Write the footer."""
        self.file.close()


class CsvRows:
    """Rows to a .csv file, UTF-8; nothing stands where a value is None."""

    def __init__(self, path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
        self.count = 0
        self.file = path.open("w", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, names, extrasaction="ignore")
        self.csv.writeheader()

    def rows(self, rows: Sequence[Row]) -> None:
        self.count += len(rows)
        self.csv.writerows({name: _cell(value) for name, value in row.items()} for row in rows)

    def close(self) -> None:
        """Write what is left."""
        self.file.close()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else value


@contextmanager
def row_file(
    out: Path, schema: pa.Schema, console: Console, names: Sequence[str] = (), flag: str = "--out"
) -> Iterator[Writer]:
    """A file of rows, which appears whole when the block ends well, or not at all; one of other rows is kept.

    names: columns of a .csv, where they are not the schema's. flag: which named the file.

    Raises:
        UserError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = (CsvRows if out.suffix.lower() == ".csv" else ParquetRows)(temporary, schema, names or schema.names)
        try:
            yield rows
        finally:
            rows.close()
        with keeping(out, console):
            os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{flag} {out}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
