"""Evaluation cards as tables and pictures, in the words of the console's tables."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.style
import numpy as np

from maekit.report.charts import LOOKS, svg
from maekit.report.folder import CardFile
from maekit.report.html import Html, bullets, details, esc, figure, heading, join, paragraph, table
from maekit.report.values import count, items, mapping, number, share, text
from maekit.training.card import FEW, HEADINGS, cell, even_cell
from maekit.training.imbalance import UNEVEN
from maekit.training.interval import FEW_TEST, in_words, percent
from maekit.training.scorecard import SHOWN
from maekit.training.scoring import worst_confusions
from maekit.viz.card import Curves
from maekit.viz.card import figure_of as card_figure
from maekit.viz.confusion import confusion_figure
from maekit.viz.plots import LOOK

MOST_CLASSES = 200
"""Classes up to which confusions are drawn; a table of classes has as many rows at most."""
MOST_ROWS = 60
_POOLINGS = ("cls", "mean", "both")


def card_section(card: CardFile, prefix: str, level: int) -> Html:
    """A card: heading, tables, pictures, and what its numbers are."""
    how = {"probe": probe_card, "finetune": classifier_card, "segment": segment_card}[card.kind]
    words = {"probe": "Evaluation card", "finetune": "Classifier", "segment": "Segmentation", "pretrain": ""}[card.kind]
    data = text(card.values.get("data"), 200)
    title = f"{words} on {data}" + (f": {card.name}" if card.name else "")
    return join([heading(level, title), how(card.values, prefix)])


def probe_card(values: dict[str, Any], prefix: str) -> Html:
    """Rows of features, columns of probes, test accuracies with intervals; and accuracy after each block."""
    rows = [mapping(row) for row in items(values.get("scores"))[:MOST_ROWS]]
    images = count(values.get("test_images"))
    if not rows or not images:
        return paragraph("This card has no rows that can be read.", class_="note")
    tested = [{name: shares_of(found, "test") for name, found in mapping(row.get("probes")).items()} for row in rows]
    columns = list(dict.fromkeys(name for row in tested for name in row))[:20]
    headings = ["features", "block", *(HEADINGS.get(column, text(column, 40)) for column in columns)]
    lines = [
        [text(row.get("source"), 300), text(row.get("pooling"), 100) or "-",
         *(small(cell(found.get(column, []), images)) for column in columns)]
        for row, found in zip(rows, tested, strict=True)
    ]  # fmt: skip
    classes = count(values.get("classes"))
    what = f"{classes:,} classes, " if classes else ""
    if (training := count(values.get("training_images"))) is not None:
        what += f"{training:,} training and "
    what += f"{images:,} test images ({text(values.get('test'), 100)})"
    parts = [paragraph(what, class_="sub"), table(headings, lines, "Test accuracy, %", (0, 1))]
    largest = share(values.get("most_frequent_class"))
    if largest is not None and classes and largest >= UNEVEN / classes:
        even = [[text(row.get("source"), 300),
                 *(small(even_cell(shares_of(mapping(row.get("probes")).get(column), "balanced")))
                   for column in columns)] for row in rows]  # fmt: skip
        title = "The same as the mean over the classes (balanced accuracy), %"
        parts.append(table(["features", *headings[2:]], even, title))
    notes = []
    if largest is not None:
        notes.append(f"One answer for all would be right for {100 * largest:.1f} % of the test images.")
    notes.append("+- and brackets: 95 % interval of the test sample (Wilson).")
    if any(column.endswith(FEW) for column in columns):
        notes.append("Few labels: mean +- deviation of several draws of labels.")
    if images < FEW_TEST:
        notes.append(
            f"{images} test images: rows that differ by less than their intervals are not told apart by so few."
        )
    notes.append("Blocks, poolings and settings are chosen on a held-out tenth of the training images; the test split "
                 "is scored once.")  # fmt: skip
    parts.append(paragraph(" ".join(notes), class_="note"))
    curves = [curves_of(row) for row in rows]
    if any(one.found for one in curves):
        parts.append(figure(by_block([one for one in curves if one.found], prefix),
                            "Held-out accuracy after each block", "half"))  # fmt: skip
    return join(parts)


def small(words: str) -> Html:
    """A cell of the console's, whose second line is an interval."""
    first, _, rest = words.partition("\n")
    first, plus, after = first.partition(" +- ")
    rest = f"+- {after}" if plus else rest
    return Html(f"{esc(first)} <small>{esc(rest)}</small>") if rest else esc(first)


def shares_of(found: object, name: str) -> list[float]:
    """What the draws of a probe reached."""
    values = [share(mapping(one).get(name)) for one in items(found)[:100]]
    return [value for value in values if value is not None]


def curves_of(row: dict[str, Any]) -> Curves:
    """The search of a row, as far as it holds numbers."""
    found = []
    for one in map(mapping, items(row.get("search"))[:2000]):
        block, linear, knn = count(one.get("block")), share(one.get("linear")), share(one.get("knn"))
        if block is not None and block <= 1000 and linear is not None and knn is not None:
            pooling = one.get("pooling") if one.get("pooling") in _POOLINGS else "mean"
            found.append({"block": block, "pooling": pooling, "linear": linear, "knn": knn})
    name = text(row.get("source"), 200)
    return Curves(name, found, floor=name.endswith(", random weights"))


