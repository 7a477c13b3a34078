"""How good are frozen features? The evaluation card: several probes, beside random weights and raw pixels.

    maekit probe runs/c10 --data cifar10

Features are taken once from centre crops, after every block: of training images, where it is cheap or asked for, from
mirrored crops too. Blocks, poolings and all settings are chosen on a held-out tenth of the training split; L-BFGS, LARS
and k-NN are then fitted on all of it, and the test split is scored once, at the end of each encoder.
Cost: a forward pass over the data for each encoder (and one more over the training images for mirrored crops), and
for CIFAR-10 about a minute of one core for the classifiers of each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from maekit.config import ProbeConfig, UserError
from maekit.data.levels import remarks_for
from maekit.data.loader import choose_training, split_heldout
from maekit.data.sources import Source, open_configured
from maekit.data.splits import Split, open_splits
from maekit.environment import environment
from maekit.keeping import keeping
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import choose_attention, choose_device, choose_precision
from maekit.terminal import counting, make_console, remark
from maekit.training import evaluation, keras_probe
from maekit.training.anew import choose_paper, fitting_pool, train_supervised
from maekit.training.attentive import choose_attentive, tokens_bytes, tokens_of
from maekit.training.capacity import RAM_SHARE, free_bytes
from maekit.training.card import (
    CARD,
    CONFIG,
    FEW,
    Card,
    Row,
    card_folder,
    classes_of,
    heldout_count,
    say_left_out,
    say_what_is_doubtful,
    seconds_of,
    show_card,
)
from maekit.training.evaluation import Chosen, TestImages, TrainSet
from maekit.training.features import (
    PIXEL_SIDE,
    WORKING_COPIES,
    BlockFeatures,
    Plan,
    extract_blocks,
    of_pixels,
    plan_features,
    raw_pixels,
)
from maekit.training.few_labels import label_shares
from maekit.training.imbalance import balanced_accuracy
from maekit.training.probe_choices import (
    blocks_of,
    encoder_kind,
    kinds_of,
    reading_config,
    shape_of,
    untrained,
    wanted,
    wants_mirrored,
)
from maekit.viz.card import Curves, draw_card
from maekit.weights.store import load_each, random_model

ATTENTIVE_BYTES = 2**28
"""The attentive probe reads every token; it is run by default where they take no more."""


@dataclass(frozen=True)
class Job:
    """What all steps need: the asked-for settings, the machine, and a context for the encoder's arithmetic."""

    config: ProbeConfig
    console: Console
    device: torch.device
    arithmetic: Callable[[], AbstractContextManager[Any]]


