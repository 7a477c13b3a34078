"""What a classifier says of every image: path, class, probability, and the likeliest classes, in a file.

    maekit predict runs/c10/finetune-cifar10 --data photos/ --out predictions.csv

One row for each image, in the order of the data: `part`, `path`, `class`, `probability`, then `top` (the likeliest
classes, best first) with their `probabilities`, `label` where the data have labels of the classifier's classes,
`trained_on` where the classifier was trained on some of the images (true for those), and `error` (why an image cannot
be read; it then has no class). In a .csv the likeliest classes are columns of their own; a .parquet file also says in
its metadata, under "maekit", whose words these are.
Cost: one forward pass for each image; memory does not grow with their number.

Shapes: B batch, C channels, H x W pixels, K classes, T likeliest ones.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.markup import escape
from torch.utils.data import DataLoader

from maekit.config import PredictConfig, UserError
from maekit.data.centres import Centres, collate_centres
from maekit.data.labelled import class_map
from maekit.data.levels import remarks_for
from maekit.data.parts import Part
from maekit.data.row_files import row_file
from maekit.data.sources import choose_parts, open_source
from maekit.data.workers import choose_workers, worker_options
from maekit.models.classifier import Classifier
from maekit.models.encoder import use_fused_attention
from maekit.runtime import choose_attention, choose_device, choose_precision, to_device
from maekit.terminal import counting, make_console, make_table, remark
from maekit.training.imbalance import TestClasses, balanced_accuracy
from maekit.training.interval import in_words
from maekit.training.trained_on import said_of, training_of
from maekit.weights.store import load_classifier

SHOWN = 15
"""Classes, at most, that the summary counts by name."""
NAMED = 5
"""Unreadable images that are named."""


@dataclass
class Summary:
    """What is counted while rows are written."""

    said: Counter[str] = field(default_factory=Counter)
    """Images by the class that was said."""
    labelled: dict[tuple[str, bool], Counter[tuple[int, int]]] = field(default_factory=lambda: defaultdict(Counter))
    """Images with a label, by the part that they are of and whether the classifier was trained on them, and then by
    what was said and what is true, as ids of the classifier's classes."""
    bad: list[str] = field(default_factory=list)
    """Images that cannot be read, with their reasons."""


def main(source: str, config: PredictConfig) -> int:
    """Write the classes of all images, and print how many are of each.

    Returns: 0, also where some images cannot be read.

    Raises:
        UserError: no classifier, data or flags that cannot be used, or none of the images can be read.
    """
    console = make_console()
    if problems := config.problems():
        raise UserError(*problems)
    device = choose_device(config.device).value
    precision = choose_precision(config.precision, device).value
    model = load_classifier(source, config, device)
    remark(console, model.key_report.remarks())
    use_fused_attention(model, choose_attention(device, precision).value)
    data = open_source(
        config.data, in_chans=model.config.in_chans, image_column=config.image_column, label_column=config.label_column
    )
    remark(console, remarks_for(data, model.passport.mean, model.passport.std))
    parts = choose_parts(data, config.part, config.data)
    mapping, why_not = label_ids(parts, model, config, source)
    top, summary = min(config.top, len(model.classes)), Summary()
    training = None if mapping is None else training_of(source, model.passport, data, config.data)
    used = {name: training.among(part) for name, part in parts.items()} if training is not None else {}
    facts = facts_of(source, config, model, used)
    schema, names = columns(top, mapping is not None, any(map(np.any, used.values())), facts)
    with row_file(Path(config.out), schema, console, names) as write:
        for name, part in parts.items():
            with counting(console, f"images of {name}") as progress:
                for rows in predictions(model, name, part, mapping, top, precision, config, summary, used.get(name)):
                    write.rows(rows)
                    progress(write.count, sum(len(one) for one in parts.values()))
        if not summary.said:
            raise UserError(f"--data {config.data}: none of the images can be read; the first: {summary.bad[0]}")
    common = summary.said.most_common(SHOWN)
    total = sum(summary.said.values())
    table = [[escape(name), f"{count:,}", f"{100 * count / total:.1f}"] for name, count in common]
    more = f", the {SHOWN} commonest of {len(summary.said)}" if len(summary.said) > SHOWN else ""
    console.print(make_table(f"{total:,} images by class{more}", ["class", "images", "%"], table))
    for line in summary.bad[:NAMED]:
        console.print(f"[yellow]unreadable:[/yellow] {escape(line)}", soft_wrap=True)
    if len(summary.bad) > NAMED:
        console.print(f"[yellow]{len(summary.bad)} in all are unreadable:[/yellow] the column `error` says why")
    for name, seen in ((name, seen) for name in parts for seen in (False, True) if (name, seen) in summary.labelled):
        said = f"accuracy by the data's own labels, {name}"
        answers = summary.labelled[name, seen]
        predicted_S, labels_S = np.repeat(np.array([*answers], np.int64), [*answers.values()], axis=0).T
        count, reached = len(labels_S), float((predicted_S == labels_S).mean())
        if seen:
            assert training is not None
            note = said_of(count, count, training.sure)
            console.print(f"{said}, {count:,} images: {100 * reached:.1f} %; [yellow]not a test:[/yellow] {note}")
        else:
            rest = ", the images that it was not trained on" if (name, True) in summary.labelled else ""
            console.print(f"{said}{rest}: {in_words(reached, count)}")
        classes = TestClasses.of(None, labels_S, model.classes)
        if classes.is_uneven:
            even = f"mean over the classes (balanced accuracy) {100 * balanced_accuracy(predicted_S, labels_S):.1f} %"
            console.print(f"{classes.largest_said('these')}; {even}", style="dim", markup=False, highlight=False)
    if why_not:
        console.print(f"accuracy: not measured, {escape(why_not)}", style="dim")
    console.print(f"predictions: {escape(config.out)} ({write.count:,} rows)", soft_wrap=True)
    return 0


