"""Values out of files that strangers wrote, taken as what they should be or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LONGEST = 4_000
"""Letters of one text on the page."""
_HUGE = 1e30


def number(value: object) -> float | None:
    """A finite number of bounded size; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) >> 63:
        return None
    return float(value) if math.isfinite(value) and abs(value) < _HUGE else None


def count(value: object) -> int | None:
    """A whole number that is not negative; None for all else."""
    found = number(value)
    return int(value) if found is not None and isinstance(value, int) and found >= 0 else None


def text(value: object, most: int = LONGEST) -> str:
    """A string, shortened; empty for all else."""
    if not isinstance(value, str):
        return ""
    return value if len(value) <= most else value[: most - 3] + "..."


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; empty for all else."""
    return {key: item for key, item in value.items() if isinstance(key, str)} if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """A JSON array; empty for all else."""
    return list(value) if isinstance(value, list | tuple) else []


def share(value: object) -> float | None:
    """A number in 0..1."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def shown(value: object) -> str:
    """A setting as it would be typed, or None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        found = number(value)
        return "?" if found is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value[:40]) + (" ..." if len(value) > 40 else "")
    if isinstance(value, str):
        return text(value) or "(empty)"
    return text(str(value)[:LONGEST])
