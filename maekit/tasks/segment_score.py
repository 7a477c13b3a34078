"""Score the weights of a segmentation run again: with windows, mirrored images or scales, or on other data.

    maekit segment RUN --eval --flip-test --scales 0.75 1 1.25

Cost: one forward pass for each image and view. Choices belong on --part heldout; validation is for the report.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from maekit.config import UserError
from maekit.config.segmentation import PairsConfig, SegmentConfig, SegmentScoreConfig
from maekit.configfile import read
from maekit.data.loader import split_heldout
from maekit.environment import environment
from maekit.keeping import keeping
from maekit.models.encoder import use_fused_attention
from maekit.terminal import counting, make_console, print_settings
from maekit.training.saving import write_whole
from maekit.training.segmentation_inference import describe_view
from maekit.training.segmentation_job import confusion_over
from maekit.training.segmentation_metrics import score, score_table
from maekit.training.segmentation_prepare import MIN_HELDOUT, machine_for_pairs, open_data, view_of
from maekit.training.supervised import BEST_FILE
from maekit.weights.segmenters import load_segmenter
from maekit.weights.store import WEIGHTS_FILE


def main(source: str, config: SegmentScoreConfig) -> int:
    """Print the table of one part and write it as JSON.

    Raises:
        UserError: flags, a run or data that cannot be used.
    """
    console = make_console()
    if problems := config.problems():
        raise UserError(*problems)
    run_file = Path(source) / "config.json"
    if not run_file.is_file():
        raise UserError(f"{source}: holds no run (no config.json); --eval scores what maekit segment has trained")
    choices = machine_for_pairs(config)
    file = Path(source) / (BEST_FILE if config.score == "best" else WEIGHTS_FILE)
    model, passport = load_segmenter(file, choices["device"].value)
    run = read(SegmentConfig, run_file)  # after the weights, which say so where they are of another task
    use_fused_attention(model, choices["attention"].value)
    workers = choices["workers"].value
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(PairsConfig)}
    given = {name: value for name, value in fields.items() if value is not None}
    if "void" in given and "class_values" not in given:  # the run's values may hold this void
        given["class_values"] = None
    asked = dataclasses.replace(run, **given)
    pairs, _ = open_data(asked, passport, workers, console, config.data or run.data)
    of_run = pairs.train.fingerprint == passport.fingerprint
    if tuple(pairs.class_names) != passport.classes:
        raise UserError(
            f"--data {pairs.name}: has {len(pairs.class_names)} classes ({', '.join(pairs.class_names[:6])} ...), the "
            f"weights {len(passport.classes)} ({', '.join(passport.classes[:6])} ...): give --classes FILE of the same"
        )
    if config.part == "heldout":
        if not of_run:
            raise UserError("--part heldout: these are not the data of the run, which held out images of its own")
        what, part = "held-out", pairs.train
        ids = split_heldout(len(pairs.train), run.heldout_share, MIN_HELDOUT, pairs.train.images.groups)[1]
    elif pairs.val is not None:
        what, part, ids = "validation", pairs.val, np.arange(len(pairs.val))
    elif of_run:
        raise UserError("--part validation: the data have no validation part; take --part heldout")
    elif config.data in (None, run.data):
        raise UserError(
            f"--data {pairs.name}: has changed since the run was trained on it, and has no validation part: its "
            "training images cannot be told apart any more"
        )
    else:
        what, part, ids = "all", pairs.train, np.arange(len(pairs.train))
    view = view_of(config, passport.model.size_hw, run)
    with counting(console, f"scoring {what} images") as progress:
        matrix_KK, unreadable = confusion_over(model, part, ids, view, choices["precision"].value, workers, progress)
    result = score(matrix_KK)
    out = Path(config.out) if config.out else Path(source) / "score.json"
    card = {
        "data": pairs.name, "fingerprint": part.fingerprint, "part": what, "images": len(ids),
        "unreadable": unreadable, "weights": str(file), "steps": passport.steps,
        "view": dataclasses.asdict(view), "score": result.to_json(pairs.class_names), "confusion": matrix_KK.tolist(),
        "environment": environment(choices["device"].value),
    }  # fmt: skip
    with keeping(out, console):
        write_whole(out, json.dumps(card, indent=1) + "\n")
    title = f"{Path(source).name}: {len(ids) - unreadable:,} {what} images, {config.score} weights"
    console.print(score_table(result, pairs.class_names, title))
    print_settings(console, "done", {"seen": describe_view(view), "scores": str(out)})
    return 0
