"""Rows of features on disk: Parquet chunks while they are computed, then one Parquet file or NumPy archive.

Every file appears whole or not at all, and no more than one chunk is in memory. Legend: R rows of a chunk, F values of
one row.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maekit.data.parts import Part

HOW: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["part", "class", "error"]}
"""How Parquet is written: a dictionary of floats would only cost."""


class Chunk(NamedTuple):
    """Rows start .. stop of one part."""

    part: str
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.part}-{self.start:012d}.parquet"


def make_schema(parts: Mapping[str, Part], description: dict[str, Any]) -> Any:
    """The columns; what the features are stands in the schema's metadata under `maekit`.

    Lists of no fixed length, though all have one: pyarrow below 26 cannot read a null among lists of fixed length.
    """
    fields = [("part", pa.string()), ("id", pa.int64()), ("name", pa.string())]
    if any(part.labels is not None for part in parts.values()):
        fields += [("label", pa.int64()), ("class", pa.string())]
    fields += [("error", pa.string()), ("features", pa.list_(pa.float32()))]
    return pa.schema(fields, {"maekit": json.dumps(description)})


def write_chunk(
    folder: Path, part: Part, chunk: Chunk, rows_RF: npt.NDArray[np.float32], reasons: list[str], schema: Any
) -> None:
    """Write the features of a chunk; `reasons` says of each row why its image cannot be read, or nothing."""
    temporary = folder / f".{chunk.file}.{os.getpid()}.tmp"
    with pq.ParquetWriter(temporary, schema, **HOW) as writer:
        writer.write_table(make_table(part, chunk, rows_RF, reasons, schema))
    os.replace(temporary, folder / chunk.file)


def make_table(part: Part, chunk: Chunk, rows_RF: npt.NDArray[np.float32], reasons: list[str], schema: Any) -> Any:
    """The rows of one chunk."""
    ids = range(chunk.start, chunk.stop)
    bad = np.array([bool(reason) for reason in reasons])
    ends = np.cumsum(np.where(bad, 0, rows_RF.shape[1]))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    columns: dict[str, Any] = {
        "part": [chunk.part] * len(ids),
        "id": list(ids),
        "name": [part.name(index) for index in ids],
        "error": [reason or None for reason in reasons],
        "features": pa.ListArray.from_arrays(offsets, rows_RF[~bad].reshape(-1), mask=pa.array(bad)),
    }
    if "label" in schema.names:
        labels = [-1] * len(ids) if part.labels is None else part.labels[chunk.start : chunk.stop].tolist()
        names = part.class_names or []
        columns["label"] = [label if label >= 0 else None for label in labels]
        columns["class"] = [names[label] if 0 <= label < len(names) else None for label in labels]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def read_chunks(folder: Path, chunks: list[Chunk], columns: list[str] | None = None) -> Iterator[Any]:
    """The chunks' tables in order, one at a time."""
    for chunk in chunks:
        yield pq.ParquetFile(folder / chunk.file).read(columns)


def is_done(path: Path, chunk: Chunk, schema: Any) -> bool:
    """Whether a chunk lies there whole; one that a crash has damaged is computed again."""
    try:
        found = pq.ParquetFile(path)
        return bool(found.metadata.num_rows == chunk.stop - chunk.start and found.schema_arrow.equals(schema))
    except (OSError, pa.ArrowException):
        return False


def merge(
    folder: Path,
    chunks: list[Chunk],
    out: Path,
    schema: Any,
    class_names: list[str],
    progress: Callable[[int, int], None],
) -> None:
    """Put the chunks into one .parquet or .npz file.

    Raises:
        OSError: the file cannot be written; nothing is left behind but the chunks.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.suffix.lower() == ".parquet":
            with pq.ParquetWriter(temporary, schema, **HOW) as writer:
                for done, table in enumerate(read_chunks(folder, chunks)):
                    writer.write_table(table)
                    progress(done + 1, len(chunks))
        else:
            write_npz(temporary, folder, chunks, schema, class_names)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path: Path, folder: Path, chunks: list[Chunk], schema: Any, class_names: list[str]) -> None:
    """NumPy's archive, one array after the other and one chunk at a time: `numpy.load` needs no pickle to read it."""
    description = schema.metadata[b"maekit"].decode()
    shape = tuple(json.loads(description)["shape"])
    rows = sum(chunk.stop - chunk.start for chunk in chunks)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def write(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterator[npt.NDArray[Any]]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(file, header)
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype).tobytes())

        def column(name: str) -> Iterator[Any]:
            return (table[name] for table in read_chunks(folder, chunks, [name]))

        def vectors() -> Iterator[npt.NDArray[np.float32]]:
            for found in column("features"):
                for piece in found.chunks:
                    rows_RF = np.full((len(piece), math.prod(shape)), np.nan, np.float32)
                    good = piece.is_valid().to_numpy(zero_copy_only=False)
                    rows_RF[good] = piece.flatten().to_numpy().reshape(-1, math.prod(shape))
                    yield rows_RF

        write("features", np.dtype("<f4"), (rows, *shape), vectors())
        for name in schema.names:
            if pa.types.is_string(schema.field(name).type):
                longest = max(pc.max(pc.utf8_length(found)).as_py() or 1 for found in column(name))
                words = (np.array([word or "" for word in found.to_pylist()]) for found in column(name))
                write(name, np.dtype(f"<U{max(1, longest)}"), (rows,), words)
            elif name != "features":
                numbers = (pc.fill_null(found, -1).to_numpy() for found in column(name))
                write(name, np.dtype("<i8"), (rows,), numbers)
        for name, text in (("class_names", np.array(class_names, "<U")), ("maekit", np.array(description))):
            write(name, text.dtype, text.shape, iter([text]))
