"""The whole page: one file that loads nothing, for a screen of any size, in either light, and for paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from maekit.config import PretrainConfig
from maekit.report.cards import card_section
from maekit.report.charts import charts
from maekit.report.compare import comparison, labels_of
from maekit.report.facts import facts_section, times_of
from maekit.report.folder import RunFolder
from maekit.report.html import Html, heading, join, paragraph, tag
from maekit.report.pictures import panels, sheets
from maekit.report.settings import settings_section
from maekit.report.style import SCRIPT, STYLE
from maekit.report.words import TASKS, state_of, summary
from maekit.viz.confusion import training_drawings
from maekit.viz.plots import Drawing, collect
from maekit.viz.plots import drawings as pretraining_drawings
from maekit.viz.segment_curves import segment_drawings

SEGMENT_SHEETS = (("overlays.png", "Scored images: image, truth, prediction, error"),
                  ("heldout.png", "Held-out images: image, truth, prediction, error"))  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What of the pictures is wanted: panels at most, and bytes of the page at most."""

    panels: int
    most_bytes: int


def page(runs: Sequence[RunFolder], recipes: Sequence[PretrainConfig | None], asked: Asked, version: str) -> str:
    """The page about these runs, each with the recipe that it was begun from where this version has it.

    Words and curves come first; pictures share what is left of the bytes.
    """
    times = [times_of(run) for run in runs]
    several = len(runs) > 1
    level = 3 if several else 2
    before, after = [], []
    for number, (run, recipe, spent) in enumerate(zip(runs, recipes, times, strict=True), 1):
        prefix = f"r{number}"
        before.append(join([summary(run, spent.seconds), curves_section(run, prefix, level)]))
        cards = [card_section(card, f"{prefix}card{place}", level) for place, card in enumerate(run.cards)]
        after.append(join([*cards, settings_section(run, recipe, level), facts_section(run, spent, prefix, level)]))
    beside = comparison(runs, times) if several else Html("")
    left = asked.most_bytes - sum(len(part.encode()) for part in (*before, *after, beside)) - len(STYLE) - 8000
    bodies = []
    for number, run in enumerate(runs):
        share = max(0, left) // (len(runs) - number)
        shown, used = picture_section(run, level, asked.panels, share)
        left -= used
        bodies.append(join([before[number], shown, after[number]]))
    return document(runs, bodies, beside, version)


def curves_section(run: RunFolder, prefix: str, level: int) -> Html:
    """The curves that curves.png has, one axes at a time."""
    drawn: list[Drawing] = []
    if run.task == "pretrain":
        drawn = pretraining_drawings(collect(run.records))
    elif run.task == "finetune":
        names = {"top1": "top-1", "top5": "top-5"}
        drawn = training_drawings(run.records, names)
    elif run.task == "segment":
        drawn = segment_drawings(run.records)
    if not run.records or not drawn:
        return Html("")
    return join([heading(level, "Curves"), charts(drawn, f"{prefix}curve")])


def picture_section(run: RunFolder, level: int, most: int, budget: int) -> tuple[Html, int]:
    """Panels of a pretraining, or sheets of a segmentation; and the bytes that they take."""
    if run.task == "pretrain":
        shown, used = panels(run, most, budget)
        title = "Reconstructions"
    elif run.task == "segment":
        shown, used = sheets(run, SEGMENT_SHEETS, budget)
        title = "Pictures"
    else:
        return Html(""), 0
    return (join([heading(level, title), shown]), used) if shown else (Html(""), 0)


def document(runs: Sequence[RunFolder], bodies: Sequence[Html], beside: Html, version: str) -> str:
    """Head, header with links to the runs, sections, footer."""
    labels = labels_of(runs)
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else labels[0]
    state = state_of(runs[0])
    mark = Html("") if several or runs[0].task == "probe" else tag("span", state, class_=f"state {state}")
    links = [tag("li", tag("a", label, href=f"#run{number}")) for number, label in enumerate(labels, 1)]
    nav = tag("nav", tag("ul", tag("li", tag("a", "Side by side", href="#compare")), *links), aria_label="runs")
    sub = "Runs of maekit side by side" if several else f"A report of {TASKS[runs[0].task]} with maekit"
    parts = [beside] if several else []
    for number, (label, body, run) in enumerate(zip(labels, bodies, runs, strict=True), 1):
        badge = tag("span", state_of(run), class_=f"state {state_of(run)}")
        head = tag("h2", label, " ", badge) if several else Html("")
        parts.append(tag("section", head, body, id=f"run{number}"))
    script = Html(SCRIPT)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = join([
        Html('<meta charset="utf-8">'),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} - maekit"),
        tag("style", Html(STYLE)),
    ])  # fmt: skip
    note = (
        "Shares and percentages of test images come with 95 % intervals (Wilson). Everything on this page is out of "
        "the run's folder; nothing was measured for it. It loads nothing from anywhere."
    )
    body = join([
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("header", tag("h1", title, " ", mark), paragraph(sub, class_="sub"), nav if several else ""),
        tag("main", join(parts), id="main"),
        tag("footer", paragraph(note), paragraph(f"Written by maekit report, maekit {version}.")),
        tag("script", script),
    ])  # fmt: skip
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
