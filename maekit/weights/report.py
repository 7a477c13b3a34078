"""What became of each tensor of a file when it was loaded: nothing is renamed, resized or left out in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_SHOWN = 6


@dataclass
class KeyReport:
    """The fate of every key; `missing` ones hold initial values, and `unused` ones were not read."""

    source: str = ""
    layout: str = "maekit"
    loaded: list[str] = field(default_factory=list)
    """Our names of the tensors that came from the file."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The file's name and ours, where they differ."""
    resized: list[str] = field(default_factory=list)
    """What was adapted in shape, and how."""
    missing: list[str] = field(default_factory=list)
    """Our names of the tensors that the file has not: they keep their initial values."""
    unused: list[str] = field(default_factory=list)
    """The file's names of the tensors that have no place here."""
    notes: list[str] = field(default_factory=list)
    """What else must be known, a sentence each."""
    license: str = ""
    """The licence of the weights, where it forbids commercial use."""

    def summary(self) -> list[str]:
        """One or two lines: the counts, then what is missing or was left out, adapted or assumed."""
        counts = f"{self.layout} layout: {len(self.loaded)} tensors loaded"
        for number, word in (
            (len(self.renamed), "renamed"), (len(self.resized), "resized"),
            (len(self.missing), "missing"), (len(self.unused), "unused"),
        ):  # fmt: skip
            counts += f", {number} {word}" if number else ""
        details = [*self.resized]
        if "decoder.mask_token" in self.missing:
            details.append("the decoder holds initial values")
        elif self.missing:
            details.append(f"initial values in {grouped(self.missing)}")
        details += [f"not used: {grouped(self.unused, parts=1)}"] if self.unused else []
        details += self.notes
        return [counts, *(["; ".join(details)] if details else [])]

    def remarks(self) -> list[str]:
        """The summary with its source, where something is to be said: nothing for weights that are used as they are."""
        plain = self.layout in ("maekit", "random") and not (self.resized or self.unused or self.notes)
        told = [f"{self.source}: licence {self.license}, also of all that is derived from it"] if self.license else []
        if plain and (self.layout == "random" or not self.missing):
            return told
        first, *others = self.summary()
        return [f"{self.source}: {first}", *others, *told]

    def __str__(self) -> str:
        rows = [("source", self.source), ("layout", self.layout), ("loaded", f"{len(self.loaded)} tensors")]
        if self.renamed:
            examples = [f"{theirs} -> {ours}" for theirs, ours in list(self.renamed.items())[:2]]
            rows.append(("renamed", f"{len(self.renamed)}, as in {'; '.join(examples)}"))
        rows += [("resized", text) for text in self.resized]
        for name, keys in (("missing", self.missing), ("unused", self.unused)):
            rows.append((name, f"{len(keys)}: {grouped(keys)}" if keys else "none"))
        rows += [("note", text) for text in self.notes]
        return "\n".join(f"{name:<8}  {text}" for name, text in rows)


def grouped(keys: Iterable[str], parts: int = 2) -> str:
    """Key names, those of many blocks as one: `decoder.blocks.*.norm1.weight (8)`; long lists are cut.

    parts: how many parts of their names are left where there are too many to be named.
    """
    groups: dict[str, int] = {}
    for key in keys:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
        groups[name] = groups.get(name, 0) + 1
    if len(groups) > _SHOWN:  # then by their beginnings
        shorter: dict[str, int] = {}
        for name, count in groups.items():
            start = ".".join(name.split(".")[:parts]) + (".*" if name.count(".") >= parts else "")
            shorter[start] = shorter.get(start, 0) + count
        groups = shorter
    named = [name if count == 1 else f"{name} ({count})" for name, count in groups.items()]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more
