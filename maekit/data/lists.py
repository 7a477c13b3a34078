"""Images by lists: a text file of paths, or a table (CSV, TSV) of paths with labels and parts."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from maekit.config import UserError, did_you_mean
from maekit.data.columns import Columns
from maekit.data.groups import group_numbers
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.parts import PART_WORDS, FilePart, Labels, Source, class_order, evenly_spaced, printable

PATH_COLUMNS = ("file_name", "filename", "path", "image", "image_path", "file")
LABEL_COLUMNS = ("label", "class", "category", "target", "labels", "class_name", "label_name", "category_name")
PART_COLUMNS = ("split", "part", "subset")
"""Names of a table's columns in any case, the first that is there; file_name is that of the hub's metadata.csv."""
Facts = tuple[str, str, str]
"""Of a table's row: part, label and group; empty for none."""
_SAMPLES = 1000
"""Paths that are looked for before a list is believed."""


def open_list(path: bytes, spec: str, name: str, in_chans: int) -> Source:
    """A text file of paths: one to a line, absolute or relative to the text file; blank lines and # are skipped.

    The order is the byte order of the lines; equal lines are kept once.

    Raises:
        UserError: no path in it, or none of a sample of its paths exists.
    """
    try:
        with open(path, "rb") as file:
            lines = {line.strip() for line in file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")}
    except OSError as error:
        raise UserError(f"--data {spec}: cannot be read ({error.strerror})") from None
    names = sorted(line for line in lines if line and not line.startswith(b"#"))
    if not names:
        raise UserError(f"--data {spec}: no paths in it; write one path of an image to a line")
    if any(b"\0" in line for line in names):
        raise UserError(f"--data {spec}: not a text file of paths")
    part = FilePart(os.path.dirname(path), names, in_chans)
    _look(part, spec)
    return Source(name, part)


def open_table(path: bytes, spec: str, name: str, in_chans: int, columns: Columns) -> Source:
    """A table with a heading: a column of paths (absolute or relative to it), and if there are, labels, parts, groups.

    Classes are the different labels, in the order of their numbers or bytes; an empty label is none, and labels that
    are all files of images are annotations, not classes. Parts are named as folders are (train, val, test; any case).
    The order is the byte order of the paths; equal rows are kept once.

    Raises:
        UserError: no such column, a row that is not whole, a path with two labels or in two parts, no training part, or
            none of a sample of its paths exists.
    """
    rows = read_rows(path, spec)
    heading = next(rows, [])
    paths = find_column(heading, columns.image, PATH_COLUMNS, "--image-column", spec)
    if paths is None:
        several = len(heading) == 1 and re.search("[;\t|]", heading[0])
        hint = (
            f"; values are separated by commas in a .csv, by tabs in a .tsv, and not by {several[0]!r}"
            if several
            else ""
        )
        raise UserError(
            f"--data {spec}: no column of paths in its first line ({', '.join(map(printable, heading))}): call it "
            "file_name, or give --image-column" + hint
        )
    labels = find_column(heading, columns.label, LABEL_COLUMNS, "--label-column", spec)
    parts = find_column(heading, None, PART_COLUMNS, "", spec)
    groups = heading.index(columns.group) if columns.group in heading else None
    found: dict[bytes, Facts] = {}
    shared: dict[Facts, Facts] = {}  # one object for all rows of a class

    def told(number: int) -> str:
        return f"--data {spec}: row {number}"

    for number, row in enumerate(rows, 2):
        if len(row) != len(heading):
            raise UserError(f"{told(number)} has {len(row)} values under {len(heading)} headings")
        image = os.fsencode(row[paths])
        if not image or b"\0" in image:
            raise UserError(f"{told(number)} has no path")
        said = "train" if parts is None else row[parts].lower()
        if said not in PART_WORDS:
            raise UserError(f"{told(number)}: {printable(said)!r} is no part; {did_you_mean(said, PART_WORDS)}")
        label, group = ("" if column is None else row[column] for column in (labels, groups))
        facts = PART_WORDS[said], label, group
        if found.setdefault(image, shared.setdefault(facts, facts)) != facts:
            raise UserError(
                f"{told(number)}: {printable(image)} stands in another row too, with another label, part or group"
            )
    if not found:
        raise UserError(f"--data {spec}: no rows below its first line")
    return _opened(found, path, spec, name, in_chans, grouped=groups is not None)


def read_rows(path: bytes, spec: str) -> Iterator[list[str]]:
    """The heading, then every row that is not blank; paths that are not UTF-8 stay what they are."""
    separator = "\t" if path.lower().endswith(b".tsv") else ","
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for row in csv.reader(file, delimiter=separator):
                if row:
                    yield [value.strip() for value in row]
    except OSError as error:
        raise UserError(f"--data {spec}: cannot be read ({error.strerror})") from None
    except csv.Error as error:
        raise UserError(f"--data {spec}: not a table ({error})") from None


def find_column(heading: list[str], asked: str | None, names: Sequence[str], flag: str, spec: str) -> int | None:
    """The place of a column: the one that was asked for, or the first of the usual names."""
    if asked is not None:
        if asked not in heading:
            raise UserError(f"{flag} {asked}: no such column in --data {spec}; {did_you_mean(asked, heading)}")
        return heading.index(asked)
    lower = [value.lower() for value in heading]
    return next((lower.index(usual) for usual in names if usual in lower), None)


def _opened(found: dict[bytes, Facts], path: bytes, spec: str, name: str, in_chans: int, *, grouped: bool) -> Source:
    labels = {label for _, label, _ in found.values() if label}
    pictures = all(os.path.splitext(label)[1].lower() in IMAGE_SUFFIXES for label in labels)  # a column of masks
    classes = [] if pictures else class_order(labels)
    ids = {label: index for index, label in enumerate(classes)}
    opened: dict[str, FilePart] = {}
    for part in {part for part, _, _ in found.values()}:
        images = sorted(image for image, facts in found.items() if facts[0] == part)
        numbers: Labels = np.array([ids.get(found[image][1], -1) for image in images], np.int64)
        opened[part] = FilePart(
            os.path.dirname(path), images, in_chans, labels=numbers if classes else None,
            class_names=[printable(label) for label in classes] if classes else None,
        )  # fmt: skip
        if grouped:
            opened[part].groups = group_numbers((found[image][2], os.fsdecode(image)) for image in images)
    if "train" not in opened:
        raise UserError(f"--data {spec}: no row of a train part; its parts: {', '.join(sorted(opened))}")
    _look(opened["train"], spec)
    return Source(name, opened["train"], opened.get("val"), opened.get("test"))


def _look(part: FilePart, spec: str) -> None:
    if any(os.path.exists(part.path(int(index))) for index in evenly_spaced(len(part), _SAMPLES)):
        return
    folder = printable(part.root or b".")
    raise UserError(f"--data {spec}: no such file as {part.name(0)}; relative paths start at {folder}")
