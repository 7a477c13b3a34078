"""Parquet files in the hub's image schema: a column of struct<bytes, path> and a column of class labels.

Schema: https://huggingface.co/docs/datasets/image_dataset (the `huggingface` key of the schema's metadata names each
column's feature). Where the encoded images are held: rows.py. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maekit.config import UserError, did_you_mean
from maekit.data.columns import Columns
from maekit.data.folders import holds_images
from maekit.data.groups import by_pattern, group_numbers
from maekit.data.images import BadImage
from maekit.data.parts import PART_WORDS, EncodedPart, Labels, Source, class_order, evenly_spaced, is_folder, printable
from maekit.data.rows import Rows, open_rows

_LABEL_NAMES = ("label", "labels", "fine_label")
MAX_CLASSES = 1_000_000
_FINGERPRINT_SAMPLES = 100


class TablePart(EncodedPart):
    """The rows of one split's Parquet files, in the order of file names and rows.

    A copy that was pickled for a spawned worker carries the files' names only and reads them again when first used.
    """

    def __init__(
        self, files: list[str], column: str, in_chans: int, labels: Labels | None, class_names: list[str] | None
    ) -> None:
        self.files = files
        self.column = column
        self.in_chans = in_chans
        self.labels = labels
        self.class_names = class_names
        self._rows = int(self.rows.first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    @cached_property
    def rows(self) -> Rows:
        return open_rows(self.files, self.column)

    def __len__(self) -> int:
        return self._rows

    def data(self, index: int) -> bytes | str:
        """The encoded image, or the path of the file that the row points to."""
        data = self.rows.encoded(index)
        if data is not None:
            return data
        relative = self.rows.path(index)
        if not relative:
            raise BadImage("no image in this row")
        file = self.files[int(np.searchsorted(self.rows.first_rows, index, side="right")) - 1]
        try:
            folder = os.path.realpath(os.path.dirname(file))
            path = os.path.realpath(os.path.join(folder, os.fsdecode(relative)))
            inside = os.path.commonpath([folder, path]) == folder
        except (ValueError, OSError) as error:
            raise BadImage(f"the path {printable(relative)[:120]} cannot be opened ({error})") from None
        if not inside:  # a table from elsewhere must not read this machine's files
            raise BadImage(f"the path {printable(relative)[:120]} leaves the Parquet file's folder")
        return path

    def name(self, index: int) -> str:
        """'row 17'."""
        return f"row {index}"

    def path(self, index: int) -> str | None:
        """The path that the row names, on one printable line."""
        with contextlib.suppress(BadImage):
            path = self.rows.path(index)
            return printable(path) if path else None
        return None

    def paths(self) -> list[str | None]:
        """The paths that all rows name, None where one names none; no image is read."""
        found: list[str | None] = []
        for file in self.files:
            table = pq.ParquetFile(file)
            kind = table.schema_arrow.field(self.column).type
            if pa.types.is_struct(kind) and any(field.name == "path" for field in kind):
                rows = table.read(columns=[f"{self.column}.path"])[self.column]
                found += [path and printable(path) for path in pc.struct_field(rows, "path").to_pylist()]
            else:
                found += [None] * table.metadata.num_rows
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the lengths of all images, the labels, and at most 100 evenly spaced images or paths.

        Of a table too large for memory, the lengths are those of its row groups.
        """
        table = self.rows
        digest = hashlib.sha256(table.lengths().astype("<i8").tobytes())
        digest.update(b"" if self.labels is None else self.labels.astype("<i8").tobytes())
        for index in evenly_spaced(len(self), _FINGERPRINT_SAMPLES):
            with contextlib.suppress(BadImage):
                digest.update(table.encoded(int(index)) or table.path(int(index)) or b"")
        return digest.hexdigest()


def is_parquet(name: str) -> bool:
    """Whether a file's name is that of Parquet."""
    return name.lower().endswith(".parquet")


def find_files(
    folder: str, spec: str, is_one: Callable[[str], bool] = is_parquet, kind: str = "Parquet files"
) -> list[str]:
    """The Parquet files of a folder (or others, by their names) in the hub's layouts, in byte order; none is no error.

    They lie in the folder itself, in data/, in folders named by split, or (where there are no images) in one other
    folder, a hub configuration.

    Raises:
        UserError: several configurations to choose from.
    """
    subfolders = sorted((e.name for e in os.scandir(folder) if is_folder(e) and e.name[:1] != "."), key=os.fsencode)
    splits = [name for name in subfolders if name.lower() in PART_WORDS]
    for places in ([""], ["data"] if "data" in subfolders else [], splits):
        found = [path for place in places for path in _in_folder(os.path.join(folder, place), is_one)]
        if found:
            return found
    if holds_images(os.fsencode(folder)):  # then it is a folder of images; its thousands of subfolders are not searched
        return []
    others = [name for name in subfolders if name not in splits]
    configurations = [name for name in others if _has_some(os.path.join(folder, name), is_one)]
    if len(configurations) > 1:
        paths = " or ".join(os.path.join(spec, name) for name in configurations[:8])
        raise UserError(f"--data {spec}: several folders of {kind}; choose --data {paths}")
    return find_files(os.path.join(folder, configurations[0]), spec, is_one, kind) if configurations else []


