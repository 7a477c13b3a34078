"""`maekit demo`: pretrain on bundled photographs, evaluate, draw; two minutes on two CPU cores, no network.

It runs the same tasks that the commands run, one after the other.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

from maekit import recipes
from maekit.config import DemoConfig, PretrainConfig, ProbeConfig, adapt_durations


def main(asked: DemoConfig) -> int:
    """Pretrain, probe, and say where the pictures are; returns the exit code."""
    out = fresh_folder(Path(asked.out))
    from maekit.tasks import pretrain, probe

    code = pretrain.main(pretraining(asked, out))
    if code:
        return code
    # The quick part of the evaluation card; `maekit probe RUN --data photos` makes the whole of it.
    probe.main([str(out)], ProbeConfig(data="photos", probes=(), flip="no"))
    panel = max((out / "panels").iterdir())
    print(f"\nreconstruction panel: {panel}\nthe run's folder:     {out}")
    command = "maekit" if shutil.which("maekit") else f"{sys.executable} -m maekit"
    print(f"your own images next: {command} pretrain folder --data DIR --out runs/mine")
    return 0


def pretraining(asked: DemoConfig, out: Path) -> PretrainConfig:
    """The recipe at the length that is asked for; as for every shorter run, the warm-up keeps its share."""
    recipe = recipes.get("photos")
    config = dataclasses.replace(recipe, out=str(out))
    if asked.epochs is not None:
        config.epochs = asked.epochs
        adapt_durations(config, recipe)
    return config


def fresh_folder(wanted: Path) -> Path:
    """The wanted folder, or, where a run lies in it, the first of NAME-2, NAME-3 ... that is free."""
    folder, number = wanted, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
