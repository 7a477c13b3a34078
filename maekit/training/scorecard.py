"""A classifier's score as it is written down and shown: card.json, and a table of its classes.

Shapes: K classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from maekit.environment import environment
from maekit.terminal import make_table
from maekit.training.imbalance import TestClasses
from maekit.training.interval import in_words, percent, wilson
from maekit.training.saving import write_whole
from maekit.training.scoring import Score, worst_confusions

CARD, CONFUSION = "card.json", "confusion.png"
SHOWN = 10
"""Classes, at most, that the table names; beyond, the worst of them. And confusions half as many."""


def with_interval(found: Score) -> str:
    """The accuracy in percent with its 95 % interval."""
    return in_words(found.top1, found.images)


def scored_steps(folder: Path) -> int | None:
    """The length, in steps, of the run whose weights a card speaks of; None where there is no card that can be read."""
    try:
        steps = json.loads((folder / CARD).read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def write_card(
    folder: Path,
    facts: dict[str, Any],
    found: Score,
    told: TestClasses,
    what: str,
    unreadable: int,
    device: torch.device,
) -> None:
    """card.json: every number of the score."""
    classes = told.names
    card = facts | {
        "classes": list(classes), "test": what, "test_images": found.images, "unreadable": unreadable,
        "top1": found.top1, "top1_interval_95": list(found.interval), "top5": found.top5,
        "top5_interval_95": list(wilson(found.top5, found.images)), "loss": found.loss,
        "balanced": found.balanced, **told.facts(),
        "per_class": dict(zip(classes, found.per_class, strict=True)),
        "class_images": dict(zip(classes, found.class_images, strict=True)),
        "confusion": None if found.confusion_KK is None else found.confusion_KK.tolist(),
        "environment": environment(device),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CARD, json.dumps(card, indent=2) + "\n")


def print_score(console: Console, found: Score, told: TestClasses, title: str) -> None:
    """Accuracy of each class, what classes of different sizes make of the whole, and the commonest confusions."""
    classes = told.names
    order = [k for k in range(len(classes)) if found.per_class[k] is not None]
    worst = len(order) > SHOWN
    if worst:
        order = sorted(order, key=lambda k: found.per_class[k] or 0.0)[:SHOWN]
    rows = [
        [escape(classes[k]), f"{found.class_images[k]:,}", percent(found.per_class[k] or 0.0, found.class_images[k])]
        for k in order
    ]
    heading = escape(title) + (f"; the {SHOWN} worst of {len(classes)} classes" if worst else "")
    console.print(f"[bold]{heading}[/bold]")  # a table's own title is folded to its width
    console.print(make_table("", ["class", "images", "top-1 % (95 % interval)"], rows))
    told.warn(console)
    console.print(f"{told.largest_said()}; mean over the classes (balanced accuracy) {100 * found.balanced:.1f} %",
                  markup=False, highlight=False)  # fmt: skip
    pairs = [] if found.confusion_KK is None else worst_confusions(found.confusion_KK, SHOWN // 2)
    if pairs:
        said = ", ".join(f"{classes[a]} as {classes[b]} ({count:,})" for a, b, count in pairs)
        console.print(f"taken for another: {said}", markup=False)