def _in_folder(folder: str, is_one: Callable[[str], bool]) -> list[str]:
    with os.scandir(folder) as entries:  # not listdir: a flat folder may hold a million images
        found = [e for e in entries if is_one(e.name) and not e.name.startswith(".")]
        names = [e.name for e in found if os.path.isfile(e.path)]  # opening a pipe would wait for ever
    return [os.path.join(folder, name) for name in sorted(names, key=os.fsencode)]


def _has_some(folder: str, is_one: Callable[[str], bool]) -> bool:
    try:
        inside = [entry.path for entry in os.scandir(folder) if is_folder(entry) and entry.name.lower() in PART_WORDS]
        return any(_in_folder(place, is_one) for place in (folder, *inside))
    except OSError:
        return False


def has_image_column(file: str, image_column: str | None) -> bool:
    """Whether a file is Parquet with a column of images by schema or metadata (or the one that is named)."""
    try:
        schema = pq.ParquetFile(file).schema_arrow
    except (OSError, pa.ArrowException):
        return True  # to be reported as a damaged Parquet file, not passed over
    return bool(image_columns(schema)) or image_column in schema.names


def open_parquet(
    files: list[str] | dict[str, list[str]],
    spec: str,
    name: str,
    in_chans: int,
    columns: Columns,
) -> Source:
    """Parquet files as a source; more than one file is sorted into parts by name, one file is the training part.

    files: or the files of each part, 'train' among them.

    Raises:
        UserError: no Parquet, no image column, a column that does not exist or is of another kind, no training part.
    """
    parts = sorted_files(files, spec)
    try:
        schemas = {part: pq.ParquetFile(found[0]).schema_arrow for part, found in parts.items()}
        image = _image_column(schemas["train"], columns.image, spec)
        label = _label_column(schemas["train"], columns.label, spec)
        labels: dict[str, Labels | None] = dict.fromkeys(parts)
        names = None
        if label is not None:
            labels, names = _read_labels(parts, schemas, label, spec, asked=columns.label is not None)
        opened = {
            part: TablePart(found, image, in_chans, labels[part], names if labels[part] is not None else None)
            for part, found in parts.items()
        }
        if columns.group is not None:
            read_groups(opened, columns.group, spec)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise UserError(f"--data {spec}: cannot be read as Parquet ({reason})") from None
    if not len(opened["train"]):
        raise UserError(f"--data {spec}: the training part has no rows")
    rest = {part: table for part, table in opened.items() if len(table)}
    empty = tuple(part for part in opened if part not in rest)
    return Source(name, opened["train"], rest.get("val"), rest.get("test"), empty=empty)


def sorted_files(files: list[str] | dict[str, list[str]], spec: str) -> dict[str, list[str]]:
    """Part -> files: as they are given, or by name; one file alone is the training part."""
    if isinstance(files, dict):
        return files
    return {"train": files} if len(files) == 1 else by_part(files, spec)


def part_by_name(file: str) -> str:
    """The part that a file's name says, or its folder's; empty where neither does."""
    words = re.findall("[a-z]+", os.path.splitext(os.path.basename(file))[0].lower())
    said = [PART_WORDS[word] for word in words if word in PART_WORDS]
    if len(set(said)) == 1 or (said and words[0] in PART_WORDS):
        return said[0]
    return PART_WORDS.get(os.path.basename(os.path.dirname(file)).lower(), "")


def by_part(files: list[str], spec: str) -> dict[str, list[str]]:
    """Part -> files: by the word in a file's name (train-00000-of-00001, cifar-test), else by its folder's name.

    Of several such words the first one counts, where it begins the name.
    """
    parts: dict[str, list[str]] = {}
    for file in files:
        parts.setdefault(part_by_name(file), []).append(file)
    unnamed = parts.pop("", [])
    if unnamed and parts:
        raise UserError(
            f"--data {spec}: {printable(os.path.basename(unnamed[0]))} names no part (train, validation or test) "
            "but other files do; move it away, or give one file as --data"
        )
    if unnamed:
        return {"train": unnamed}
    if "train" not in parts:
        raise UserError(f"--data {spec}: no file of a training part; give one file as --data to train on it")
    return parts


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The hub's description of each column; empty where there is none or it is damaged."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names of a column's classes by the hub's description; None where there are none, or none that can be used."""
    names = _features(schema).get(column, {}).get("names")
    usable = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if usable else None


