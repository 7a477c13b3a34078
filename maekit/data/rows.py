"""Rows of Parquet files by number: small tables in memory, packed ones read from their place, others by row groups.

A packed file (`maekit pack`) says in its footer where each image's bytes lie, so that one row costs one read. Of any
other table that is too large for memory, a row costs its row group.
"""

from __future__ import annotations

import base64
import json
import os
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maekit.data.images import BadImage

Int64s = npt.NDArray[np.int64]

INDEX_KEY = b"maekit.places"
"""Key in the footer: JSON with the column's name, where the data end, and base64 of int64 (start, length) pairs."""
IN_MEMORY = 4 * 1024**3
"""Bytes of encoded images, as they lie in the files, up to which a table is read into memory."""
_GROUPS_KEPT = 4
_FILES_KEPT = 200


class Rows(Protocol):
    """The image column of one split's files."""

    first_rows: Int64s
    """[files + 1] The number of each file's first row."""

    def encoded(self, index: int) -> bytes | None:
        """The encoded image of a row, None where there is none; raises BadImage."""

    def path(self, index: int) -> bytes | None:
        """The path that a row names, None where there is none; raises BadImage."""

    def lengths(self) -> Int64s:
        """[rows] Bytes of each encoded image, -1 where there is none; of each row group where that needs no reading."""


def open_rows(files: list[str], column: str) -> Rows:
    """The rows in the way that suits the files.

    Raises:
        OSError, KeyError, pa.ArrowException: damaged files.
    """
    places = [_places(file, column) for file in files]
    if all(place is not None for place in places):
        return PlacedRows(files, column, [place for place in places if place is not None])
    if sum(os.path.getsize(file) for file in files) <= IN_MEMORY:
        return LoadedRows(files, column)
    return GroupedRows(files, column)


def _columns(column: Any) -> tuple[Any, Any]:
    """Encoded images and paths of an image column, each as a chunked array of large binary."""
    fields = [field.name for field in column.type] if pa.types.is_struct(column.type) else None
    nothing = pa.nulls(len(column))
    of = {name: pc.struct_field(column, name) if fields and name in fields else nothing for name in ("bytes", "path")}
    encoded = pa.chunked_array([of["bytes"] if fields else column]).cast(pa.large_binary())
    # bytes again: a damaged table holds strings that are not UTF-8
    return encoded, pa.chunked_array([of["path"]]).cast(pa.large_string()).cast(pa.large_binary())


class LoadedRows:
    """All rows in memory, as Arrow buffers that forked processes share."""

    def __init__(self, files: list[str], column: str) -> None:
        encoded, paths, rows = [], [], [0]
        for file in files:
            table = pq.ParquetFile(file).read(columns=[column]).column(column)
            rows.append(rows[-1] + len(table))
            some_encoded, some_paths = _columns(table)
            encoded += some_encoded.chunks
            paths += some_paths.chunks
        self.first_rows = np.array(rows, np.int64)
        self._encoded = pa.chunked_array(encoded, pa.large_binary())
        self._paths = pa.chunked_array(paths, pa.large_binary())

    def encoded(self, index: int) -> bytes | None:
        data = self._encoded[index].as_py()
        return None if data is None else bytes(data)

    def path(self, index: int) -> bytes | None:
        path = self._paths[index].as_py()
        return None if path is None else bytes(path)

    def lengths(self) -> Int64s:
        found: Int64s = pc.fill_null(pc.binary_length(self._encoded), -1).to_numpy().astype(np.int64)
        return found


