"""Images that belong together, as those of one patient, slide or scene: no split parts them.

Where a patient's images lie on both sides of a split, a model is praised for knowing the patient. A group is known by a
number that follows from its name alone, so that new ones leave the order in which groups are held out as it is.
Legend: N images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from maekit.config import UserError
from maekit.data.parts import Labels, Part, PlacedPart, printable


def group_numbers(named: Iterable[tuple[str, str]]) -> Labels:
    """[N] A number for each image, by its group's name: 63 bits of the SHA-256. Of an empty name, by the image's own
    name, which is the second one: it is a group by itself.
    """
    numbers: dict[str, int] = {}

    def number(group: str, image: str) -> int:
        if not group:
            return _number(f"\0{image}")
        if group not in numbers:
            numbers[group] = _number(group)
        return numbers[group]

    return np.fromiter((number(group, image) for group, image in named), np.int64)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) >> 1


def find_groups(parts: Mapping[str, Part], group_by: str, spec: str) -> list[str]:
    """Give the parts, by their names, the groups of their images by a pattern of paths, where they have none of a
    column; returns what a user should know of them, a line each.

    Raises:
        UserError: no pattern, one that is not found in some path of train, or images that have no paths.
    """
    groups: dict[str, Labels] = {}
    for name, part in parts.items():
        if part.groups is None:
            if not isinstance(part, PlacedPart):
                raise UserError(
                    f"--group-by {group_by}: for files or tables with such a column, which --data {spec} is not"
                )
            part.groups = by_pattern(map(part.name, range(len(part))), group_by, name == "train")
        groups[name] = part.groups
    counts = {name: len(np.unique(numbers)) for name, numbers in groups.items()}
    counted = ", ".join(f"{count:,} in {name}" for name, count in counts.items())
    notes = [
        f"groups of images that no split parts, by {printable(group_by)}: {counted} (intervals of accuracies take "
        "images for independent: of few groups they are too narrow)"
    ]
    for name, numbers in groups.items():
        shared = np.isin(numbers, groups["train"])
        if name != "train" and shared.any():
            first = parts[name].name(int(np.argmax(shared)))
            notes.append(
                f"{len(np.unique(numbers[shared])):,} of the {counts[name]:,} groups of {name} have images in train "
                f"too, such as that of {first}: a score on them says too much"
            )
    return notes


def by_pattern(names: Iterable[str], group_by: str, every: bool) -> Labels:
    """[N] The groups of images by what is found in their paths. Where nothing is, an image is a group by itself.

    Raises:
        UserError: no pattern; or nothing is found in some path, where something must be in `every` one.
    """
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"--group-by {group_by}: no such column, and not a pattern of paths ({error})") from None
    first, strange = "", 0

    def named() -> Iterator[tuple[str, str]]:
        nonlocal first, strange
        for name in names:
            found = pattern.search(name)
            pieces = () if found is None else found.groups("") or (found[0],)
            if not any(pieces):
                first, strange = first if strange else name, strange + 1
            yield "\0".join(pieces) if any(pieces) else "", name

    numbers_N = group_numbers(named())
    if strange and every:
        others = f" and {strange - 1:,} of {len(numbers_N) - 1:,} other images" if strange > 1 else ""
        raise UserError(
            f"--group-by {group_by}: finds nothing in {first or 'an image without a path'}{others}; give "
            "a column of a table, or a pattern (a regular expression) that is found in every path, such as "
            r"'patient\d+' or '^([^/]+)/'"
        )
    return numbers_N
