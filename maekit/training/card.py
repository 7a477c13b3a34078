"""An evaluation card: rows of what was measured of one set of features each, as lines of the table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from maekit.config import ProbeConfig, UserError
from maekit.data.sources import Source
from maekit.data.splits import Split
from maekit.terminal import make_table
from maekit.training.evaluation import DRAWS, Chosen, held_out_S
from maekit.training.imbalance import TestClasses
from maekit.training.interval import FEW_TEST, percent, wilson
from maekit.training.saving import write_whole
from maekit.weights.passport import Passport

CARD, CONFIG = "card.json", "config.json"
FEW = "% labels"
"""How the columns of few-label probes end."""
HEADINGS = {"linear": "linear %", "lars": "LARS %", "knn": "k-NN %", "attentive": "attentive %", "paper": "paper's %",
            "keras": "tutorial's %"}  # fmt: skip
NAMED = 5
"""Unreadable images that are named."""
FEW_HELD_OUT = 100
"""Fewer held-out images than this, and a card says that its choices are rough."""


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
    balanced: dict[str, list[float]] = field(default_factory=dict)
    """What each probe reached there as the mean over the classes."""
    keras: dict[str, float] = field(default_factory=dict)
    """Accuracy of the Keras tutorial's own probe, where it was asked for: on test and on training images."""


def show_card(console: Console, title: str, rows: Sequence[Row], count: int, classes: TestClasses) -> None:
    """The table of all rows, of so many test images, and what its numbers are; where a class is much larger than
    others, also a table in which each class counts alike.
    """
    columns = columns_of(rows)
    headings = ["features", "block", *(HEADINGS.get(column, column) for column in columns)]
    console.print(make_table(title, headings, [line_of(row, columns, count) for row in rows]))
    if classes.is_uneven:
        even = [column for column in columns if any(column in row.balanced for row in rows)]
        lines = [[escape(row.source), *(even_cell(row.balanced.get(column, [])) for column in even)] for row in rows]
        headings = ["features", *(HEADINGS.get(column, column) for column in even)]
        console.print(make_table("the same as the mean over the classes (balanced accuracy)", headings, lines))
    console.print(classes.largest_said(), style="dim", markup=False, highlight=False)
    console.print(note_of(rows, count), style="dim", highlight=False)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All probes, in the order in which they were run."""
    return list(dict.fromkeys(name for row in rows for name in row.test))


def note_of(rows: Sequence[Row], count: int) -> str:
    """What the table's numbers of so many test images are and how they came about, as far as it has them."""
    columns = columns_of(rows)
    few = any(column.endswith(FEW) for column in columns)
    lars = "lars" in columns
    others = set(columns) - {"linear", "lars", "knn", "keras"}
    interval = "test accuracy and 95 % interval of the test sample (Wilson)"
    chosen = "blocks, poolings and settings are chosen on a held-out tenth of the training images"
    tutorial = ", the tutorial's probe" if "keras" in columns else ""
    fitted = f"L-BFGS{', LARS' if lars else ''}{tutorial} and k-NN are then fitted on that tenth too"
    small = [f"{count} test images: rows that differ by less than their intervals are not told apart by so few"]
    return "\n".join([
        interval + (f"; few labels: mean +- deviation of {DRAWS} draws of labels, beside that interval" if few else ""),
        *([f"few labels: in proportion to the classes, one of each at least: {labels_of(rows)}"] if few else []),
        *(small if count < FEW_TEST else []),
        "linear: by L-BFGS" + ("; LARS: the paper's linear probe, on kept features" if lars else ""),
        chosen + (", also for few labels" if few else ""),
        f"{fitted}{', the others without it' if others else ''}; the test split is scored once",
    ])  # fmt: skip


def labels_of(rows: Sequence[Row]) -> str:
    """How many images the probes with few labels were given, by their columns; where a class has hardly any, draws may
    differ.
    """
    given: dict[str, list[int]] = {}
    for row in rows:
        for name, chosen in row.probes.items():
            if name.endswith(FEW):
                given.setdefault(name, []).extend(int(one.setting["labels"]) for one in chosen)
    words = {name: " to ".join(dict.fromkeys(f"{n:,}" for n in (min(some), max(some)))) for name, some in given.items()}
    return ", ".join(f"{count} images under {name}" for name, count in words.items())


def place_of(row: Row) -> str:
    """Where a row's features come from: the linear probe's block and pooling, and k-NN's where they are others."""
    linear, knn = (
        f"{setting['block']} {setting['pooling']}" if setting["block"] else "-"
        for setting in (row.probes["linear"][0].setting, row.probes["knn"][0].setting)
    )
    return linear if linear == knn else f"{linear}; k-NN {knn}"


def line_of(row: Row, columns: Sequence[str], count: int) -> list[str]:
    """The table's line: name, place, and a cell for each probe."""
    return [escape(row.source), place_of(row), *(cell(row.test.get(column, []), count) for column in columns)]


