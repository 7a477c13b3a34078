"""How good are frozen features? Linear probe and k-NN, beside random weights and raw pixels.

    maekit probe runs/c10 --data cifar10

Features are extracted once from centre crops. Pooling and weight decay are chosen on a held-out tenth of the training
split; the test split is scored once, at the end.
Cost: one forward pass over the data for each encoder, plus seconds for the classifiers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from maekit.config import PretrainConfig, ProbeConfig, UserError
from maekit.data.loader import Pool, lowest_hash, open_pool
from maekit.data.parts import Part
from maekit.data.sources import Source, open_source
from maekit.data.workers import choose_workers
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.rng import Purpose
from maekit.runtime import choose_attention, choose_device, choose_precision, environment
from maekit.terminal import counting, make_console, make_table
from maekit.training.monitor import extract_features
from maekit.training.probes import best_linear, fit_linear, knn_accuracy
from maekit.weights.store import load_as, random_model

HELDOUT_SHARE = 0.1
"""Share of the training split on which pooling and weight decay are chosen."""
NAMED = 5
"""Unreadable images that are named."""
TEST_SHARE = 0.2
"""Share of the images that become the test split where the data have none."""


@dataclass(frozen=True)
class Split:
    """Labelled images of one split: where they are, which of them, their class ids on the device."""

    part: Part
    pool: Pool
    ids: npt.NDArray[np.int64]
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """What one source of features reached on the test split."""

    source: str
    pooling: str
    width: int
    linear: float
    knn: float
    heldout_linear: float
    decay: float


def main(sources: list[str], config: ProbeConfig) -> int:
    """Measure every source of weights on labelled data, print one table and write card.json.

    Raises:
        UserError: weights or data that cannot be used, or data without labels.
    """
    console = make_console()
    device = choose_device(config.device).value
    precision = choose_precision(config.precision, device).value
    models = [(name, load_as(name, config, device)) for name in sources]
    for _, model in models:
        for line in model.key_report.remarks():
            console.print(line, style="dim", markup=False)
    check_out(config)

    scores: list[Score] = []
    for name, model in models:
        with counting(console, "reading images") as progress:
            data, train, test = open_splits(config, model, device, progress)
        candidates = [(name, model)]
        if config.baselines:
            floor = random_model(model.config, model.passport.mean, model.passport.std, seed=config.seed).to(device)
            candidates.append((f"{name}, random weights", floor))
        for label, encoder in candidates:
            use_fused_attention(encoder, choose_attention(device, precision).value)
            features, splits = [], []
            for split, what in ((train, "training"), (test, "test")):
                with (
                    counting(console, f"{label}: features of {what} images") as progress,
                    torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
                ):
                    kinds = poolings(config, encoder)
                    found = extract_features(encoder, split.pool, split.ids, config.batch_size, kinds, progress)
                    features.append(readable(split, found))
                    splits.append(without_unreadable(split))
            scores.append(measure(label, features[0], splits[0], features[1], splits[1]))
        if config.baselines and name == sources[-1]:
            pixels = [readable(split, {"-": raw_pixels(split, config.batch_size)}) for split in (train, test)]
            scores.append(measure("raw pixels", pixels[0], splits[0], pixels[1], splits[1]))

    left_out = say_left_out(console, (train, test))
    train, test = splits
    count = len(test.ids)
    rows = [
        [s.source, s.pooling, str(s.width), with_interval(s.linear, count), with_interval(s.knn, count)] for s in scores
    ]
    classes = len(torch.unique(train.labels))
    title = f"{data.name}: {classes} classes, {len(train.ids):,} training and {count:,} test images"
    console.print(make_table(title, ["features", "pooling", "width", "linear probe %", "k-NN %"], rows))
    console.print("[dim]test accuracy, +- 95 % interval; pooling and decay chosen on held-out training images[/dim]")
    folder = card_folder(config, sources[0], data.name)
    write_card(folder, sources, config, data, train, test, scores, left_out, device)
    console.print(f"card: {folder / 'card.json'}")
    return 0


def open_splits(
    config: ProbeConfig, model: MaskedAutoencoder, device: torch.device, progress: Callable[[int, int], None]
) -> tuple[Source, Split, Split]:
    """The labelled images at the model's size: training split, and test split (or validation, or a fixed fifth)."""
    data = open_source(
        config.data,
        in_chans=model.config.in_chans,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    reading = PretrainConfig(data=config.data, img_size=model.config.size_hw, in_chans=model.config.in_chans)

    def open_split(part: Part, ids: npt.NDArray[np.int64]) -> Split:
        if part.labels is None:
            raise UserError(
                f"--data {config.data}: has no labels, and a probe needs them: one folder per class, or a Parquet "
                "label column (--label-column)"
            )
        ids = ids[part.labels[ids] >= 0]
        pool, _ = open_pool(part, reading, device, choose_workers(None, 1), progress)
        return Split(part, pool, ids, torch.from_numpy(part.labels[ids]).to(device))

    test_part = data.test or data.val
    train_ids = np.arange(len(data.train), dtype=np.int64)
    if test_part is not None:
        test = open_split(test_part, np.arange(len(test_part), dtype=np.int64))
    else:
        test_ids = lowest_hash(train_ids, max(1, round(TEST_SHARE * len(train_ids))), Purpose.TEST_SPLIT)
        train_ids = np.setdiff1d(train_ids, test_ids)
        test = open_split(data.train, test_ids)
    return data, open_split(data.train, train_ids), test


def is_readable(split: Split) -> npt.NDArray[np.bool_]:
    """[S] False where another image stood in for an unreadable one, whose label is not its own."""
    readable_S: npt.NDArray[np.bool_] = ~np.isin(split.ids, list(split.pool.unreadable))
    return readable_S


def readable(split: Split, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of readable images; to be asked after they were extracted, when it is known which they are."""
    kept = torch.from_numpy(is_readable(split))
    return {kind: rows[kept.to(rows.device)] for kind, rows in features.items()}


def without_unreadable(split: Split) -> Split:
    """The split without its unreadable images."""
    kept = is_readable(split)
    return Split(split.part, split.pool, split.ids[kept], split.labels[torch.from_numpy(kept).to(split.labels.device)])


def say_left_out(console: Console, splits: Iterable[Split]) -> int:
    """Name a few of the images that could not be read; returns how many there are."""
    lines = [
        f"{split.part.name(index)}: {reason}"
        for split in splits
        for index, reason in sorted(split.pool.unreadable.items())
        if index in set(split.ids.tolist())
    ]
    for line in lines[:NAMED]:
        console.print(f"[yellow]unreadable, left out:[/yellow] {escape(line)}", soft_wrap=True)
    if len(lines) > NAMED:
        console.print(f"[yellow]{len(lines)} in all are left out:[/yellow] maekit check-data names them")
    return len(lines)


def poolings(config: ProbeConfig, model: MaskedAutoencoder) -> tuple[Literal["cls", "mean"], ...]:
    """Which poolings to try: the one asked for, else all that the encoder has."""
    has_class = bool(model.encoder.has_class_token)
    if config.pool == "cls" and not has_class:
        raise UserError("--pool cls: this encoder has no class token; take --pool mean")
    if config.pool is not None:
        return (config.pool,)
    return ("mean", "cls") if has_class else ("mean",)


def raw_pixels(split: Split, batch_size: int) -> Tensor:
    """The pixels themselves as features [S, C*H*W]: what an encoder must beat."""
    rows = []
    for batch in split.pool.eval_batches(split.ids, batch_size):
        pixels = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
        rows.append(pixels.flatten(1))
    return torch.cat(rows)


def measure(
    label: str, train_features: dict[str, Tensor], train: Split, test_features: dict[str, Tensor], test: Split
) -> Score:
    """Choose pooling and decay on a held-out tenth of the training images, refit on all, score the test split once."""
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    places = np.arange(len(train.ids), dtype=np.int64)
    held = lowest_hash(places, max(1, round(HELDOUT_SHARE * len(places))), Purpose.HELDOUT_SPLIT)
    kept = torch.from_numpy(np.setdiff1d(places, held)).to(train.labels.device)
    held_ids = torch.from_numpy(held).to(train.labels.device)
    chosen: dict[str, tuple[float, float, float]] = {}
    for kind, features in train_features.items():
        fit, check = features[kept], features[held_ids]
        fit_labels, check_labels = train.labels[kept], train.labels[held_ids]
        probe, accuracy = best_linear(fit, fit_labels, check, check_labels, classes)
        chosen[kind] = (accuracy, probe.decay, knn_accuracy(fit, fit_labels, check, check_labels))
    linear_kind = max(chosen, key=lambda kind: chosen[kind][0])
    knn_kind = max(chosen, key=lambda kind: chosen[kind][2])
    accuracy, decay, _ = chosen[linear_kind]
    final = fit_linear(train_features[linear_kind], train.labels, classes, decay)
    return Score(
        source=label,
        pooling=linear_kind if linear_kind == knn_kind else f"{linear_kind}; k-NN {knn_kind}",
        width=train_features[linear_kind].shape[1],
        linear=final.accuracy(test_features[linear_kind], test.labels),
        knn=knn_accuracy(train_features[knn_kind], train.labels, test_features[knn_kind], test.labels),
        heldout_linear=accuracy,
        decay=decay,
    )


def with_interval(share: float, count: int) -> str:
    """A share in percent with half the width of its 95 % interval (normal approximation of the binomial)."""
    return f"{100 * share:.1f} +- {196 * math.sqrt(max(share * (1 - share), 1e-12) / count):.1f}"


def check_out(config: ProbeConfig) -> None:
    """Refuse an --out that is a file, before anything is computed."""
    if config.out is not None and Path(config.out).exists() and not Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a file; name a folder for card.json")


def card_folder(config: ProbeConfig, source: str, data_name: str) -> Path:
    """--out, else probe-NAME in the run's folder, else probe-NAME here."""
    if config.out is not None:
        return Path(config.out)
    base = Path(source) if Path(source).is_dir() else Path()
    return base / f"probe-{data_name}"


def write_card(
    folder: Path,
    sources: list[str],
    config: ProbeConfig,
    data: Source,
    train: Split,
    test: Split,
    scores: list[Score],
    left_out: int,
    device: torch.device,
) -> None:
    """card.json with every number of the table, and config.json with what was asked for."""
    card = {
        "data": data.name,
        "fingerprint": data.train.fingerprint,
        "training_images": len(train.ids),
        "test_images": len(test.ids),
        "unreadable": left_out,
        "most_frequent_class": float(torch.bincount(test.labels).max()) / len(test.labels),
        "scores": [dataclasses.asdict(score) for score in scores],
        "environment": environment(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    asked = {"sources": sources} | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(asked, indent=2) + "\n")
