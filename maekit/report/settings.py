"""What a run was told: how it differs from its recipe or preset, and every setting."""

from __future__ import annotations

import dataclasses
from typing import Any

from maekit.config import PRESETS, FinetuneConfig, PretrainConfig, flag, typed_flags
from maekit.config.segmentation import SegmentConfig, preset
from maekit.report.folder import RunFolder
from maekit.report.html import Html, code, details, heading, join, paragraph, table
from maekit.report.lint import lint
from maekit.report.values import items, shown, text

NOT_COMPARED = {
    "out", "data", "recipe", "preset", "task", "source", "follow_images", "or_resume", "weights_license", "device",
    "workers", "compile", "trackers", "processes", "eval",
}  # fmt: skip
"""Names, and what depends on the machine."""


def differences(run: RunFolder, recipe: PretrainConfig | None) -> list[tuple[str, str, str, str]]:
    """Flag, value here, value of the recipe or preset, and how it came about."""
    base: Any = recipe
    if isinstance(run.typed, FinetuneConfig):
        base = PRESETS[run.typed.preset]
    elif isinstance(run.typed, SegmentConfig):
        base = preset(run.typed.preset)
    if base is None or run.typed is None:
        return []
    words = [word for word in items(run.environment.get("command")) if isinstance(word, str)]
    given = set() if "resume" in words[:2] else typed_flags(words)
    following = set(base.follow_images) if hasattr(base, "follow_images") else set()
    found = []
    for item in dataclasses.fields(base):
        here, there = getattr(run.typed, item.name), getattr(base, item.name)
        name = f"--{flag(item.name)}"
        if item.name in NOT_COMPARED or same(here, there):
            continue
        if name in given or f"--no-{flag(item.name)}" in given:
            why = "given"
        elif item.name in following:
            why = "follows the number of images"
        elif there is None or there == "auto":
            continue  # what the recipe leaves open was filled in
        else:
            why = "follows from flags or weights" if given else "given, or follows from flags"
        found.append((name, shown(here), shown(there), why))
    return found


def same(one: object, other: object) -> bool:
    """Equal, lists and tuples alike; one side of a square is its two."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        first, second = list(one), list(other)
        if len(first) != len(second) and {len(first), len(second)} == {1, 2}:
            first, second = (side * 2 if len(side) == 1 else side for side in (first, second))
        return first == second
    return one == other


def settings_section(run: RunFolder, recipe: PretrainConfig | None, level: int) -> Html:
    """Differences from the recipe, then from the paper, then everything."""
    if run.task == "probe":
        return Html("")
    what = f"preset {text(run.config.get('preset'), 40)}"
    if run.task == "pretrain":
        what = f"recipe {text(run.config.get('recipe'), 100) or '?'}"
    parts = [heading(level, "Settings")]
    if run.typed is None or (recipe is None and run.task == "pretrain"):
        parts.append(paragraph(f"The {what} is not one of this version, so nothing is compared with it."))
    elif rows := differences(run, recipe):
        table_rows = [[code(name), here, there, why] for name, here, there, why in rows]
        parts.append(table(["flag", "this run", what, ""], table_rows, f"What differs from the {what}", (0, 1, 2, 3)))
    else:
        parts.append(paragraph(f"Nothing differs from the {what} but names and what depends on the machine."))
    if run.typed is not None:
        parts += [heading(level + 1, "Beside the paper's recipe"), lint(run.typed)]
    everything = [[code(f"--{flag(text(name, 80))}"), shown(value)] for name, value in list(run.config.items())[:200]]
    parts.append(details("All settings (config.json)", table(["field", "value"], everything, "", (0, 1))))
    return join(parts)
