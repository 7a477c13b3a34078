"""What every config shares: errors that help, and how flags and values are spelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class UserError(ValueError):
    """A problem that the user can mend: the command line prints it without a traceback and exits with code 2.

    Each problem is one line that a terminal can show, whatever names from files and tables it repeats.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(printable(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def printable(text: str) -> str:
    """The text with every character that would move a terminal's cursor, or that none can show, as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(name: str, known: Iterable[str], limit: int = 4) -> str:
    """The known names nearest to a mistyped one, as an ending for an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(sorted(known)[:20])}"


def flag(field_name: str) -> str:
    """The command line's spelling of a field: `mask_ratio` is `mask-ratio`."""
    return field_name.replace("_", "-")


def typed_flags(words: Iterable[str]) -> set[str]:
    """The flags among the words of a command, as help texts spell them: --NAME, without values."""
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def spaced(values: Sequence[float]) -> str:
    """Numbers as they are typed after a flag."""
    return " ".join(f"{value:g}" for value in values)


class Durations(Protocol):
    """A config whose length and warm-up are given in one of two units each."""

    epochs: float | None
    steps: int | None
    warmup_epochs: float | None
    warmup_steps: int | None


def adapt_durations(config: Durations, base: Durations, words: Sequence[str] = ()) -> None:
    """What a flag for one duration means for the recipe's others; `words` are the flags as they were typed.

    A length in steps replaces the recipe's length in epochs. A shorter run keeps the share of its warm-up, unless a
    warm-up is given too.
    """
    if config.steps is not None and config.epochs == base.epochs:
        config.epochs = None
    if config.warmup_steps is not None and config.warmup_epochs == base.warmup_epochs:
        config.warmup_epochs = None
    if "--warmup-epochs" in typed_flags(words) or not base.epochs or not base.warmup_epochs:
        return
    if config.warmup_epochs != base.warmup_epochs:
        return
    share = base.warmup_epochs / base.epochs
    if config.epochs is None and config.steps is not None:
        config.warmup_epochs, config.warmup_steps = None, int(share * config.steps)
    elif config.epochs is not None and 0 < config.epochs < base.epochs:
        config.warmup_epochs = share * config.epochs


class Adapting(Durations, Protocol):
    """A config that also has values which may follow the number of training images."""

    follow_images: tuple[Any, ...]


def adapt(config: Adapting, base: Adapting, words: Sequence[str]) -> None:
    """What the flags that were typed, `words`, mean for the values that were not: durations, and batch and rate.

    A batch that is typed stays, and so does the recipe's rate with it; a rate that is typed stays at every batch.
    """
    adapt_durations(config, base, words)
    typed = typed_flags(words)
    if "--batch-size" in typed:
        config.follow_images = ()
    elif typed & {"--lr", "--blr"}:
        config.follow_images = tuple(name for name in config.follow_images if name != "lr")


def compile_problems(compile: str, accum: int) -> list[str]:
    """Why a way to compile cannot go with accumulation."""
    if compile == "graphs" and accum > 1:
        return ["--compile graphs: a graph is a whole step, and --accum makes steps of several parts: --compile whole"]
    return []


def duration_problems(config: Durations) -> list[str]:
    """What is wrong with a length and a warm-up: two units or none, or a warm-up longer than the run."""
    found = []
    if (config.epochs is None) == (config.steps is None):
        found.append("give the length of the run either as --epochs or as --steps")
    if config.warmup_epochs is not None and config.warmup_steps is not None:
        found.append("give the warm-up either as --warmup-epochs or as --warmup-steps")
    for unit in ("epochs", "steps"):
        whole, warmup = getattr(config, unit), getattr(config, f"warmup_{unit}")
        if whole is not None and warmup is not None and warmup > whole > 0:
            found.append(f"--warmup-{unit} {warmup:g} is longer than the run (--{unit} {whole:g})")
    return found
