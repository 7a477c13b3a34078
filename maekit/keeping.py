"""A finished result is never written over by another: the earlier one stays beside it under a numbered name."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from maekit.config import UserError

OF_THE_DAY = {"seconds", "environment"}
"""What a card says of the machine and the hour, at any depth: two that differ in nothing else are the same result."""


@contextmanager
def keeping(result: Path, console: Console, *beside: str) -> Iterator[None]:
    """What this block puts into a result's place does not lose the result that is there.

    Where the new one says the same, the earlier is replaced; else it is kept as NAME-1, NAME-2, ..., the oldest with
    the lowest number, together with the files of its folder that belong to it. Either is said in a line. The block must
    replace files, as all of maekit's writers do, and not write into them: the kept names are links.

    result: the file that decides; beside: names of other files in its folder that belong to it.

    Raises:
        UserError: the earlier one cannot be kept, so the block is not begun.
    """
    names = [name for name in (result.name, *beside) if (result.parent / name).is_file()]
    if result.name not in names:
        yield
        return
    number = 1 + max((_last_number(result.parent / name) for name in names), default=0)
    kept = {name: numbered(result.parent / name, number) for name in names}
    try:
        for name, copy in kept.items():
            _link(result.parent / name, copy)
    except OSError as error:
        _forget(kept.values())
        raise UserError(
            f"{result}: is there and would be written over, and cannot be kept as {kept[result.name].name} "
            f"({error.strerror or error}): move it away, or name another place with --out"
        ) from None
    done = False
    try:
        yield
        done = True
    finally:
        if _same(result, kept[result.name]):
            _forget(kept.values())
            if done:
                _say(console, f"{result}: was there already and said the same")
        else:
            for name in set(names) - {result.name}:
                with suppress(OSError):  # what the block has not made anew belongs to the earlier result alone
                    if os.path.samefile(result.parent / name, kept[name]):
                        (result.parent / name).unlink()
            others = ", ".join(kept[name].name for name in names if name != result.name)
            told = f"{result}: the earlier one is kept as {kept[result.name].name}"
            _say(console, told + (f", with {others}" if others else ""))


def numbered(path: Path, number: int) -> Path:
    """NAME-3.json for NAME.json."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _last_number(path: Path) -> int:
    """The highest number under which something of this name is kept; 0: none."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d{{1,9}}){re.escape(path.suffix)}")
    found = (pattern.fullmatch(name) for name in os.listdir(path.parent))
    return max((int(match[1]) for match in found if match), default=0)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _forget(copies: Iterable[Path]) -> None:
    for copy in copies:
        copy.unlink(missing_ok=True)


def _same(one: Path, other: Path) -> bool:
    """Whether two results say the same; where one is not there, they do not."""
    try:
        if filecmp.cmp(one, other, shallow=False):
            return True
        return one.suffix == ".json" and _lasting(one) == _lasting(other)
    except (OSError, ValueError, RecursionError):
        return False


def _lasting(path: Path) -> Any:
    """A card's values without those of the day."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(item) for key, item in value.items() if key not in OF_THE_DAY}
        return [of(item) for item in value] if isinstance(value, list) else value

    return of(json.loads(path.read_text()))
