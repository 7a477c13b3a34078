"""An evaluation card's row: what was measured of one set of features, as a line of the table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maekit.training.evaluation import DRAWS, Chosen
from maekit.training.interval import wilson

NOTE = (
    f"test accuracy, +- 95 % interval of the test sample (Wilson); few labels: mean +- deviation of {DRAWS} draws\n"
    "linear: by L-BFGS; LARS: the paper's linear probe, on kept features\n"
    "blocks, poolings and settings are chosen on held-out training images; the test split is scored once"
)


@dataclass(frozen=True)
class Row:
    """One set of features: what was searched and chosen, and what each probe then reached on the test split."""

    source: str
    width: int
    """Of one pooling's features."""
    features: str
    """What was kept of the images, in words."""
    search: list[dict[str, Any]]
    views: list[dict[str, Any]]
    probes: dict[str, list[Chosen]]
    test: dict[str, list[float]]
    seconds: dict[str, float]
    keras: dict[str, float] = field(default_factory=dict)
    """Accuracy of the Keras tutorial's own probe, where it was asked for: on test and on training images."""


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All probes, in the order in which they were run."""
    return list(dict.fromkeys(name for row in rows for name in row.test))


def place_of(row: Row) -> str:
    """Where a row's features come from: the linear probe's block and pooling, and k-NN's where they are others."""
    linear, knn = (
        f"{setting['block']} {setting['pooling']}" if setting["block"] else "-"
        for setting in (row.probes["linear"][0].setting, row.probes["knn"][0].setting)
    )
    return linear if linear == knn else f"{linear}; k-NN {knn}"


def line_of(row: Row, columns: Sequence[str], count: int) -> list[str]:
    """The table's line: name, place, and a cell for each probe."""
    return [row.source, place_of(row), *(cell(row.test.get(column, []), count) for column in columns)]


def seconds_of(row: Row) -> str:
    """Where a row's time went, in words."""
    spent = ", ".join(f"{name} {value:.0f}" for name, value in row.seconds.items() if value >= 0.5)
    return f"{row.source}: {sum(row.seconds.values()):.0f} s" + (f" ({spent})" if spent else "")


def cell(shares: Sequence[float], count: int) -> str:
    """Percent and half the width of the interval; of several draws mean and deviation; - where there is none."""
    if not shares:
        return "-"
    if len(shares) > 1:
        return f"{100 * np.mean(shares):.1f} +- {100 * np.std(shares, ddof=1):.1f}"
    low, high = wilson(shares[0], count)
    return f"{100 * shares[0]:.1f} +- {50 * (high - low):.1f}"


def score_of(row: Row, count: int) -> dict[str, Any]:
    """A row as card.json has it: the table's numbers by name, then everything that led to them."""
    linear = row.probes["linear"][0]
    probes = {
        name: [
            {"test": share, "interval": wilson(share, count), "heldout": one.heldout}
            | {"setting": one.setting, "sweep": one.sweep}
            for share, one in zip(row.test[name], chosen, strict=True)
        ]
        for name, chosen in row.probes.items()
    }
    return {
        "source": row.source,
        "pooling": place_of(row),
        "width": row.width * (2 if linear.setting["pooling"] == "both" else 1),
        "linear": row.test["linear"][0],
        "knn": row.test["knn"][0],
        "heldout_linear": linear.heldout,
        "decay": linear.setting["decay"],
        "features": row.features,
        "probes": probes,
        **({"keras": row.keras} if row.keras else {}),
        "search": row.search,
        "views": row.views,
        "seconds": {name: round(value, 2) for name, value in row.seconds.items()},
    }
