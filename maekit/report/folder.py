"""A run's folder as it is: finished, stopped, being written at this moment, damaged, or made by a stranger.

Nothing in it is believed or run: every file is bounded, plain, and inside of the folder; what cannot be read is a line
on the page, never an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from maekit.config import FinetuneConfig, PretrainConfig, UserError
from maekit.config.segmentation import SegmentConfig
from maekit.configfile import MAX_BYTES, from_values
from maekit.report.values import count, items, mapping, number, text
from maekit.training import lock
from maekit.training.card import CARD
from maekit.training.metrics import read_leniently
from maekit.training.run import BAD_STEPS_FILE

Task = Literal["pretrain", "finetune", "segment", "probe"]
KINDS: dict[Task, type[PretrainConfig] | type[FinetuneConfig] | type[SegmentConfig]] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "segment": SegmentConfig,
}  # fmt: skip
MOST_CARDS = 24
"""Cards of a folder that are shown."""
MOST_FILES = 20_000
_INNER = re.compile(r"(probe|finetune|scratch|segment|eval)-")
_PANEL = re.compile(r"epoch-(\d{1,9})(?:_step-(\d{1,12}))?\.png")
_STEP = re.compile(r"step-(\d{6,15})")


@dataclass
class CardFile:
    """A card.json in a run's folder, or of one of the evaluations inside it."""

    name: str
    folder: Path
    values: dict[str, Any]
    kind: Task


@dataclass
class RunFolder:
    """Everything that a page says of one run."""

    path: Path
    shown_path: str
    """As it was typed."""
    task: Task
    config: dict[str, Any]
    typed: PretrainConfig | FinetuneConfig | SegmentConfig | None
    """The config with all values checked; None where it does not fit this version."""
    environment: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """The newest checkpoint's position."""
    cards: list[CardFile] = field(default_factory=list)
    panels: list[tuple[str, Path]] = field(default_factory=list)
    """What each is of, and its file, as they were drawn."""
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    bad_steps: list[dict[str, Any]] = field(default_factory=list)
    holder: str = ""
    """Who trains in the folder, as far as that can be seen from here."""
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name or self.shown_path

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [record for record in self.records if record.get("kind") == kind]

    def last(self, kind: str, name: str) -> float | None:
        """The last value of a quantity."""
        for record in reversed(self.records):
            if record.get("kind") == kind and (value := number(record.get(name))) is not None:
                return value
        return None

    @property
    def step(self) -> int:
        """Optimiser steps done, as the newest checkpoint or the last line of metrics.jsonl has it."""
        return max([count(self.state.get("step")) or 0, *(count(one.get("step")) or 0 for one in self.records[-50:])])

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps planned."""
        return count(self.state.get("total_steps")) or count(self.config.get("steps"))

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimiser steps of an epoch, from a line that has both."""
        for record in reversed(self.records):
            step, epoch = count(record.get("step")), number(record.get("epoch"))
            if step and epoch and epoch > 0:
                return step / epoch
        return None

    @property
    def own_card(self) -> dict[str, Any]:
        """The card of the run itself, of a run with labels."""
        return next((card.values for card in self.cards if card.folder == self.path), {})

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, and of a run with labels its score too."""
        total = self.total_steps
        done = total is not None and self.step >= total > 0
        return done and (self.task == "pretrain" or bool(self.own_card))


def read_run(named: str) -> RunFolder:
    """Read all of a folder that a page can show.

    Raises:
        UserError: no folder, or none of a run or a card.
    """
    path = Path(named).expanduser()
    if not path.is_dir():
        what = "is a file; name the run's folder" if path.exists() else "no such folder"
        raise UserError(f"{named}: {what}")
    remarks: list[str] = []
    config = read_object(path / "config.json", path, remarks)
    task = task_of(config, path)
    if task is None:
        inside = [name for name in names_in(path) if (path / name / "config.json").is_file()]
        hint = f"; there are some in it, such as {os.path.join(named, inside[0])}" if inside else ""
        raise UserError(
            f"{named}: holds no run (no config.json that can be read) and no card: name a folder that maekit pretrain, "
            f"finetune, segment or probe wrote{hint}"
        )
    run = RunFolder(path, named, task, config, None, remarks=remarks)
    if task in KINDS and config:
        try:
            run.typed = from_values(KINDS[task], config, path / "config.json")
            if problems := run.typed.problems():
                run.typed = None
                remarks.append(f"config.json: {'; '.join(problems[:3])}")
        except (UserError, ArithmeticError, TypeError, ValueError) as error:
            run.typed = None
            remarks.append(f"config.json does not fit this version of maekit: {str(error).splitlines()[0]}")
    run.environment = read_object(path / "env.json", path, remarks)
    run.records = read_log(path / "metrics.jsonl", path, remarks)
    run.unreadable = read_log(path / "quarantine.jsonl", path, remarks)
    run.bad_steps = read_log(path / BAD_STEPS_FILE, path, remarks)
    run.state = newest_state(path, remarks)
    run.holder = holder_of(path)
    run.cards = cards_of(path, task, remarks)
    run.panels = panels_of(path)
    return run


def task_of(config: Mapping[str, Any], path: Path) -> Task | None:
    """What wrote the folder."""
    for task in ("finetune", "segment"):
        if config.get("task") == task:
            return task
    if "sources" in config or not config:
        if is_inside(path / CARD, path) and (path / CARD).is_file():
            values = read_object(path / CARD, path, [])
            return "probe" if "scores" in values else kind_of(values)
        return "pretrain" if not config and (path / "metrics.jsonl").is_file() else None
    return "pretrain" if {"model", "recipe"} & config.keys() else None


def is_inside(path: Path, root: Path) -> bool:
    """Whether a file lies in the folder that is shown: a link could put somebody's other files on a page to share."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False


