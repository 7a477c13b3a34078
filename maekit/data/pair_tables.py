"""Images with annotations in tables.

Parquet of the hub's image schema has two columns of images, and parts by file name; CSV and TSV have two columns of
paths, and one of parts.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maekit.config import UserError, did_you_mean
from maekit.data.groups import group_numbers
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.lists import PART_COLUMNS, PATH_COLUMNS, find_column, read_rows
from maekit.data.pair_files import PATTERNS_HELP, pair_part
from maekit.data.pair_parts import PairPart
from maekit.data.parquet import (
    TablePart,
    described,
    find_files,
    holds_encoded,
    image_columns,
    read_groups,
    sorted_files,
)
from maekit.data.parts import FilePart, part_of, printable

_ANNOTATION_COLUMNS = ("annotation", "annotations", "label", "labels", "mask", "masks", "segmentation", "semantic_mask")
_PATH_COLUMNS = (*_ANNOTATION_COLUMNS, "mask_path", "annotation_path", "label_path")


def open_tables(
    root: str,
    shown: str,
    columns: tuple[str | None, str | None],
    in_chans: int,
    given: dict[str, list[str]] | None = None,
    group_by: str | None = None,
) -> dict[str, PairPart]:
    """Parts of Parquet files with a column of images and a column of annotations (and one of groups, which `group_by`
    names): of those `given`, or in `root`.
    """
    files: list[str] | dict[str, list[str]]
    files = given or (find_files(root, shown) if os.path.isdir(root) else [root] if _is_parquet(root) else [])
    if not files:
        raise UserError(
            f"--data {shown}: no annotations are found: neither images/ and masks/ (or annotations/, labels/), also "
            "below train/ and val/, nor train/ and train_masks/, nor files a.jpg and a_mask.png, nor Parquet; for "
            f"another layout, {PATTERNS_HELP}"
        )
    parts = sorted_files(files, shown)
    try:
        image, annotation = _two_columns(pq.ParquetFile(parts["train"][0]).schema_arrow, columns, shown)
        images = {
            part: TablePart(found, image, in_chans, None, None) for part, found in parts.items() if part != "test"
        }
        if group_by is not None:
            read_groups(images, group_by, shown)
        opened = {
            part: PairPart(found, TablePart(found.files, annotation, 1, None, None)) for part, found in images.items()
        }
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise UserError(f"--data {shown}: cannot be read as Parquet ({reason})") from None
    if not len(opened["train"]):
        raise UserError(f"--data {shown}: the training part has no rows")
    return {part: pairs for part, pairs in opened.items() if len(pairs)}


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def names_annotations(path: str, shown: str, given: dict[str, list[str]] | None = None) -> bool:
    """Whether a table or Parquet seems to have a column of annotations: by its heading and first row, or its schema."""
    if path.lower().endswith((".csv", ".tsv")):
        rows = read_rows(os.fsencode(path), shown)
        column = find_column(next(rows, []), None, _PATH_COLUMNS, "", shown)
        first = next(rows, [])
        return column is not None and len(first) > column and first[column].lower().endswith(tuple(IMAGE_SUFFIXES))
    files = given["train"] if given else find_files(path, shown) if os.path.isdir(path) else []
    files = [path] if _is_parquet(path) and os.path.isfile(path) else files
    try:
        return bool(files) and len(image_columns(pq.ParquetFile(files[0]).schema_arrow)) > 1
    except (OSError, pa.ArrowException):
        return False  # whoever reads it says why


def open_paths(
    file: str, shown: str, columns: tuple[str | None, str | None], in_chans: int, group_by: str | None = None
) -> dict[str, PairPart]:
    """Parts of a table with a column of images and one of annotations (paths, relative to it or absolute); and with a
    column split, if it has one; and with groups, if `group_by` names a column.

    Raises:
        UserError: no such column, a row that is not whole, an image in two rows that differ, or no row to train on.
    """
    rows = read_rows(os.fsencode(file), shown)
    heading = next(rows, [])
    image = find_column(heading, columns[0], PATH_COLUMNS, "--image-column", shown)
    annotation = find_column(heading, columns[1], _PATH_COLUMNS, "--annotation-column", shown)
    split = find_column(heading, None, PART_COLUMNS, "", shown)
    if image is None or annotation is None:
        raise UserError(
            f"--data {shown}: needs a column of images and one of annotations; its first line is "
            f"{', '.join(map(printable, heading))}: call them image and mask, or give --image-column and "
            "--annotation-column"
        )
    group = heading.index(group_by) if group_by in heading else None
    found: dict[bytes, tuple[str | None, bytes, str]] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != len(heading):
            raise UserError(f"--data {shown}: row {number} has {len(row)} values under {len(heading)} headings")
        part = "train" if split is None else part_of(row[split])
        if part is None:
            raise UserError(
                f"--data {shown}: row {number}: {printable(row[split or 0])!r} is no part (train, val, test)"
            )
        if part != "test" and not row[annotation]:
            raise UserError(f"--data {shown}: row {number}: {printable(row[image])} has no annotation")
        facts = part, os.fsencode(row[annotation]), "" if group is None else row[group]
        if found.setdefault(os.fsencode(row[image]), facts) != facts:
            raise UserError(f"--data {shown}: row {number}: {printable(row[image])} stands in another row too")
    opened: dict[str, PairPart] = {}
    for part in ("train", "val"):
        pairs = sorted((path, of) for path, (said, of, _) in found.items() if said == part)
        if pairs:
            opened[part] = pair_part(os.path.dirname(file), pairs, in_chans)
            if group is not None:
                opened[part].images.groups = group_numbers((found[path][2], os.fsdecode(path)) for path, _ in pairs)
            _look(opened[part], shown)
    if "train" not in opened:
        raise UserError(f"--data {shown}: no row of a train part")
    return opened


def _look(part: PairPart, shown: str) -> None:
    """Raises UserError where an image or an annotation is not there, naming the first."""
    for side in (part.images, part.annotations):
        assert isinstance(side, FilePart)
        for path in map(side.path, range(len(side))):
            if not os.path.isfile(path):
                raise UserError(f"--data {shown}: no such file as {printable(path)}")


def _two_columns(schema: Any, columns: tuple[str | None, str | None], shown: str) -> tuple[str, str]:
    """The columns of images and of annotations: those asked for, or by kind and name."""
    for flag, wanted in zip(("--image-column", "--annotation-column"), columns, strict=True):
        if wanted is not None and wanted not in schema.names:
            raise UserError(f"{flag} {wanted}: not in {shown}; {did_you_mean(wanted, schema.names)}")
        if wanted is not None and not holds_encoded(schema.field(wanted).type):
            raise UserError(f"{flag} {wanted}: not encoded images; the columns of {shown}: {described(schema)}")
    image, annotation = columns
    if image is not None and image == annotation:
        raise UserError(f"--image-column and --annotation-column are both {image}")
    others = [name for name in image_columns(schema) if name not in columns]
    if annotation is None:
        named = [name for name in others if name.lower() in _ANNOTATION_COLUMNS]
        # where no name tells, the images come first
        annotation = next(iter(named or others[0 if image else 1 :]), None)
    if image is None:
        image = next((name for name in others if name != annotation), None)
    if image is None or annotation is None:
        flags = "--image-column and --annotation-column"
        raise UserError(f"--data {shown}: two image columns are needed; name them by {flags}: {described(schema)}")
    return image, annotation
