"""Configs as JSON: written beside a run, read back with every value checked. Reading one cannot run code."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import stat
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from maekit.config import UserError, did_you_mean

Config = TypeVar("Config")

MAX_BYTES = 16 << 20
"""A larger text is refused; real configs hold kilobytes."""
MAX_TEXT = 8192
"""Characters in one string: more than the longest path has."""
_SHOWN = 8
"""Unknown fields that are named; looking for similar names takes time."""

_short = reprlib.Repr()
_short.maxother = _short.maxstring = _short.maxlong = 80


def to_json(config: Any) -> str:
    """A config as readable JSON, in the order of its fields."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[Config], text: str, source: str | Path) -> Config:
    """A config read back from JSON; only plain values are built, so reading one cannot run code.

    Raises:
        UserError: not JSON, an unknown field, or a value of another type; all of them at once.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: {len(text)} characters of JSON; at most {MAX_BYTES} are read")
    try:
        values = json.loads(text)
    except RecursionError:
        raise UserError(f"{source}: not a config (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    return from_values(kind, values, source)


def read(kind: type[Config], path: Path) -> Config:
    """A config from a file, which may come from anywhere: a pipe is never opened, and the size is bounded.

    Raises:
        UserError: no such file, not a plain one, not UTF-8, or whatever `from_json` refuses.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a plain file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return from_json(kind, data.decode(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not JSON (not UTF-8)") from None


def written_by(folder: str) -> str:
    """The task that a run's config.json names; empty where there is none to read, which the task itself will say."""
    path = Path(folder) / "config.json"
    try:
        if not path.is_file():  # a pipe would block whoever opens it
            return ""
        with path.open("rb") as file:
            values = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    task = values.get("task") if isinstance(values, dict) else ""
    return task if isinstance(task, str) else ""


def from_values(kind: type[Config], values: Any, source: str | Path) -> Config:
    """A dataclass from plain values, nested ones included; raises UserError with all that is wrong."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    found = [
        f"{source}: unknown field {_short.repr(name)}; {did_you_mean(str(name)[:80], hints)}"
        for name in unknown[:_SHOWN]
    ]
    if len(unknown) > _SHOWN:
        found.append(f"{source}: and {len(unknown) - _SHOWN} more unknown fields")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            continue
        try:
            if dataclasses.is_dataclass(hints[name]):
                fields[name] = from_values(hints[name], value, f"{source}, {name}")
            else:
                fields[name] = _checked(value, hints[name])
        except UserError as error:
            found += error.problems
        except TypeError:
            found.append(f"{source}: field {name!r} is {_short.repr(value)}, expected {_readable(hints[name])}")
        except OverflowError:
            found.append(f"{source}: field {name!r} is {_short.repr(value)}, beyond what 64 bits hold")
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        has_default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if item.name not in values and not has_default:
            found.append(f"{source}: field {item.name!r} is missing")
    if found:
        raise UserError(*found)
    return kind(**fields)


def _checked(value: Any, hint: Any) -> Any:
    """The value as the hint's type; TypeError where it is of another, OverflowError where it is a number beyond it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            try:
                return _checked(value, argument)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_checked(item, arguments[0]) for item in value)
        if len(value) != len(arguments):
            raise TypeError
        return tuple(_checked(item, argument) for item, argument in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {_checked(key, arguments[0]): _checked(item, arguments[1]) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # OverflowError beyond 1e308
    if type(value) is not hint and not (hint is types.NoneType and value is None):
        raise TypeError
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise TypeError
    if isinstance(value, int) and abs(value) >> 63:  # longer ones cannot even be formatted as floats
        raise OverflowError
    return value


def _readable(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")