def read_object(path: Path, root: Path, remarks: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is none, which is remarked if there is something else."""
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        if not is_inside(path, root) or not path.is_file():
            raise ValueError("not a plain file of this folder")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        value = json.loads(data.decode(), parse_constant=lambda _: None)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return mapping(value)
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else text(str(error), 200)
        remarks.append(f"{path.relative_to(root)} cannot be read: {why}")
        return {}


def read_log(path: Path, root: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, as far as they can be read."""
    if not path.exists() and not path.is_symlink():
        return []
    try:
        if not is_inside(path, root):
            raise OSError("not a file of this folder")
        records, broken = read_leniently(path)
    except OSError as error:
        remarks.append(f"{path.name} cannot be read: {text(error.strerror or 'not a plain file of this folder')}")
        return []
    if broken:
        remarks.append(f"{path.name}: {broken:,} line{'s' if broken > 1 else ''} left out that cannot be read")
    return records


def newest_state(path: Path, remarks: list[str]) -> dict[str, Any]:
    """state.json of the newest checkpoint; the weights are not looked at."""
    folder = path / "checkpoints"
    for name in sorted((name for name in names_in(folder) if _STEP.fullmatch(name)), key=len_then_name, reverse=True):
        if found := read_object(folder / name / "state.json", path, remarks):
            return found
    return {}


def names_in(folder: Path) -> list[str]:
    """The names in a folder, bounded; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for _, entry in zip(range(MOST_FILES), entries, strict=False))
    except OSError:
        return []


def len_then_name(name: str) -> tuple[int, str]:
    """Numbers of any number of digits in their order."""
    return len(name), name


def holder_of(path: Path) -> str:
    """Who holds the lock, by its text; empty where that process is gone or nobody does.

    The lock itself is not touched: trying it, even for an instant, could turn away a run that begins.
    """
    try:
        if not is_inside(path / lock.FILE, path) or not (path / lock.FILE).is_file():
            return ""
        with (path / lock.FILE).open("rb") as file:
            return lock.named_in(file.read(200).decode(errors="replace"))
    except OSError:
        return ""


def kind_of(card: Mapping[str, Any]) -> Task | None:
    """Whose card it is."""
    if items(card.get("scores")):
        return "probe"
    if "top1" in card:
        return "finetune"
    return "segment" if "miou" in mapping(card.get("score")) else None


def cards_of(path: Path, task: Task, remarks: list[str]) -> list[CardFile]:
    """The folder's own card, then those of the evaluations inside it."""
    found = []
    places = [path] if task != "pretrain" else []
    places += [path / name for name in names_in(path) if _INNER.match(name)]
    for folder in places:
        if folder.is_dir() and (values := read_object(folder / CARD, path, remarks)):
            if kind := kind_of(values):
                found.append(CardFile(folder.name if folder != path else "", folder, values, kind))
            else:
                remarks.append(f"{(folder / CARD).relative_to(path)}: not a card that this version knows")
    if len(found) > MOST_CARDS:
        remarks.append(f"{len(found)} cards; the first {MOST_CARDS} are shown")
    return found[:MOST_CARDS]


def panels_of(path: Path) -> list[tuple[str, Path]]:
    """Panels as the names say when they were drawn."""
    found = []
    for name in names_in(path / "panels"):
        if (match := _PANEL.fullmatch(name)) and is_inside(path / "panels" / name, path):
            epoch = int(match[1])
            step = int(match[2]) if match[2] else 0
            words = f"epoch {epoch}" + (f", step {step:,}" if step else "")
            found.append(((epoch, step), words, path / "panels" / name))
    return [(words, file) for _, words, file in sorted(found)]