def holds_encoded(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def image_columns(schema: Any) -> list[str]:
    features = _features(schema)
    return [
        field.name
        for field in schema
        if holds_encoded(field.type)
        and (pa.types.is_struct(field.type) or features.get(field.name, {}).get("_type") == "Image")
    ]


def described(schema: Any) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)


def _image_column(schema: Any, wanted: str | None, spec: str) -> str:
    if wanted is None:
        found = image_columns(schema)
        if not found:
            raise UserError(f"--data {spec}: no image column; name it with --image-column: {described(schema)}")
        return found[0]
    if wanted not in schema.names:
        raise UserError(f"--image-column {wanted}: not in {spec}; {did_you_mean(wanted, schema.names)}")
    if not holds_encoded(schema.field(wanted).type):
        raise UserError(f"--image-column {wanted}: not encoded images; the columns of {spec}: {described(schema)}")
    return wanted


def _label_column(schema: Any, wanted: str | None, spec: str) -> str | None:
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(f"--label-column {wanted}: not in {spec}; {did_you_mean(wanted, schema.names)}")
        return wanted
    features = _features(schema)
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    marked = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in _LABEL_NAMES if name in integers]
    return next(iter(marked + named), None)


def read_groups(parts: Mapping[str, TablePart], group_by: str, spec: str) -> None:
    """Give the parts, by their names, the groups of a column of strings or numbers, a null being a group by itself; or
    of a pattern in the paths that rows name, as packed ones do.
    """
    for name, part in parts.items():
        files = [pq.ParquetFile(file) for file in part.files]
        if all(group_by in file.schema_arrow.names for file in files):
            values = [one for file in files for one in file.read(columns=[group_by])[group_by].to_pylist()]
            texts = ("" if value is None else str(value) for value in values)
            part.groups = group_numbers((text, f"{name} {row}") for row, text in enumerate(texts))
        elif any(paths := part.paths()):
            part.groups = by_pattern((path or "" for path in paths), group_by, name == "train")
        else:
            raise UserError(
                f"--group-by {group_by}: not in {spec}; {did_you_mean(group_by, files[0].schema_arrow.names)}"
            )


def _read_labels(
    parts: dict[str, list[str]], schemas: dict[str, Any], column: str, spec: str, *, asked: bool
) -> tuple[dict[str, Labels | None], list[str] | None]:
    """Class ids per part (None where all are missing) and the names: the metadata's, the strings, or the numbers."""
    values: dict[str, Any] = {}
    for part, files in parts.items():
        if column in schemas[part].names:
            tables = [pq.ParquetFile(file).read(columns=[column]).column(column) for file in files]
            values[part] = pa.chunked_array([chunk for table in tables for chunk in table.chunks], tables[0].type)
    kinds = {part: value.type for part, value in values.items()}
    names: list[str] | None = None
    if all(pa.types.is_integer(kind) or pa.types.is_boolean(kind) for kind in kinds.values()):
        names = _class_names(schemas["train"], column)
        for part in values:
            if (other := _class_names(schemas[part], column)) != names:
                raise UserError(f"--data {spec}: the classes of {part} are {other}, those of train {names}"[:1000])
        ids = {part: pc.fill_null(value.cast(pa.int64()), -1).to_numpy() for part, value in values.items()}
    elif all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds.values()):
        strings = {part: value.to_pylist() for part, value in values.items()}
        names = class_order({s for found in strings.values() for s in found if s is not None})
        rank: dict[str | None, int] = {**{s: index for index, s in enumerate(names)}, None: -1}
        ids = {part: np.array([rank[s] for s in found], np.int64) for part, found in strings.items()}
    else:
        raise UserError(f"--label-column {column}: {kinds['train']} values; integers or strings are read")
    lowest, highest = (min(i.min(initial=0) for i in ids.values()), max(i.max(initial=-1) for i in ids.values()))
    if lowest < -1 or highest >= (len(names) if names else MAX_CLASSES):
        if not asked and not names:
            return dict.fromkeys(parts), None  # a column that happens to be called label
        classes = len(names) if names else MAX_CLASSES
        raise UserError(f"--label-column {column}: values {lowest}..{highest}, but ids are 0..{classes - 1} (-1: none)")
    if names is None:
        names = [str(index) for index in range(highest + 1)]
    kept = {part: ids[part] if part in ids and (ids[part] >= 0).any() else None for part in parts}
    return kept, names
