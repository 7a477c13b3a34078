"""Every form of data for segmentation: folders in the usual layouts, tables, or files paired by pattern.

- A folder in one of the layouts of pair_layouts.py, such as images/ beside masks/.
- Parquet in the hub's image schema with two columns of images (parts by file name); CSV and TSV with two columns of
  paths (parts by a column).
- Two patterns with one {} each, which stands for the name that both share, slashes included:
  "leftImg8bit/{}_leftImg8bit.png" and "gtFine/{}_gtFine_labelIds.png". Parts by the name's first folder (train, val),
  or by {part} in both.
- A data set of the hub in one of these forms.

Numbers on disk and class ids in memory (annotations.py): with `void` 0, the value 1 is class 0 and the first line of
the class file; with another void, such as 255, or none, the value 0 is class 0 and the first line. Annotations that are
black and white have two classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from maekit.config import UserError
from maekit.config.segmentation import PairsConfig
from maekit.data.annotations import VOID, Numbering
from maekit.data.archive_trees import refuse_archives
from maekit.data.groups import find_groups
from maekit.data.hub import hub_hint, located
from maekit.data.pair_classes import Asked, name_classes
from maekit.data.pair_layouts import find_sides, open_layout
from maekit.data.pair_parts import PairPart, PartCheck, Progress, check_parts, complain, count_values
from maekit.data.pair_patterns import by_pattern
from maekit.data.pair_tables import open_paths, open_tables
from maekit.data.parts import printable
from maekit.data.pixels import BadImage
from maekit.data.sources import short_name

__all__ = [
    "VOID",
    "BadImage",
    "Numbering",
    "PairPart",
    "Pairs",
    "PartCheck",
    "check_pairs",
    "open_checked",
    "open_pairs",
    "refuse_one_class",
]


@dataclass
class Pairs:
    """What `--data` stands for. `name` is short and fit for folder names."""

    name: str
    train: PairPart
    val: PairPart | None
    class_names: list[str]
    """K names; a class's id in memory is its place here."""
    numbering: Numbering
    """How the values on disk stand for the classes, and which is void."""
    void_is_assumed: bool = False
    """Whether 0 is void by default, and nobody said so."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: where the names come from, annotations that belong to no image."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def parts(self) -> dict[str, PairPart]:
        """'train', and 'val' where there is one."""
        return {"train": self.train, **({} if self.val is None else {"val": self.val})}


def open_pairs(
    spec: str,
    *,
    in_chans: int = 3,
    classes: str | None = None,
    void: int | None = 0,
    void_is_asked: bool = False,
    class_values: tuple[int, ...] | None = None,
    image_pattern: str | None = None,
    annotation_pattern: str | None = None,
    image_column: str | None = None,
    annotation_column: str | None = None,
    group_by: str | None = None,
    workers: int = 0,
    on_progress: Progress = lambda _done, _total: None,
) -> Pairs:
    """Images and annotations, listed; no image is decoded, and annotations only where classes must be counted.

    The class names come from the text file `classes`, or classes.txt in the folder; where there is none, all
    annotations are read (by `workers` processes) and the classes are called 'class 1', 'class 2', ...
    class_values: the values on disk of the classes, in their order; all others but void are mistakes. Without them,
    annotations that are black and white (0 and 1, 255 or 65535) have two classes, unless one is void by `void`: 0 is
    so where it `void_is_asked`, not by default.

    Raises:
        UserError: nothing of that name, no pairs in it, an image without an annotation, a bad class file or void, or
            one class only.
    """
    shown = printable(spec)
    local = located(spec)
    root = local.root
    refuse_archives(root, shown)
    if not spec or not os.path.exists(root):
        raise UserError(f"--data {shown}: no such file or folder{hub_hint(shown)}")
    notes = [*local.notes]
    patterns = (image_pattern, annotation_pattern)
    columns = (image_column, annotation_column)
    if any(pattern is not None for pattern in patterns):
        found = by_pattern(root, shown, patterns, in_chans, notes)
        _refuse_columns(columns, shown)
    elif os.path.splitext(root)[1].lower() in (".csv", ".tsv") and os.path.isfile(root):
        found = open_paths(root, shown, columns, in_chans, group_by)
    elif local.parts is None and os.path.isdir(root) and (sides := find_sides(root, shown)):
        found = open_layout(root, shown, sides, in_chans, notes)
        _refuse_columns(columns, shown)
    else:
        found = open_tables(root, shown, columns, in_chans, local.parts, group_by)
    if group_by is not None:
        notes += find_groups({name: part.images for name, part in found.items()}, group_by, shown)
    if class_values is not None and not void_is_asked:
        void = None
    asked = Asked(void, void_is_asked or void != 0 or class_values is not None, class_values)
    count = partial(count_values, list(found.values()), shown, workers, on_progress)
    names, numbering, assumed = name_classes(root, shown, classes, asked, count, found["train"], notes)
    for part in found.values():
        part.numbering = numbering
    return Pairs(local.name or short_name(root), found["train"], found.get("val"), names, numbering, assumed, notes)


def open_checked(
    data: str, config: PairsConfig, *, in_chans: int, workers: int, on_progress: Progress = lambda _done, _total: None
) -> tuple[Pairs, dict[str, PartCheck]]:
    """The pairs of `data` as the flags for pairs say, and what `check_pairs` finds in each part; errors as of both."""
    pairs = open_pairs(
        data, in_chans=in_chans, classes=config.classes, void=config.void_value, void_is_asked=config.void is not None,
        class_values=config.class_values, image_pattern=config.image_pattern,
        annotation_pattern=config.annotation_pattern, image_column=config.image_column,
        annotation_column=config.annotation_column, group_by=config.group_by, workers=workers, on_progress=on_progress,
    )  # fmt: skip
    checks = check_pairs(pairs, workers=workers, on_progress=on_progress)
    pairs.notes += _note_void(pairs, checks)
    return pairs, checks


def _note_void(pairs: Pairs, checks: dict[str, PartCheck]) -> list[str]:
    """What the default for void makes of the annotations, where it makes a difference."""
    void = sum(check.void_pixels for check in checks.values())
    if not pairs.void_is_assumed or not void:
        return []
    pixels = sum((check.class_pixels for check in checks.values()), np.zeros(pairs.num_classes, np.int64))
    last = len(pixels) - 1
    shifted = f", and {pairs.class_names[0]!r} is value 1"
    if not pixels[last]:
        shifted += f"; no pixel has value {last + 1}, {pairs.class_names[last]!r}, so check that"
    return [
        f"value 0 ({void / (void + pixels.sum()):.1%} of the pixels) is void, of no class{shifted}: if 0 is a class, "
        "such as the background, give --void none"
    ]


def check_pairs(
    pairs: Pairs, *, workers: int = 0, on_progress: Progress = lambda _done, _total: None
) -> dict[str, PartCheck]:
    """Read every annotation and every image's header before training; pixels of each class for 'train' and 'val'.

    Images whose header cannot be read are no error here: `bad_images` names them.

    Raises:
        UserError: annotations that cannot be read, are coded by colours, differ in size from their image, or hold a
            value that stands for no class, each with its file, and values with their pixels.
    """
    found = check_parts(pairs.parts, workers, on_progress)
    complain(found, pairs.parts, pairs.name)
    return found


def refuse_one_class(pairs: Pairs, check: PartCheck, data: str) -> None:
    """Refuse training images that show one class only: whatever says so everywhere would be right.

    Raises:
        UserError: the class, with the value that stands for it.
    """
    there = [class_id for class_id, pixels in enumerate(check.class_pixels.tolist()) if pixels]
    if len(there) > 1:
        return
    name, value = pairs.class_names[there[0]], pairs.numbering.value(there[0])
    raise UserError(
        f"--data {data}: every training pixel that has a class is of {name!r} (value {value}), so there is nothing to "
        f"tell apart; {pairs.numbering.rule()}: another --void, or --class-values with the value of each class, reads "
        "other values as classes"
    )


def _refuse_columns(columns: Iterable[str | None], shown: str) -> None:
    flags = ("--image-column", "--annotation-column")
    given = [flag for flag, value in zip(flags, columns, strict=True) if value is not None]
    if given:
        raise UserError(f"{' and '.join(given)}: only for Parquet and tables, which --data {shown} is not")
