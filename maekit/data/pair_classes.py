"""Which classes annotations have: by a file of names, by flags, or by the values that occur."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from maekit.data.pair_parts import Counts
from maekit.data.parts import printable


class Asked(NamedTuple):
    """What the user said of the values on disk."""

    void: int | None
    void_is_asked: bool
    """Whether `void` is meant, or the default."""
    values: tuple[int, ...] | None


def name_classes(
    root: str, shown: str, classes: str | None, asked: Asked, count: Callable[[], Counts], notes: list[str]
) -> tuple[list[str], Numbering]:
    """The classes' names, and how the values on disk stand for them."""
    void, values, is_asked = asked.void, asked.values, asked.void_is_asked
    file = find_class_file(root if os.path.isdir(root) else os.path.dirname(root), classes)
    names = None if file is None else read_class_names(file[0], void, file[1])
    if file is not None and names != read_class_names(file[0], None, file[1]):
        is_asked = True  # the file says that void is void
    counts = count() if values is None and (names is None or len(names) <= 2) else None
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
    return names, check_numbering(void, names, values)