class GroupedRows:
    """Rows read a row group at a time: memory stays that of a few groups, and a random row costs a whole group."""

    def __init__(self, files: list[str], column: str) -> None:
        self.files, self.column = files, column
        firsts, groups, rows, sizes = [0], [], 0, []
        for number, file in enumerate(files):
            meta = pq.ParquetFile(file).metadata
            for group in range(meta.num_row_groups):
                groups.append((number, group, rows))
                sizes.append(meta.row_group(group).total_byte_size)
                rows += meta.row_group(group).num_rows
            firsts.append(rows)
        self.first_rows = np.array(firsts, np.int64)
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._sizes = np.array(sizes, np.int64)
        self._kept: OrderedDict[int, tuple[Any, Any]] = OrderedDict()

    def _row(self, index: int, which: int) -> bytes | None:
        place = int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1
        number, group, first = self._groups[place].tolist()
        if place not in self._kept:
            try:
                file = pq.ParquetFile(self.files[number])
                # One thread: a forked worker has none of its parent's.
                table = file.read_row_group(group, columns=[self.column], use_threads=False)
                self._kept[place] = _columns(table.column(self.column))
            except (OSError, pa.ArrowException) as error:
                raise BadImage(f"its row group cannot be read ({' '.join(str(error).split())[:100]})") from None
            if len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        value = self._kept[place][which][index - first].as_py()
        return None if value is None else bytes(value)

    def encoded(self, index: int) -> bytes | None:
        return self._row(index, 0)

    def path(self, index: int) -> bytes | None:
        return self._row(index, 1)

    def lengths(self) -> Int64s:
        return self._sizes


class PlacedRows:
    """Rows read from where the footer says that they lie: nothing is held but the places, 16 bytes an image."""

    def __init__(self, files: list[str], column: str, places: list[Int64s]) -> None:
        self.files, self.column = files, column
        self.first_rows = np.cumsum([0, *(len(place) for place in places)]).astype(np.int64)
        self._places_N2 = np.concatenate(places)
        self._open: dict[int, int] = {}
        self._grouped: GroupedRows | None = None

    def encoded(self, index: int) -> bytes | None:
        number = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        start, length = self._places_N2[index].tolist()
        try:
            if number not in self._open:
                while len(self._open) >= _FILES_KEPT:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[number] = os.open(self.files[number], os.O_RDONLY)
            # Not mapped: of a file that was cut short, a map would kill the process.
            data = os.pread(self._open[number], length + 4, start - 4)
        except OSError as error:
            raise BadImage((error.strerror or str(error)).lower()) from None
        if len(data) != length + 4 or int.from_bytes(data[:4], "little") != length:
            raise BadImage("the file has changed since it was packed")
        return data[4:]

    def __del__(self) -> None:
        for opened in self._open.values():
            os.close(opened)

    def path(self, index: int) -> bytes | None:
        if self._grouped is None:
            self._grouped = GroupedRows(self.files, self.column)
        return self._grouped.path(index)

    def lengths(self) -> Int64s:
        lengths: Int64s = self._places_N2[:, 1]
        return lengths


def make_index(column: str, places_N2: Int64s, end: int) -> bytes:
    """The footer's entry."""
    packed = base64.b64encode(places_N2.astype("<i8").tobytes()).decode()
    return json.dumps({"column": column, "end": end, "places": packed}).encode()


def _places(file: str, column: str) -> Int64s | None:
    """Where a packed file's images lie, [rows, 2]; None where it has no index, or one that does not fit it.

    Another tool that writes the table anew takes the footer's entries along: so the index must fit the file's length,
    and the length before each of some images must be the one that it claims.
    """
    meta = pq.ParquetFile(file).metadata
    entry = (meta.metadata or {}).get(INDEX_KEY)
    if entry is None or not hasattr(os, "pread"):
        return None
    try:
        index = json.loads(entry)
        found = np.frombuffer(base64.b64decode(index["places"], validate=True), "<i8").astype(np.int64).reshape(-1, 2)
        end = int(index["end"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if (
        index["column"] != column
        or len(found) != meta.num_rows
        or end + meta.serialized_size + 8 != os.path.getsize(file)
    ):
        return None
    if len(found) and not ((found >= 4).all() and (found[:, 0] <= end - found[:, 1]).all()):
        return None
    with open(file, "rb") as opened:
        for row in np.linspace(0, len(found) - 1, min(16, len(found))).astype(int):
            opened.seek(int(found[row, 0]) - 4)
            if int.from_bytes(opened.read(4), "little") != found[row, 1]:
                return None
    return found