def seconds_of(row: Row) -> str:
    """Where a row's time went, in words."""
    spent = ", ".join(f"{name} {value:.0f}" for name, value in row.seconds.items() if value >= 0.5)
    return f"{row.source}: {sum(row.seconds.values()):.0f} s" + (f" ({spent})" if spent else "")


def cell(shares: Sequence[float], count: int) -> str:
    """Percent with its interval; of several draws mean and deviation; - where there is none."""
    if not shares:
        return "-"
    if len(shares) > 1:
        return f"{100 * np.mean(shares):.1f} +- {100 * np.std(shares, ddof=1):.1f}"
    return percent(shares[0], count, gap="\n")  # a table of eight such columns would be too wide


def even_cell(shares: Sequence[float]) -> str:
    """Percent of a mean over classes, which has no interval of this kind; of several draws mean and deviation."""
    return cell(shares, 1) if len(shares) != 1 else f"{100 * shares[0]:.1f}"


def score_of(row: Row, count: int) -> dict[str, Any]:
    """A row as card.json has it: the table's numbers by name, then everything that led to them."""
    linear = row.probes["linear"][0]
    probes = {
        name: [
            {"test": share, "interval": wilson(share, count), "balanced": balanced, "heldout": one.heldout}
            | {"setting": one.setting, "sweep": one.sweep}
            for share, balanced, one in zip(row.test[name], row.balanced[name], chosen, strict=True)
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


@dataclass
class Card:
    """Rows as they come, in a file from the first one on: an error in a later source costs no hours of work."""

    folder: Path
    asked: dict[str, Any]
    """What config.json says."""
    rows: list[Row] = field(default_factory=list)

    def open(self, folder: Path) -> None:
        """Make the folder and write config.json, before anything is measured.

        Beside a finished card the settings have another name until the new card is finished too.

        Raises:
            UserError: it cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = "config-unfinished.json" if (folder / CARD).exists() else CONFIG
            write_whole(folder / name, json.dumps(self.asked, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from error

    def add(self, row: Row, count: int) -> None:
        """Keep a row; count: its test images."""
        self.rows.append(row)
        self._write("card-unfinished.json", self.asked, count)

    def finish(self, facts: dict[str, Any], count: int) -> None:
        """Write card.json (what is true of all rows, then the rows) and the settings that it is of."""
        self._write(CARD, facts, count)
        write_whole(self.folder / CONFIG, json.dumps(self.asked, indent=2) + "\n")
        for name in ("card-unfinished.json", "config-unfinished.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _write(self, name: str, facts: dict[str, Any], count: int) -> None:
        scores = {"scores": [score_of(row, count) for row in self.rows]}
        write_whole(self.folder / name, json.dumps(facts | scores, indent=2) + "\n")


def card_folder(config: ProbeConfig, sources: Sequence[str], data_name: str) -> Path:
    """--out, else probe-NAME (probe-NAME-PROTOCOL) in the run's folder, if one run is measured, else here."""
    if config.out is not None:
        return Path(config.out)
    base = Path(sources[0]) if len(sources) == 1 and Path(sources[0]).is_dir() else Path()
    return base / f"probe-{data_name}{'' if config.protocol == 'cached' else f'-{config.protocol}'}"


def say_left_out(console: Console, lines: list[str]) -> None:
    """Name a few of the images that could not be read."""
    for line in lines[:NAMED]:
        console.print(f"[yellow]unreadable, left out:[/yellow] {escape(line)}", soft_wrap=True)
    if len(lines) > NAMED:
        console.print(f"[yellow]{len(lines)} in all are left out:[/yellow] maekit check-data names them")


def classes_of(train: Split, test: Split) -> TestClasses:
    """The classes of the test images, beside those of the training images."""
    numbers = int(max(train.labels.max(), test.labels.max())) + 1
    names = train.part.class_names or [str(number) for number in range(numbers)]
    return TestClasses.of(train.labels.cpu().numpy(), test.labels.cpu().numpy(), names)


def heldout_count(train: Split) -> int:
    """How many of the training images choose."""
    return int(held_out_S(train.ids, train.part.groups).sum())


def say_what_is_doubtful(console: Console, name: str, passport: Passport, data: Source, train: Split) -> None:
    """What makes a card of these weights on these data say less than it seems to."""
    held_out = heldout_count(train)
    if held_out < FEW_HELD_OUT:
        console.print(f"[yellow]{held_out} held-out images choose blocks and settings:[/yellow] expect rough choices")
    if passport.recipe.startswith("finetune") and passport.fingerprint == data.train.fingerprint:
        console.print(
            f"[yellow]{escape(name)} was trained with these labels:[/yellow] also those of the held-out images, and "
            "more than the probes with few labels are given"
        )
    elif passport.recipe.startswith("finetune"):
        console.print(
            f"{escape(name)} was trained with labels: where they were these (files that came or went since hide that), "
            "the card says too much",
            style="dim",
        )
