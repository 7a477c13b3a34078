"""Read every image of a data set without training: what is there, and what cannot be read.

    maekit check-data --data ~/images --out report.json

The reasons are those that a run would write into quarantine.jsonl. Annotations beside the images are read too, as
maekit segment would.
Images with the same pixels are told: copies of training images among the test images make every score too high.
Cost: every image is decoded once; memory grows by 16 bytes an image.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from maekit.config import CheckDataConfig, UserError
from maekit.data.hub import located
from maekit.data.pair_layouts import find_sides
from maekit.data.pair_tables import names_annotations
from maekit.data.pairs import open_checked, refuse_one_class
from maekit.data.parts import Part
from maekit.data.sources import open_configured
from maekit.data.survey import Bad, Copies, Survey, copies, summary, survey
from maekit.data.workers import choose_workers
from maekit.keeping import keeping
from maekit.terminal import counting, make_console, make_table, remark

_OTHER_CHANNELS = re.compile(r"([0-9]+) channels where --in-chans is ")
SHOWN = 20
"""Bad files and classes that are shown; --out has all."""


def main(config: CheckDataConfig) -> int:
    """Survey every part, print tables, and write the report.

    Returns: the exit code: 0 where every image can be read, 1 where some cannot.

    Raises:
        UserError: flags or data that cannot be used.
    """
    problems = config.pair_problems()
    if config.in_chans < 1:
        problems.append(f"--in-chans {config.in_chans}: must be above 0")
    if config.workers is not None and config.workers < 0:
        problems.append(f"--workers {config.workers}: must not be negative")
    if config.out is not None and Path(config.out).is_dir():
        problems.append(f"--out {config.out}: is a folder; name a file for the report, such as report.json")
    if problems:
        raise UserError(*problems)
    console = make_console()
    source = open_configured(config, config.in_chans)
    remark(console, source.notes)
    parts = source.named
    workers = choose_workers(config.workers, 1).value
    found: dict[str, Survey] = {}
    with Report(config.out) as report:
        for name, part in parts.items():
            with counting(console, f"reading {name}") as progress:
                found[name] = survey(part, workers, progress, partial(report.add, name, part))
        twice = copies(found, parts)
        report.finish(
            {
                "data": config.data,
                "in_chans": config.in_chans,
                "parts": {name: describe(part, found[name]) for name, part in parts.items()},
                "copies": {
                    "within_a_part": twice.within,
                    "in_another_part": twice.across,
                    "of_another_class": twice.contrary,
                },
            },
            console,
        )
    show(console, source.name, parts, found, report)
    show_copies(console, parts, twice)
    if has_annotations(config):
        show_annotations(console, config, workers)
    return 1 if any(one.bad for one in found.values()) else 0


class Report:
    """The JSON report, written as the bad files are found so that they need no memory; it appears whole or not at all.

    The first bad files are kept for the screen. Without a path, nothing is written.
    """

    def __init__(self, out: str | None) -> None:
        self.first: list[str] = []
        self.channels: Counter[str] = Counter()
        """Number of channels -> images that have it, which is not --in-chans."""
        self.path = Path(out).expanduser() if out is not None else None
        self._comma = ""
        if self.path is None:
            return
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
        self._file.write('{"bad": [')

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, part: Part, bad: Bad) -> None:
        """Bad files of a part, with their reasons."""
        for index, reason in bad:
            if found := _OTHER_CHANNELS.match(reason):
                self.channels[found[1]] += 1
            if len(self.first) < SHOWN:
                self.first.append(f"{part.name(index)}: {reason}")
            if self.path is not None:
                record = {"part": name, "id": index, "name": part.name(index), "reason": reason}
                self._file.write(f"{self._comma}\n  {json.dumps(record)}")
                self._comma = ","

    def finish(self, rest: dict[str, Any], console: Console) -> None:
        """Add all other entries and put the report into its place."""
        if self.path is not None:
            self._file.write("\n],\n" + json.dumps(rest, indent=1).removeprefix("{\n") + "\n")
            self._file.close()
            with keeping(self.path, console):
                os.replace(self._temporary, self.path)


def describe(part: Part, found: Survey) -> dict[str, Any]:
    """One part's numbers for the report."""
    return {
        "images": len(part),
        "readable": found.readable,
        "bad": found.bad,
        "height": summary(found.heights),
        "width": summary(found.widths),
        "eight_bit": found.eight_bit,
        "sixteen_bit_or_float": found.readable - found.eight_bit,
        "gray": found.gray,
        "with_frames_left_out": found.with_frames_left,
        "frames_left_out": found.frames_left,
        "labels": labels(part),
        "groups": None if part.groups is None else len(np.unique(part.groups)),
    }


def labels(part: Part) -> dict[str, int] | None:
    """Images of each class, unlabelled ones under an empty name; None where there are no labels."""
    if part.labels is None or part.class_names is None:
        return None
    counts = np.bincount(part.labels + 1, minlength=len(part.class_names) + 1).tolist()
    named = dict(zip(part.class_names, counts[1:], strict=True))
    return {**named, **({"": counts[0]} if counts[0] else {})}


