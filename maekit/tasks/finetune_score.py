"""Score a classifier again on the test split of labelled data.

    maekit finetune runs/c10/finetune-cifar10 --data cifar10 --eval

Cost: one forward pass for each image.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from maekit.config import FinetuneConfig, SourceConfig, UserError
from maekit.data.labelled import class_map, labels_of, test_images
from maekit.data.levels import remarks_for
from maekit.data.loader import Pool, open_pool
from maekit.data.sources import Source, open_configured
from maekit.data.workers import choose_workers
from maekit.keeping import keeping
from maekit.models.classifier import Classifier
from maekit.models.encoder import use_fused_attention
from maekit.runtime import choose_attention, choose_device, choose_precision
from maekit.terminal import counting, make_console, remark
from maekit.training.finetuning import default_out, labels_in, reading_config
from maekit.training.imbalance import TestClasses
from maekit.training.interval import in_words
from maekit.training.scorecard import CARD, CONFUSION, print_score, with_interval, write_card
from maekit.training.scoring import EVAL_BATCH, answer, score
from maekit.training.trained_on import run_of, said_of, training_of
from maekit.viz.confusion import picture_confusion
from maekit.weights.store import load_classifier


def open_data(config: FinetuneConfig, source: str, model: Classifier) -> Source:
    """The data, in the groups of the run where they are those that it was trained on: they decide what is tested."""
    channels, run = model.config.in_chans, run_of(source)
    data = open_configured(config, channels)
    if config.group_by or run is None or not run.group_by or data.train.fingerprint != model.passport.fingerprint:
        return data
    return open_configured(dataclasses.replace(config, group_by=run.group_by), channels)


def main(source: str, config: FinetuneConfig) -> int:
    """The score of a classifier on the test split of labelled data, as the run that trained it gave.

    Raises:
        UserError: no classifier, or labels of other classes than its own.
    """
    console = make_console()
    folder = Path(config.out) if config.out else default_out(source, config)
    problems = config.problems()
    if (folder / "config.json").exists():
        problems.append(f"--out {folder}: holds a run, whose own card would be lost; name another folder")
    if problems:
        raise UserError(*problems)
    device = choose_device(config.device).value
    precision = choose_precision(config.precision, device).value
    given = SourceConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)})
    model = load_classifier(source, given, device)
    remark(console, model.key_report.remarks())
    use_fused_attention(model, choose_attention(device, precision).value)
    data = open_data(config, source, model)
    remark(console, remarks_for(data, model.passport.mean, model.passport.std))
    part, ids, what = test_images(data, config.data)
    training = training_of(source, model.passport, data, config.data)
    used = 0 if training is None else int(training.among(part)[ids].sum())
    told = training is not None and training.sure
    if part is data.train and part.fingerprint != model.passport.fingerprint and not told:
        console.print(
            "[yellow]no test split, and not the data that the run saw:[/yellow] where these hold its images (files "
            "that came or went shift the choice), some of those that it was trained on are scored"
        )
    labels = labels_in(
        labels_of(part, config.data), class_map(part.class_names or [], model.classes, config.data, source)
    )
    pool: Pool
    with counting(console, "reading images") as progress:
        reading = reading_config(config, model.passport)
        pool, _ = open_pool(part, reading, device, choose_workers(config.workers, 1), progress)
    with counting(console, "scoring") as progress:
        answers = answer(model, pool, ids, labels, EVAL_BATCH, precision, progress)
    if not len(answers.labels):
        raise UserError(f"--data {config.data}: none of the test images ({what}) can be read")
    found = score(answers, len(model.classes))
    facts = {
        "task": "eval", "source": source, "data": data.name, "fingerprint": part.fingerprint,
        "epochs": model.passport.epochs, "steps": model.passport.steps, "trained_on": used,
        "size": list(reading.size_hw), "crop_pct": reading.crop_pct,
    }  # fmt: skip
    title = f"{source}: {data.name}, {what}, top-1 {found.top1:.1%}"
    classes = TestClasses.of(None, answers.labels, model.classes)
    print_score(console, found, classes, title)
    with keeping(folder / CARD, console, CONFUSION):
        write_card(folder, facts, found, classes, what, len(ids) - found.images, device)
        picture_confusion(found.confusion_KK, model.classes, folder / CONFUSION, title, console.print)
    top5 = f"; top-5 {in_words(found.top5, found.images)}" if len(model.classes) > 5 else ""
    console.print(f"top-1 {with_interval(found)}{top5}")
    if used and told:
        console.print(f"[yellow]not a test:[/yellow] {said_of(used, len(ids), sure=True)}")
    console.print(f"card: {folder / CARD}", markup=False)
    return 0
