"""Write images once, resized, into Parquet shards: later epochs decode less, and read large files from end to end.

    maekit pack --data ~/images --out shards --size 256

The shards have the hub's schema (image: struct of bytes and path; label), so `datasets`, pyarrow and other tools read
them too; `--data shards` reads them with the memory of a list of places. Order: that of the sample ids.
Cost: every image is decoded and encoded once; memory does not grow with their number.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from maekit.config import PackConfig, UserError
from maekit.data.loader import common_size
from maekit.data.parquet import TablePart
from maekit.data.parts import Part
from maekit.data.quarantine import allowed_bad, too_many
from maekit.data.shards import HUB_PARTS, Recipe, ShardWriter, pack_chunk, shard_bytes
from maekit.data.sources import open_source
from maekit.data.workers import choose_workers, in_order
from maekit.stopping import StopRequest
from maekit.terminal import counting, make_console, print_settings, remark, short_time

CHUNK = 16
"""Images that a process makes ready between two reports."""


@dataclass
class Count:
    """What was done so far."""

    images: int = 0
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    shards: int = 0
    bad: list[str] = field(default_factory=list)


def main(config: PackConfig) -> int:
    """Pack every part, then give the folder its name: it appears whole or not at all.

    Returns: the exit code: 0; 128 + the signal's number where one stopped it.

    Raises:
        UserError: flags or data that cannot be used, a folder that is not free, or too many unreadable images.
    """
    out = Path(os.path.abspath(os.path.expanduser(config.out)))
    temporary = out.parent / f".{out.name}.packing"
    problems = config.problems() + places_problems(config.out, out, temporary)
    if problems:
        raise UserError(*problems)
    console = make_console()
    source = open_source(config.data, image_column=config.image_column, label_column=config.label_column)
    remark(console, source.remarks())
    parts = {"train": source.train}
    parts |= {name: part for name, part in (("val", source.val), ("test", source.test)) if part is not None}
    # A part without labels gets the column too: other tools want one schema.
    classes = next((part.class_names for part in parts.values() if part.class_names is not None), None)
    say_whether_worth_it(console, source.train, config.size)
    began = time.monotonic()
    stop, count = StopRequest(), Count()
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {config.out}: cannot be written ({error.strerror})") from None
        with stop.listening():
            for name, part in parts.items():
                pack_part(config, name, part, classes, temporary, console, count)
            os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if stop.number:
        console.print(f"stopped by {stop.name}: nothing was kept")
        return stop.exit_code
    for line in count.bad[:5]:
        console.print(f"[yellow]left out:[/yellow] {escape(line)}", soft_wrap=True)
    print_settings(console, "packed", summary(config, Path(config.out), count, time.monotonic() - began))
    return 0


def places_problems(given: str, out: Path, temporary: Path) -> list[str]:
    """What keeps the shards from being written there."""
    if not given or not out.name:
        return [f"--out {given!r}: name a folder for the shards, such as shards"]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return [f"--out {given}: exists and is not empty; name another folder"]
    if temporary.exists():
        return [
            f"--out {given}: {temporary} is left from a maekit pack that was killed, or one is at work; if none is, "
            "delete it"
        ]
    return []


def say_whether_worth_it(console: Console, part: Part, size: int) -> None:
    """Small images of one size gain nothing by packing; said, and done all the same."""
    shape, _ = common_size(part)
    if shape is not None and min(shape) <= size:
        console.print(
            f"[yellow]all images are {shape[0]} x {shape[1]}, not above --size {size}: none will be resized.[/yellow] "
            "Training reads such images into memory once, so packing them makes no epoch faster"
        )


def pack_part(
    config: PackConfig, name: str, part: Part, classes: list[str] | None, folder: Path, console: Console, count: Count
) -> None:
    """One part's shards, and its unreadable images in quarantine.jsonl."""
    recipe = Recipe(config.size, config.format, config.quality)
    workers = choose_workers(config.workers, 1).value
    chunks = (range(start, min(start + CHUNK, len(part))) for start in range(0, len(part), CHUNK))
    writer = ShardWriter(folder, name, classes, shard_bytes(config.shard_size))
    bad_before = len(count.bad)
    try:
        with counting(console, f"packing {name}") as progress:
            for chunk, made in in_order(part, partial(pack_chunk, recipe), chunks, workers):
                for one in made:
                    if one.bad:
                        quarantine(folder / "quarantine.jsonl", name, part, one.index, one.bad)
                        count.bad.append(f"{part.name(one.index)}: {one.bad}")
                        check_share(config, part, count.bad[bad_before:])
                        continue
                    label = -1 if part.labels is None else int(part.labels[one.index])
                    writer.add(one.data, path_of(part, one.index), label)
                    count.images += 1
                    count.resized += one.resized
                    count.bytes_before += one.bytes_before
                    count.bytes_after += len(one.data)
                progress(chunk.stop, len(part))
        writer.finish()
    finally:
        writer.abandon()
    count.shards += writer.shards


def quarantine(path: Path, name: str, part: Part, index: int, reason: str) -> None:
    """One line about an image that is left out."""
    record = {"part": HUB_PARTS[name], "id": index, "name": part.name(index), "reason": reason}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def check_share(config: PackConfig, part: Part, reasons: list[str]) -> None:
    """Stop where too much cannot be read; a reason for each image that cannot.

    Raises:
        UserError: more than the allowed share.
    """
    bad = len(reasons)
    if bad > allowed_bad(config.max_bad_share, len(part)):
        way_out = (
            f"Nothing was kept; maekit check-data --data {config.data} names them all: mend or remove them, or give "
            "a larger --max-bad-share to leave them out"
        )
        raise UserError(
            f"--data {config.data}: so far {too_many(bad, len(part), config.max_bad_share, reasons, way_out)}"
        )


def path_of(part: Part, index: int) -> str:
    """The path that is stored with an image: where it came from."""
    return (part.path(index) if isinstance(part, TablePart) else None) or part.name(index)


def summary(config: PackConfig, out: Path, count: Count, seconds: float) -> dict[str, str]:
    """What was done and what to type next."""
    size = f"{count.bytes_before / 1e6:,.1f} MB before, {count.bytes_after / 1e6:,.1f} MB now"
    return {
        "images": f"{count.images:,} in {count.shards} shards; {count.resized:,} resized to --size {config.size}",
        "left out": f"{len(count.bad):,} that cannot be read" + (f": {out / 'quarantine.jsonl'}" if count.bad else ""),
        "bytes": size,
        "time": f"{short_time(seconds)}, {count.images / max(seconds, 1e-9):,.0f} images/s",
        "next": f"maekit pretrain folder --data {out}",
    }