def show(console: Console, title: str, parts: dict[str, Part], found: dict[str, Survey], report: Report) -> None:
    """Tables for people: sizes and depths, classes, the first bad files."""

    def sides(counted: dict[str, int]) -> str:
        return " / ".join(f"{side:,}" for side in counted.values()) or "-"

    columns = ["part", "images", "cannot be read", "height", "width", "16-bit or float", "gray", "labels"]
    rows = []
    for name, part in parts.items():
        one, classes = found[name], labels(part)
        rows.append(
            [name, f"{len(part):,}", f"{one.bad:,} ({one.bad / max(1, len(part)):.2%})", sides(summary(one.heights)),
             sides(summary(one.widths)), f"{one.readable - one.eight_bit:,}", f"{one.gray:,}",
             f"{sum(1 for c, n in classes.items() if c and n):,} classes" if classes else "none"]
        )  # fmt: skip
    console.print(make_table(escape(title), columns, rows))
    console.print("[dim]height and width in pixels: smallest / median / largest[/dim]")
    for name, part in parts.items():
        classes = labels(part)
        if classes:
            said = [f"{escape(c or 'unlabelled')} {count:,}" for c, count in list(classes.items())[:SHOWN]]
            more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
            console.print(f"{name}: {', '.join(said)}{more}")
    several, left = (sum(getattr(one, name) for one in found.values()) for name in ("with_frames_left", "frames_left"))
    if several:
        console.print(
            f"[yellow]only the first page or frame is read[/yellow] of {several:,} files, and {left:,} others are left "
            "out: write each as a file of its own to train on it; --in-chans N takes N gray pages as channels"
        )
    bad = sum(one.bad for one in found.values())
    for line in report.first:
        console.print(f"[yellow]cannot be read:[/yellow] {escape(line)}", soft_wrap=True)
    if bad > len(report.first):
        console.print(f"... and {bad - len(report.first):,} more" + ("" if report.path else ": --out FILE names all"))
    for chans, count in report.channels.most_common(1):
        if count > bad / 2:
            console.print(
                f"{count:,} of these have {chans} channels: --in-chans {chans} reads them; pretrain has it too"
            )
    if report.path is not None:
        console.print(f"report: {escape(str(report.path))}", soft_wrap=True)


def show_copies(console: Console, parts: dict[str, Part], twice: Copies) -> None:
    """That images are there more than once: a test image that was trained on is no test."""
    if not twice.within + twice.across:
        return
    said = [f"{twice.across:,} images have the same pixels as one of another part"] if twice.across else []
    said += [f"{twice.within:,} as one before them in their own part"] if twice.within else []
    contrary = f"; {twice.contrary:,} of them have another label than it" if twice.contrary else ""
    names = [" and ".join(parts[part].name(index) for part, index in pair) for pair in twice.examples]
    console.print("[yellow]copies:[/yellow] " + escape(f"{', '.join(said)}{contrary}, such as {'; '.join(names)}"),
                  soft_wrap=True)  # fmt: skip


def has_annotations(config: CheckDataConfig) -> bool:
    """Whether the data look like images with annotations, or the flags say so."""
    named = (config.image_pattern, config.annotation_pattern, config.annotation_column)
    local = located(config.data)
    root = local.root
    if any(named) or not os.path.exists(root):
        return any(named)
    if local.parts is None and os.path.isdir(root) and find_sides(root, config.data):
        return True
    return names_annotations(root, config.data, local.parts)


def show_annotations(console: Console, config: CheckDataConfig, workers: int) -> None:
    """The classes with their values and shares of the pixels, or why maekit segment would refuse the annotations."""
    try:
        with counting(console, "reading annotations") as progress:
            pairs, checks = open_checked(
                config.data, config, in_chans=config.in_chans, workers=workers, on_progress=progress
            )
        refuse_one_class(pairs, checks["train"], config.data)
    except UserError as error:
        console.print("[yellow]annotations: maekit segment would refuse them[/yellow]")
        for line in error.problems:
            console.print(line, markup=False, soft_wrap=True)
        return
    remark(console, pairs.notes)
    for part, check in checks.items():
        pixels = check.void_pixels + int(check.class_pixels.sum())
        there = [number for number, seen in enumerate(check.class_pixels.tolist()) if seen]
        said = [
            f"{pairs.class_names[number]} (value {pairs.numbering.value(number)}) "
            f"{check.class_pixels[number] / pixels:.1%}"
            for number in there[:SHOWN]
        ]
        more = [f"{len(there) - SHOWN} more"] if len(there) > SHOWN else []
        more += [f"{len(pairs.class_names) - len(there)} in no pixel"] if len(there) < len(pairs.class_names) else []
        void = [] if pairs.numbering.void is None else [f"void (value {pairs.numbering.void}) "
                                                        f"{check.void_pixels / pixels:.1%}"]  # fmt: skip
        console.print(
            f"annotations of {part}, {check.checked:,}, shares of the pixels: {', '.join([*said, *more, *void])}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