def by_block(curves: list[Curves], prefix: str) -> Html:
    """The picture of the card."""
    with matplotlib.style.context(LOOKS):
        picture = card_figure(curves, title="", note="")
        picture.set_size_inches(8.6, 4.4)
        return svg(picture, prefix, "held-out accuracy after each block")


def classifier_card(values: dict[str, Any], prefix: str) -> Html:
    """Accuracy, its classes, and which are taken for which."""
    images = count(values.get("test_images"))
    top1, top5 = share(values.get("top1")), share(values.get("top5"))
    if not images or top1 is None:
        return paragraph("This card has no score that can be read.", class_="note")
    names = [text(name, 100) for name in items(values.get("classes"))]
    lines = [f"top-1 ({text(values.get('test'), 100) or 'test images'}): {in_words(top1, images)}"]
    if top5 is not None and len(names) > 5:
        lines.append(f"top-5: {in_words(top5, images)}")
    if (balanced := share(values.get("balanced"))) is not None:
        lines.append(f"mean over the classes (balanced accuracy): {100 * balanced:.1f} %")
    if (largest := share(values.get("most_frequent_class"))) is not None:
        lines.append(f"one answer for all would be right for {100 * largest:.1f} % of the test images")
    if (epoch := number(values.get("epoch"))) is not None:
        lines.append(f"weights: {text(values.get('weights'), 20)}, of epoch {epoch:.4g}")
    if unreadable := count(values.get("unreadable")):
        lines.append(f"{unreadable:,} test images could not be read")
    per_class, counted = mapping(values.get("per_class")), mapping(values.get("class_images"))
    known = [(name, share(per_class.get(name)), count(counted.get(name))) for name in dict.fromkeys(names)]
    rows = [(name, found, of) for name, found, of in known if found is not None and of]
    parts = [bullets(lines)]
    if rows:
        told = [[name, f"{of:,}", small(percent(found, of, gap="\n"))] for name, found, of in rows[:MOST_CLASSES]]
        headings = ["class", "images", "top-1 %"]
        if len(rows) > SHOWN:
            worst = sorted(rows, key=lambda row: row[1])[:SHOWN]
            short = [[name, f"{of:,}", small(percent(found, of, gap="\n"))] for name, found, of in worst]
            parts.append(table(headings, short, f"The {SHOWN} worst of {len(rows)} classes"))
            parts.append(details("all classes", table(headings, told)))
        else:
            parts.append(table(headings, told, "Each class, with its 95 % interval"))
    parts.append(confusions(values.get("confusion"), names, prefix))
    return join(parts)


def matrix_of(value: object, classes: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """A square table of counts of so many classes; None where it is no such thing."""
    rows = items(value)
    if not 0 < len(rows) == classes <= MOST_CLASSES:
        return None
    if any(len(items(row)) != classes or any(count(one) is None for one in items(row)) for row in rows):
        return None
    return np.array(rows, np.int64)


def confusions(value: object, names: list[str], prefix: str) -> Html:
    """The picture of what is taken for what, and the commonest in words."""
    matrix_KK = matrix_of(value, len(names))
    if matrix_KK is None:
        return Html("")
    worst = worst_confusions(matrix_KK, SHOWN // 2)
    said = ", ".join(f"{names[a]} as {names[b]} ({times:,})" for a, b, times in worst)
    with matplotlib.style.context(["default", LOOK]):
        picture = confusion_figure(matrix_KK, names)
        inner = svg(picture, prefix, "confusion matrix: rows are the true classes, columns what was said", True)
    parts = [
        figure(Html(f'<div class="white">{inner}</div>'), "Which classes are taken for which, % of the true class")
    ]
    if said:
        parts.append(paragraph(f"Taken for another most often: {said}.", class_="note"))
    return join(parts)


def segment_card(values: dict[str, Any], prefix: str) -> Html:
    """The classes and their means, as on the console."""
    score = mapping(values.get("score"))
    rows = []
    for name, found in list(mapping(score.get("classes")).items())[:MOST_CLASSES]:
        one = mapping(found)
        rows.append([text(name, 100), *(percent_or_dash(one.get(key)) for key in ("iou", "accuracy", "share"))])
    rows.append(["mean", percent_or_dash(score.get("miou")), percent_or_dash(score.get("mean_accuracy")), ""])
    rows.append(["all pixels", "", percent_or_dash(score.get("pixel_accuracy")), ""])
    part = text(values.get("part"), 40)
    images = count(mapping(values.get("images")).get(part))
    title = f"{f'{images:,} ' if images else ''}{part} images, {text(values.get('weights'), 20)} weights"
    note = ("IoU: intersection over union. Pixels are not independent of each other, so no interval is given."
            )  # fmt: skip
    return join([table(["class", "IoU %", "accuracy %", "pixels %"], rows, title), paragraph(note, class_="note")])


def percent_or_dash(value: object) -> str:
    """A share in percent with two digits."""
    found = share(value)
    return "-" if found is None or math.isnan(found) else f"{100 * found:.2f}"
