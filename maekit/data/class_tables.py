"""Tables of classes (CSV): names with the values on disk, or with the colours, that stand for them.

Roboflow's _classes.csv has the columns "Pixel Value" and "Class", Kaggle's class_dict.csv name, r, g, b.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from maekit.config import UserError
from maekit.data.annotations import MAX_CLASSES, VOID_NAMES, Colour
from maekit.data.lists import read_rows
from maekit.data.parts import printable

_NAMES = ("name", "class", "class_name", "label", "category")
_VALUES = ("pixel value", "value", "id", "index", "class_id", "label_id")
_COLOURS = (("r", "g", "b"), ("red", "green", "blue"))


class ClassTable(NamedTuple):
    """The classes in their order, and void, if a line is called so."""

    names: list[str]
    values: tuple[int, ...] | None
    colours: tuple[Colour, ...] | None
    void_value: int | None
    void_colour: Colour | None


def read_class_table(path: Path, told: str) -> ClassTable:
    """The table in a file; `told` names the flag or the data in messages.

    Raises:
        UserError: cannot be read, no column of names, a number that is none, or a value, colour or name in two lines.
    """
    what = f"{told} {printable(str(path))}"
    rows = read_rows(os.fsencode(path), printable(str(path)))
    heading = [name.lower() for name in next(rows, [])]
    name_at = next((heading.index(name) for name in _NAMES if name in heading), None)
    value_at = next((heading.index(name) for name in _VALUES if name in heading), None)
    colour_at = next(([heading.index(name) for name in names] for names in _COLOURS if {*names} <= {*heading}), None)
    if name_at is None:
        has = ", ".join(map(printable, heading)) or "nothing"
        raise UserError(f"{what}: no column name or class in its first line, which has {has}")
    found: dict[str, tuple[int | None, Colour | None]] = {}
    for number, row in enumerate(rows, 2):
        try:
            value = None if value_at is None else _within(int(row[value_at]), 65_535)
            colour = None if colour_at is None else _colour([_within(int(row[at]), 255) for at in colour_at])
            name = printable(row[name_at])
        except (ValueError, IndexError):
            raise UserError(f"{what}: line {number} is not a name with its numbers: {', '.join(row)}") from None
        facts = value, colour
        before = {one for said in found.values() for one in said if one is not None}
        if name in found or value in before or colour in before:
            raise UserError(f"{what}: line {number} ({', '.join(row)}) repeats a name, a value or a colour")
        found[name] = facts
    void = next((found.pop(name) for name in list(found) if name.lower() in VOID_NAMES), (None, None))
    if not 0 < len(found) <= MAX_CLASSES:
        raise UserError(f"{what}: {len(found):,} classes; there must be 1 to {MAX_CLASSES:,}")
    values, colours = (tuple(one for one in column if one is not None) for column in zip(*found.values(), strict=True))
    return ClassTable(list(found), values or None, colours or None, *void)


def _within(number: int, most: int) -> int:
    if not 0 <= number <= most:
        raise ValueError(number)
    return number


def _colour(numbers: list[int]) -> Colour:
    red, green, blue = numbers
    return red, green, blue
