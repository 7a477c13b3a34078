"""Which classes annotations have: by a file of names, by flags, or by the values that occur."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from maekit.config import UserError
from maekit.data.annotations import (
    Numbering,
    check_numbering,
    counted_class_names,
    find_class_file,
    read_class_names,
    two_values,
)
from maekit.data.class_tables import read_class_table
from maekit.data.pair_parts import Counts, PairPart, are_coloured
from maekit.data.parts import printable

_BACKGROUND = ("background", "_background_", "__background__", "bg")


class Asked(NamedTuple):
    """What the user said of the values on disk."""

    void: int | None
    void_is_asked: bool
    """Whether `void` is meant, or the default."""
    values: tuple[int, ...] | None


class Named(NamedTuple):
    """The classes' names, and how the values on disk stand for them."""

    names: list[str]
    numbering: Numbering
    void_is_assumed: bool = False
    """Whether 0 is void by default, and nothing that the user gave says so."""


def name_classes(
    root: str, shown: str, classes: str | None, asked: Asked, count: Callable[[], Counts], train: PairPart,
    notes: list[str],
) -> Named:  # fmt: skip
    """By a file of names, or as counted from the annotations of which `train` is a part."""
    void, is_asked, values = asked
    file = find_class_file(root if os.path.isdir(root) else os.path.dirname(root), classes)
    if file is not None and file[0].suffix.lower() == ".csv":
        return _by_table(*file, asked, train, notes)
    names = None if file is None else read_class_names(file[0], void, file[1])
    if file is not None and names != read_class_names(file[0], None, file[1]):
        is_asked = True  # the file says that void is void
    begins = names is not None and names[0].lower() in _BACKGROUND and not is_asked
    counts = count() if values is None and (names is None or len(names) <= 2 or begins) else None
    if begins and names is not None and counts is not None and counts[0] and not counts[len(names) :].any():
        void, is_asked = None, True
        notes.append(f"value 0 is {names[0]!r}, as the first line of {file[0].name if file else ''} is called")
    two = None if counts is None else two_values(counts, void if is_asked else None)
    if two is not None:
        void, values = (void if is_asked else None), (None if two == (0, 1) else two)
        if file is not None and names is not None and len(names) == 1:
            raise UserError(
                f"{file[1]} {printable(str(file[0]))}: names one class, {names[0]!r}, and the annotations have two, "
                f"0 and {two[1]}: write a line for each, that of 0 first"
            )
    if names is None:
        if values is None and two is None:
            assert counts is not None
            names = counted_class_names(counts, void, f"--data {shown}")
        else:
            names = [f"class {value}" for value in values or two or ()]
        if two is None:
            how = "by --class-values" if counts is None else "counted from the annotations (--classes FILE)"
            notes.append(f"no classes.txt beside the data: {len(names)} classes, {how}")
    if two is not None:
        rest = "and none is void" if void is None else f"and {void} is void"
        notes.append(f"the annotations hold {two[0]} and {two[1]}: two classes, {names[0]} and {names[1]}, {rest}")
    if len(names) == 1:
        told = "" if void is None else f"; pixels of value {void} are void: if they are a class too, give --void none"
        raise UserError(f"--data {shown}: one class only, {names[0]!r}, so there is nothing to tell apart{told}")
    return Named(names, check_numbering(void, names, values), void == 0 and not is_asked)


def _by_table(path: Path, told: str, asked: Asked, train: PairPart, notes: list[str]) -> Named:
    """As a table of classes says; its colours count where the annotations are pictures of colours."""
    table = read_class_table(path, told)
    what = f"{told} {printable(str(path))}"
    if table.colours is not None and are_coloured(train):
        void = None if table.void_colour is None else len(table.names)
        if asked.values is not None or (asked.void_is_asked and asked.void != void):
            raise UserError(f"{what}: says which colours are classes; --void and --class-values are for numbers")
        colours = table.colours + (() if table.void_colour is None else (table.void_colour,))
        notes.append(f"classes by the colours of {path.name}")
        return Named(table.names, Numbering(void, len(table.names), colours=colours))
    values = asked.values if asked.values is not None else table.values
    if values is None:  # names only, as in a text file
        return Named(table.names, check_numbering(asked.void, table.names), asked.void == 0 and not asked.void_is_asked)
    void = asked.void if asked.void_is_asked else table.void_value
    first = 1 if void == 0 else 0
    counts_up = values == tuple(range(first, first + len(values)))
    notes.append(f"classes by the values of {path.name}")
    return Named(table.names, check_numbering(void, table.names, None if counts_up else values))