def main(sources: list[str], config: ProbeConfig) -> int:
    """Measure every source of weights on labelled data; print a table, write card.json and card.png.

    Raises:
        UserError: settings, weights or data that cannot be used, or data without labels.
    """
    started = time.perf_counter()
    if problems := config.problems():
        raise UserError(*problems)
    console = make_console()
    device = choose_device(config.device).value
    precision = choose_precision(config.precision, device).value
    job = Job(config, console, device, partial(encoders_arithmetic, device, precision))
    models = load_each(sources, config, device)
    for name, model in models:
        remark(console, model.key_report.remarks())
        kinds_of(config, model)
        blocks_of(config, name, model)

    card = Card(Path(), {"sources": sources} | dataclasses.asdict(config))
    read: dict[int, Source] = {}
    opened: dict[tuple[Any, ...], tuple[Split, Split]] = {}
    floors: list[tuple[Any, ...]] = []
    for name, model in models:
        # ---- the images at this model's size, read once for all sources that share it ----
        reading = reading_config(config, model.passport)
        shape = shape_of(reading)
        channels = model.config.in_chans
        if channels not in read:
            read[channels] = open_configured(config, channels)
            remark(console, remarks_for(read[channels], model.passport.mean, model.passport.std))
        data = read[channels]
        if shape not in opened:
            with counting(console, "reading images") as progress:
                opened[shape] = open_splits(data, reading, device, progress)
        train, test = opened[shape]
        evaluation.check_labels(train.labels, config.few_labels)
        if not card.rows:
            classes_of(train, test).warn(console)
        say_what_is_doubtful(console, name, model.passport, data, train)
        card.open(card_folder(config, sources, data.name))

        # ---- this encoder, then the same one with random weights, and trained with labels ----
        candidates = [(name, model)]
        kind = encoder_kind(model)
        if config.baselines and kind not in floors and model.passport.recipe != "random":
            floor = random_model(untrained(model), model.passport.mean, model.passport.std, seed=config.seed).to(device)
            candidates.append((f"{name}, random weights", floor))
        floors.append(kind)
        if config.scratch and name == sources[0]:
            fresh = random_model(untrained(model), model.passport.mean, model.passport.std, seed=config.seed).to(device)
            candidates.append((f"{name}, trained with labels", fresh))
        attentive = wants_attentive(job, model, len(train.ids) + len(test.ids))
        for label, encoder in candidates:
            use_fused_attention(encoder, choose_attention(device, precision).value)
            if label == f"{name}, trained with labels":
                # What is held out must stay unseen here too, or it could not choose between settings.
                with counting(console, label) as progress, job.arithmetic():
                    epochs, pool = config.scratch_epochs, fitting_pool(train)
                    train_supervised(encoder, pool, epochs, seed=config.seed, on_progress=progress)
            row, train, test = measure_encoder(job, label, encoder, train, test, attentive)
            if config.protocol == "keras":
                add_keras(job, row, encoder, data)
            console.print(seconds_of(row), style="dim", markup=False)
            card.add(row, len(test.ids))
        opened[shape] = train, test

    # ---- raw pixels at the first model's size, the floor under all of them ----
    first = models[0][1].config
    train, test = opened[shape_of(reading_config(config, models[0][1].passport))]
    if config.baselines and pixels_fit(job, train, first.size_hw):
        card.add(measure_pixels(job, train, test), len(test.ids))
        console.print(seconds_of(card.rows[-1]), style="dim", markup=False)

    # ---- what came out ----
    left_out: dict[tuple[str, int], str] = {}
    for splits in opened.values():
        for split in splits:
            left_out |= split.unreadable()
    say_left_out(console, list(left_out.values()))
    rows = card.rows
    count, told = len(test.ids), classes_of(train, test)
    classes = len(torch.unique(train.labels))
    title = f"{data.name}: {classes} classes, {len(train.ids):,} training and {count:,} test images ({test.what})"
    show_card(console, title, rows, count, told)
    facts = {
        "data": data.name,
        "fingerprint": data.train.fingerprint,
        "training_images": len(train.ids),
        "test_images": count,
        "test": test.what,
        "heldout_images": heldout_count(train),
        "unreadable": len(left_out),
        "classes": classes,
        **told.facts(),
        "protocol": config.protocol,
        "interval": "Wilson's score interval at 95 %, of the test sample",
        "search": f"blocks and poolings in closed form on up to {evaluation.SEARCH_IMAGES:,} images, for k-NN by votes "
        f"for up to {evaluation.KNN_QUERIES:,} held-out ones; then on all",
        "environment": environment(device),
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder = card.folder
    curves = [Curves(row.source, row.search, floor=row.source.endswith(", random weights")) for row in rows]
    searched = f"searched on up to {evaluation.SEARCH_IMAGES:,} training images, held out: {facts['heldout_images']:,}"
    with keeping(folder / CARD, console, CONFIG, "card.png"):
        card.finish(facts, count)
        draw_card(curves, folder / "card.png", title=f"{data.name}: accuracy after each block", note=searched)
    console.print(f"card: {folder / 'card.json'}, {folder / 'card.png'}")
    return 0


def encoders_arithmetic(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 for an encoder, or float32. Without autocast's cache of weights: inside of it, --scratch trains them."""
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16", cache_enabled=False)


def measure_encoder(
    job: Job, label: str, model: MaskedAutoencoder, train: Split, test: Split, attentive: bool
) -> tuple[Row, Split, Split]:
    """Features after every block, all choices, then the test split; and the splits without unreadable images."""
    config, seconds = job.config, {}
    begun = time.perf_counter()
    features, train, told = training_features(job, label, model, train)
    seconds["training features"] = time.perf_counter() - begun
    asked = blocks_of(config, label, model)
    divided = evaluation.divide(features, train.labels, train.ids, train.part.groups)
    searched = [block for block in features.blocks if asked is None or block in asked] or features.blocks
    search, views, probes = choose(job, label, divided, searched, seconds)
    begun = time.perf_counter()
    if attentive:
        with counting(job.console, f"{label}: attentive probe") as progress, job.arithmetic():
            chosen = choose_attentive(
                model, train.pool, train.ids, divided, epochs=config.attentive_epochs, batch_size=config.batch_size,
                free=free_bytes(job.device), seed=config.seed, on_progress=progress,
            )  # fmt: skip
            probes["attentive"] = [chosen]
        seconds["attentive"] = time.perf_counter() - begun
    begun = time.perf_counter()
    if config.protocol == "paper":
        with counting(job.console, f"{label}: the paper's probe, images anew") as progress, job.arithmetic():
            pool, epochs = fitting_pool(train), config.lars_epochs
            paper = choose_paper(
                model, pool, divided, config.batch_size, epochs=epochs, seed=config.seed, on_progress=progress
            )
            probes["paper"] = [paper]
        seconds["paper"] = time.perf_counter() - begun

    # Everything is chosen and fitted. Only now is the test split looked at.
    begun = time.perf_counter()
    used = tuple(sorted({one.setting["block"] for chosen in probes.values() for one in chosen}))
    used_plan = Plan(used, features.kinds, torch.float32, "")
    with counting(job.console, f"{label}: test images") as progress, job.arithmetic():
        found = extract_blocks(model, test.pool, test.ids, config.batch_size, used_plan, on_progress=progress)
    found, test = found.kept(test.readable_S), test.kept(test.readable_S)
    if not len(test.ids):
        raise UserError(f"--data {config.data}: none of its labelled {test.what} images can be read")
    ids = test.ids

    def tokens() -> Iterator[torch.Tensor]:
        with torch.no_grad(), job.arithmetic():
            yield from (tokens_BND for tokens_BND, _ in tokens_of(model, test.pool, ids, config.batch_size))

    reached, balanced = score_test(probes, TestImages(found, tokens), test)
    seconds["test"] = time.perf_counter() - begun
    width = int(model.encoder.embed_dim)
    return Row(label, width, told, search, views, probes, reached, seconds, balanced), train, test


def training_features(job: Job, label: str, model: MaskedAutoencoder, train: Split) -> tuple[BlockFeatures, Split, str]:
    """Features of the training images after every block that is kept, the split without unreadable ones, and both in
    words.

    Raises:
        UserError: they do not fit into memory, are no numbers, or are of readable images of one class only.
    """
    config, depth = job.config, len(model.encoder.blocks)
    mirrored = wants_mirrored(config, model, len(train.ids), job.device)
    asked = blocks_of(config, label, model)
    blocks = (*asked, depth) if asked is not None and config.protocol == "paper" else asked
    images, classes = len(train.ids) * (1 + mirrored), int(train.labels.max()) + 1
    width, kinds = int(model.encoder.embed_dim), kinds_of(config, model)
    plan = plan_features(images, width, depth, kinds, blocks, free_bytes(job.device), classes)
    with counting(job.console, f"{label}: training images") as progress, job.arithmetic():
        features = extract_blocks(model, train.pool, train.ids, config.batch_size, plan, mirrored, progress)
    features, train = features.kept(train.readable_S), train.kept(train.readable_S)
    evaluation.check_labels(train.labels, config.few_labels)
    if broken := [block for block in features.blocks if not features.is_finite(block)]:
        raise UserError(f"{label}: features after block {broken[0]} are not finite: the weights are broken")
    told = f"{plan.reason}; {'plain and mirrored' if mirrored else 'plain'} crops"
    if model.passport.crop_pct < 1:
        told += f" of {model.passport.crop_pct:g} of the shorter side"
    job.console.print(f"{label}: {told}", style="dim", markup=False)
    return features, train, told


def add_keras(job: Job, row: Row, model: MaskedAutoencoder, data: Source) -> None:
    """Measure by the Keras tutorial's own probe too, which chooses nothing; it reads the images in its own way."""
    begun = time.perf_counter()
    reading = keras_probe.reading(model.config, job.config.data, job.config.seed)
    with counting(job.console, f"{row.source}: the tutorial's probe") as progress, job.arithmetic():
        fitting, scoring = open_splits(data, reading, job.device, progress)
        free_ids, _ = split_heldout(len(fitting.part), reading.heldout_share, groups_N=fitting.part.groups)
        if len(free_ids) > keras_probe.TRAIN_IMAGES:  # those that its recipes pretrain on
            own_ids = choose_training(free_ids, keras_probe.TRAIN_IMAGES)
            fitting = fitting.kept(np.isin(fitting.ids, own_ids))
        train, test = (keras_probe.Labelled(split.pool, split.ids, split.labels) for split in (fitting, scoring))
        classes = int(max(train.labels.max(), test.labels.max())) + 1
        found = keras_probe.keras_probe(
            model, train, test, num_classes=classes, seed=job.config.seed, epochs=keras_probe.EPOCHS,
            on_progress=progress,
        )  # fmt: skip
    row.test["keras"] = [found.test]
    row.keras.update({"test": found.test, "train": found.train})
    row.seconds["keras"] = time.perf_counter() - begun


def choose(
    job: Job, label: str, train: TrainSet, blocks: Sequence[int], seconds: dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[Chosen]]]:
    """Where the best features are, by held-out accuracy, and each probe's setting there; k-NN has its own place."""
    clock = time.perf_counter
    begun = clock()
    with counting(job.console, f"{label}: blocks and poolings") as progress:
        search = evaluation.search_blocks(train, blocks, progress)
    # Of equals the last block: few held-out images make many, and the first blocks are no better for being first.
    best, nearest = (max(search, key=lambda found, by=by: (found[by], found["block"])) for by in ("linear", "knn"))  # type: ignore[misc]
    place = best["block"], best["pooling"]
    views, tried = evaluation.choose_views(train, *place)
    seconds["search"] = clock() - begun
    probes: dict[str, list[Chosen]] = {}
    begun = clock()
    with counting(job.console, f"{label}: linear probe (L-BFGS)") as progress:
        probes["linear"] = [evaluation.choose_linear(train, *place, views, progress)]
    seconds["linear"], begun = clock() - begun, clock()
    if "lars" in wanted(job.config) and place[0]:  # thousands of raw pixels would take it minutes
        with counting(job.console, f"{label}: linear probe (LARS)") as progress:
            epochs, seed = job.config.lars_epochs, job.config.seed
            probes["lars"] = [evaluation.choose_lars(train, *place, views, epochs, seed, progress)]
        seconds["lars"], begun = clock() - begun, clock()
    probes["knn"] = [evaluation.choose_knn(train, nearest["block"], nearest["pooling"])]
    seconds["knn"], begun = clock() - begun, clock()
    shares = label_shares(train.labels_S, job.config.few_labels)
    for share in shares if "few-labels" in wanted(job.config) else ():
        probes[f"{100 * share:g} {FEW}"] = evaluation.choose_few(train, *place, views, share)
    seconds["few labels"] = clock() - begun
    return search, tried, probes


def measure_pixels(job: Job, train: Split, test: Split) -> Row:
    """The pixels themselves as features: what an encoder must beat."""
    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    rows_SD = raw_pixels(train.pool, train.ids, job.config.batch_size)
    seconds["training pixels"] = time.perf_counter() - begun
    divided = evaluation.divide(of_pixels(rows_SD), train.labels, train.ids, train.part.groups)
    search, views, probes = choose(job, "raw pixels", divided, divided.features.blocks, seconds)
    begun = time.perf_counter()
    found = TestImages(of_pixels(raw_pixels(test.pool, test.ids, job.config.batch_size)), tuple)
    reached, balanced = score_test(probes, found, test)
    seconds["test"] = time.perf_counter() - begun
    told = f"pixels at up to {PIXEL_SIDE} x {PIXEL_SIDE}"
    return Row("raw pixels", rows_SD.shape[1], told, search, views, probes, reached, seconds, balanced)


def pixels_fit(job: Job, train: Split, size_hw: tuple[int, int]) -> bool:
    """Whether raw pixels can be probed in the memory that is free; says so where they cannot."""
    height, width = (min(side, PIXEL_SIDE) for side in size_hw)
    size = 4 * len(train.ids) * height * width * train.part.in_chans * WORKING_COPIES
    fits = size <= RAM_SHARE * free_bytes(job.device)
    if not fits:
        job.console.print(f"no raw pixels: probing them takes {size / 2**30:.0f} GiB, which are not free", style="dim")
    return fits


def score_test(
    probes: dict[str, list[Chosen]], images: TestImages, test: Split
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Accuracy of every fitted probe on the test split, of all images and as the mean over the classes: the one place
    where test labels are read. The probes are used up.
    """
    reached: dict[str, list[float]] = {}
    balanced: dict[str, list[float]] = {}
    for name, chosen in probes.items():
        said = [one.predict(images) for one in chosen]
        reached[name] = [evaluation.share_right(predicted, test.labels) for predicted in said]
        balanced[name] = [balanced_accuracy(predicted.cpu().numpy(), test.labels.cpu().numpy()) for predicted in said]
        probes[name] = [one.scored() for one in chosen]
    return reached, balanced


def wants_attentive(job: Job, model: MaskedAutoencoder, images: int) -> bool:
    """Whether the attentive probe is run: as asked for, else where it is cheap; says what was left out."""
    if job.config.probes is not None:
        return "attentive" in job.config.probes
    size = tokens_bytes(model, images)
    if size > ATTENTIVE_BYTES:
        job.console.print(
            f"no attentive probe: its tokens take {size / 2**30:.1f} GiB and the encoder runs once more; --probes lars "
            "few-labels attentive measures it too",
            style="dim",
        )
    return size <= ATTENTIVE_BYTES
