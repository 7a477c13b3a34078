"""Going on with a run: what may change, and whether a command that is given again asks for the run that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from maekit.config.base import UserError, flag

Run = TypeVar("Run")
MACHINE = {"log_every", "device", "workers", "trackers", "processes", "max_bad_share"}
"""Where and how a run goes on: what may differ between a command and the same one given again."""
SPELLED = {"data", "or_resume", "out"}
"""Fields that are not compared: paths may be spelled anew, and data is known by its fingerprint."""


@dataclass(kw_only=True)
class ResumeConfig:
    """Continue a run exactly where its last checkpoint stands. What is not given here stays as it was.

    --data, --log-every, --device, --workers, --trackers, --processes and --max-bad-share say where and how the same run
    goes on. Durations, --accum, --grad-checkpoint, --precision and --clip-grad change the numbers from here on.
    """

    epochs: float | None = None
    """New length in epochs; a longer one restarts the cosine from the current step. Not for segmentation, whose length
    is fixed."""
    steps: int | None = None
    """New length in optimiser steps."""
    data: str | None = None
    """Where the same images are now. Other images (names or sizes) are refused."""
    log_every: int | None = None
    """Optimiser steps between two lines of metrics.jsonl."""
    device: str | None = None
    """auto, cpu, cuda or mps."""
    workers: int | None = None
    """Processes that decode images."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] | None = None
    """Also log there, through Accelerate."""
    processes: int | None = None
    """The number of processes that you mean to run on; another number is an error."""
    max_bad_share: float | None = None
    """The run stops when more than this share of the images cannot be read. Ten are allowed in any case, up to a
    quarter of the images; 0: not one."""
    accum: int | None = None
    """Gradient accumulation, for a card with less memory or for fewer processes: the batch stays, numbers differ by
    rounding."""
    grad_checkpoint: bool | None = None
    """Compute the encoder's blocks again in the backward pass, for less memory; numbers differ by rounding at most."""
    precision: Literal["fp32", "bf16"] | None = None
    """Arithmetic of the matrix products: fp32 for a run that stopped at numbers that are not finite."""
    clip_grad: float | None = None
    """Clip the gradient to this norm: for a run that stopped at numbers that are not finite."""


def changed(config: Run, changes: ResumeConfig, out: str) -> Run:
    """A run's config (its class has all fields of the changes that are given) with what changes, in the folder `out`.

    Raises:
        UserError: two lengths.
    """
    given = {key: value for key, value in dataclasses.asdict(changes).items() if value is not None}
    if "epochs" in given and "steps" in given:
        raise UserError("give the length of the run either as --epochs or as --steps")
    if "epochs" in given or "steps" in given:
        given = {"epochs": None, "steps": None} | given
    return dataclasses.replace(config, out=out, **given)  # type: ignore[type-var]


def asked_again(asked: Any, held: Any, typed: Collection[str], out: str) -> ResumeConfig:
    """What `maekit resume` is told where a command is given again (--or-resume) that began the run in `out`.

    asked, held: the config that the command makes now, and the one in the run's folder. typed: the command's flags.
    Only those, and the source of weights, are compared: what was not said may have been chosen by the machine.

    Raises:
        UserError: the run in the folder has other settings; all that differ.
    """
    fields = {item.name for item in dataclasses.fields(asked)}
    said = {word.lstrip("-").replace("-", "_") for word in typed} | {"source"}
    names = fields & (said | {name.removeprefix("no_") for name in said})  # --no-flip speaks of flip
    problems = [
        f"--or-resume: the run in {out} has {getattr(held, name)!r} for {flag(name)}, not {getattr(asked, name)!r}; "
        "a new run needs another --out"
        for name in sorted(names - MACHINE - SPELLED)
        if getattr(asked, name) not in ("auto", None, getattr(held, name))
    ]
    if problems:
        raise UserError(*problems)
    return ResumeConfig(data=asked.data, **{name: getattr(asked, name) for name in sorted(names & MACHINE)})