def label_ids(
    parts: dict[str, Part], model: Classifier, config: PredictConfig, source: str
) -> tuple[np.ndarray[Any, Any] | None, str]:
    """The classifier's id of each class of the data; None, and why, where its classes are others or none."""
    part = next(iter(parts.values()))
    if part.labels is None or part.class_names is None:
        return None, ""
    try:
        return class_map(part.class_names, model.classes, config.data, source), ""
    except UserError as error:
        return None, error.problems[0]


def facts_of(
    source: str, config: PredictConfig, model: Classifier, used: dict[str, np.ndarray[Any, Any]]
) -> dict[str, Any]:
    """What a file of predictions says of itself."""
    return {
        "weights": source, "steps": model.passport.steps, "data": config.data,
        "trained_on": {name: f"{int(used_N.sum())} of {len(used_N)} images" for name, used_N in used.items()},
    }  # fmt: skip


def columns(top: int, labelled: bool, trained_on: bool, facts: dict[str, Any]) -> tuple[pa.Schema, list[str]]:
    """The columns of a file of predictions, and their names in a .csv: there the likeliest classes have their own."""
    words, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
    said = [("part", pa.string()), ("path", pa.string()), ("class", pa.string()), ("probability", pa.float32())]
    own = [("label", pa.string())] * labelled + [("trained_on", pa.bool_())] * trained_on + [("error", pa.string())]
    fields = [*said, ("top", words), ("probabilities", numbers), *own]
    likeliest = [word for place in range(1, top + 1) for word in (f"class_{place}", f"probability_{place}")]
    names = [*(name for name, _ in said), *likeliest, *(name for name, _ in own)]
    return pa.schema(fields, {"maekit": json.dumps(facts)}), names


@torch.no_grad()
def predictions(
    model: Classifier,
    name: str,
    part: Part,
    mapping: np.ndarray[Any, Any] | None,
    top: int,
    precision: str,
    config: PredictConfig,
    summary: Summary,
    used_N: np.ndarray[Any, Any] | None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a part, a batch at a time, counted in the summary."""
    device = model.mean.device
    starts = range(0, len(part), config.batch_size)
    loader: DataLoader[Any] = DataLoader(
        Centres(part, model.config.size_hw, model.passport.interpolation, model.passport.crop_pct),
        batch_sampler=[list(range(start, min(start + config.batch_size, len(part)))) for start in starts],
        collate_fn=collate_centres,
        **worker_options(choose_workers(config.workers, 1).value),
        pin_memory=device.type == "cuda",
    )
    names = part.class_names or []
    for start, (images, reasons) in zip(starts, loader, strict=True):
        shares_BT: list[list[float]] = [[]] * len(reasons)
        ids_BT: list[list[int]] = [[]] * len(reasons)
        if images is not None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                said = model.predict(model.normalize(to_device(images, device)))
            best = said.probabilities.topk(top, dim=1)
            shares_BT, ids_BT = best.values.tolist(), best.indices.tolist()
        rows: list[dict[str, Any]] = []
        for index, (shares, ids, reason) in enumerate(zip(shares_BT, ids_BT, reasons, strict=True), start):
            label = int(part.labels[index]) if part.labels is not None and mapping is not None else -1
            word, path = names[label] if label >= 0 else None, part.name(index)
            seen = used_N is not None and bool(used_N[index])
            row: dict[str, Any] = {
                "part": name,
                "path": path,
                "label": word,
                "trained_on": seen,
                "error": reason or None,
            }
            row |= {"class": None, "probability": None, "top": [], "probabilities": []}
            rows.append(row)
            if reason:
                summary.bad.append(f"{path}: {reason}")
                continue
            classes = [model.classes[k] for k in ids]
            summary.said[classes[0]] += 1
            if label >= 0 and mapping is not None:
                summary.labelled[name, seen][ids[0], int(mapping[label])] += 1
            row |= {"class": classes[0], "probability": shares[0], "top": classes, "probabilities": shares}
            for place, (said_class, share) in enumerate(zip(classes, shares, strict=True), 1):
                row |= {f"class_{place}": said_class, f"probability_{place}": share}
        yield rows
