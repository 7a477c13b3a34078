"""The page's first words: what a run is, whether it worked, and what to do next."""

from __future__ import annotations

import shlex

from maekit.config import FinetuneConfig, PretrainConfig, UserError
from maekit.report.folder import CardFile, RunFolder
from maekit.report.html import Html, bullets, code, join, paragraph, tag
from maekit.report.values import count, items, mapping, number, share, text
from maekit.terminal import short_time
from maekit.training.advice import LOW_SKILL, few_heldout, low_skill, what_next
from maekit.training.interval import in_words, percent, wilson
from maekit.training.optim import peak_learning_rate

TASKS = {"pretrain": "a pretraining", "finetune": "a fine-tuning", "segment": "a segmentation",
         "probe": "an evaluation card"}  # fmt: skip


def state_of(run: RunFolder) -> str:
    """finished, running, stopped or unknown; a card is finished."""
    if run.task == "probe" or run.is_finished:
        return "finished"
    if run.holder:
        return "running"
    return "stopped" if run.step else "not begun"


def progress(run: RunFolder) -> str:
    """Epochs and steps done, of those planned."""
    total, each = run.total_steps, run.steps_per_epoch
    steps = f"{run.step:,} of {total:,} steps" if total else f"{run.step:,} steps"
    if each is None or run.task == "segment":
        return steps
    epochs = f"{run.step / each:.4g} of {total / each:.4g} epochs" if total else f"{run.step / each:.4g} epochs"
    return f"{epochs} ({steps})"


def images_of(run: RunFolder) -> str:
    """How many images it is trained on and holds out; of older runs at least how many."""
    told = mapping(run.environment.get("images"))
    train, heldout = count(told.get("train")), count(told.get("held-out"))
    if train is None and run.task == "finetune":
        train, heldout = (count(run.own_card.get(f"{name}_images")) for name in ("training", "heldout"))
    if train is None and run.task == "segment":
        counts = mapping(run.own_card.get("images"))
        train, heldout = count(counts.get("train")), count(counts.get("held-out"))
    if train is not None:
        return f"{train:,} images" + (f" and {heldout:,} held out" if heldout is not None else "")
    batch, each = count(run.config.get("batch_size")), run.steps_per_epoch
    return f"at least {round(each) * batch:,} images" if batch and each and each >= 1 else ""


def what_it_is(run: RunFolder) -> Html:
    """The first sentence or two."""
    if run.task == "probe":
        card = run.cards[0].values
        sources = ", ".join(text(mapping(row).get("source"), 200) for row in items(card.get("scores")))
        return join([f"This is an evaluation card of frozen features on {text(card.get('data'), 200)}: {sources}."])
    config = run.config
    data = text(config.get("data"), 300) or "data that its config does not name"
    images = images_of(run)
    of = f" ({images})" if images else ""
    if run.task == "pretrain":
        size = " x ".join(str(count(side)) for side in (items(config.get("img_size")) * 2)[:2])
        model = f"{text(config.get('model'), 100)}, {count(config.get('depth')) or '?'} blocks of width "
        model += f"{count(config.get('embed_dim')) or '?'}, {size} px in patches of {count(config.get('patch_size'))}"
        what = f"by recipe {text(config.get('recipe'), 100) or '?'} ({model})"
    else:
        random = config.get("from_scratch") is True
        what = f"from {text(config.get('source'), 300)}" + (" with random weights" if random else "")
        what += f", preset {text(config.get('preset'), 40)}"
    done = {"finished": "It is finished", "running": f"It was running when this page was written ({run.holder})",
            "stopped": "It is stopped", "not begun": "It has not begun"}[state_of(run)]  # fmt: skip
    return join([f"This is {TASKS[run.task]} {what} on {data}{of}. ", f"{done}: {progress(run)} are done."], between="")


def skill_words(run: RunFolder) -> str:
    """The held-out skill and loss in a sentence."""
    skill, loss = run.last("heldout", "skill"), run.last("heldout", "loss")
    if skill is None or loss is None:
        return "No held-out loss has been measured yet."
    trivial = [value for one in items(run.state.get("heldout_trivial")) if (value := number(one)) is not None]
    floor = f", against {min(trivial):.4f} of the better of two predictors that learn nothing" if trivial else ""
    verdict = (
        "it is no better than interpolation" if skill <= 0
        else "it is hardly better than interpolation" if skill < LOW_SKILL
        else "it predicts hidden patches better than interpolation does"
    )  # fmt: skip
    return (
        f"Held-out skill is {skill:.3f} (0: no better than a predictor that learns nothing, 1: perfect; loss "
        f"{loss:.4f}{floor}): {verdict}."
    )


def probe_words(run: RunFolder) -> str:
    """The last online probe in a sentence; empty where there is none."""
    for record in reversed(run.of_kind("probe")):
        knn, linear, images = share(record.get("knn")), share(record.get("linear")), count(record.get("images"))
        if knn is None or linear is None:
            continue
        floors = [row for card in run.cards if card.kind == "probe" for row in floor_rows(card)]
        beside = "" if floors else " No floor is measured beside it during training; maekit probe has one."
        shown = [f"{100 * value:.1f}" if not images else percent(value, images) for value in (knn, linear)]
        return (
            f"The last online probe (epoch {number(record.get('epoch')) or 0:.4g}) of "
            f"{f'{images:,} ' if images else ''}held-out images: k-NN {shown[0]} %, linear {shown[1]} %.{beside}"
        )
    return ""


def floor_rows(card: CardFile) -> list[tuple[str, float, float]]:
    """Name, linear and k-NN accuracy of the rows that nothing was learned for."""
    rows = [mapping(row) for row in items(card.values.get("scores"))]
    found = []
    for row in rows:
        name, linear, knn = text(row.get("source"), 200), share(row.get("linear")), share(row.get("knn"))
        if (name.endswith("random weights") or name == "raw pixels") and linear is not None and knn is not None:
            found.append((name, linear, knn))
    return found


def card_words(card: CardFile) -> str:
    """A card in a sentence, beside its floors."""
    values = card.values
    where = f"{text(values.get('data'), 200)}" + (f" ({card.name})" if card.name else "")
    if card.kind == "finetune":
        top1, images = share(values.get("top1")), count(values.get("test_images"))
        if top1 is None or not images:
            return ""
        largest = share(values.get("most_frequent_class"))
        beside = ""
        if largest is not None:
            better = "better" if wilson(top1, images)[0] > largest else "no better"
            beside = f": {better} than one answer for all, which is right for {100 * largest:.1f} %"
        return f"On the test images of {where} its classifier is right for {in_words(top1, images)}{beside}."
    if card.kind == "segment":
        miou = share(mapping(values.get("score")).get("miou"))
        part = text(values.get("part"), 40)
        return "" if miou is None else f"Segmentation on {where}: mean IoU {100 * miou:.2f} % of the {part} images."
    rows = [mapping(row) for row in items(values.get("scores"))]
    images = count(values.get("test_images"))
    floors = floor_rows(card)
    own = [row for row in rows if text(row.get("source"), 200) not in {name for name, *_ in floors}]
    if not own or not images:
        return ""
    linear, knn = share(own[0].get("linear")), share(own[0].get("knn"))
    if linear is None or knn is None:
        return ""
    short = [("random weights" if name.endswith("random weights") else name, one, two) for name, one, two in floors]
    beside = ", ".join(f"{name} {100 * one:.1f} and {100 * two:.1f}" for name, one, two in short)
    best = max((one for _, one, _ in floors), default=None)
    verdict = ""
    if best is not None:
        low = wilson(linear, images)[0]
        verdict = (
            " The linear probe is above its floors." if low > best
            else " The linear probe is not above its floors by more than its interval." if linear > best
            else " The linear probe is not above its floors: frozen features of this encoder are no gain here."
        )  # fmt: skip
    return (
        f"Evaluation card on {where}, {images:,} test images: linear probe {percent(linear, images)} %, k-NN "
        f"{percent(knn, images)} %" + (f" ({beside})" if beside else "") + "." + verdict
    )


def advice(run: RunFolder) -> list[tuple[str, str]]:
    """What the console says at the end of such a run: a name and a line each."""
    if run.task == "probe":
        return []
    if state_of(run) == "running":
        return [("next", "wait for it; this page can be written again at any time")]
    if state_of(run) != "finished":
        return [("next", f"maekit resume {shlex.quote(run.shown_path)}")]
    found: list[tuple[str, str]] = []
    skill, each = run.last("heldout", "skill"), run.steps_per_epoch
    if isinstance(run.typed, PretrainConfig) and skill is not None and each and each >= 1:
        try:
            peak, _ = peak_learning_rate(run.typed)
            found += low_skill(run.typed, skill, run.step, round(each), peak, run.typed.processes or 1).items()
        except (ArithmeticError, ValueError, UserError):
            pass  # a forged config may hold any number
    if isinstance(run.typed, FinetuneConfig) and (heldout := count(run.own_card.get("heldout_images"))) is not None:
        found += [("that is", line) for line in few_heldout(run.typed.score, heldout)]
    labelled = any("knn" in record for record in run.of_kind("probe"))
    found += what_next(run.task, run.shown_path, text(run.config.get("data"), 300), labelled).items()
    return found


def tiles(run: RunFolder, seconds: float | None) -> Html:
    """The few numbers that one looks for first."""
    found: list[tuple[str, str, str]] = []
    skill, knn, linear = run.last("heldout", "skill"), run.last("probe", "knn"), run.last("probe", "linear")
    if run.task == "pretrain" and skill is not None:
        found.append(("held-out skill", f"{skill:.3f}", "0: interpolation, 1: perfect"))
    cards = [card for card in run.cards if card.kind == "probe"]
    rows = [mapping(row) for card in cards[:1] for row in items(card.values.get("scores"))[:1]]
    images = count(cards[0].values.get("test_images")) if cards else None
    if rows and images and (accuracy := share(rows[0].get("linear"))) is not None:
        found.append(("linear probe, test", f"{percent(accuracy, images).split(' (')[0]} %", f"{images:,} images"))
    elif knn is not None and linear is not None:
        found.append(("online probe, held out", f"{100 * linear:.1f} %", f"linear; k-NN {100 * knn:.1f} %"))
    top1, tested = share(run.own_card.get("top1")), count(run.own_card.get("test_images"))
    if run.task == "finetune" and top1 is not None and tested:
        found.append(("top-1, test", f"{100 * top1:.1f} %", f"{tested:,} images"))
    miou = share(mapping(run.own_card.get("score")).get("miou"))
    if run.task == "segment" and miou is not None:
        found.append(("mean IoU", f"{100 * miou:.2f} %", f"{text(run.own_card.get('part'), 30)} images"))
    each = run.steps_per_epoch
    if run.step and each and run.task != "segment":
        total = run.total_steps
        found.append(("epochs", f"{run.step / each:.4g}", f"of {total / each:.4g} planned" if total else ""))
    elif run.step:
        found.append(("steps", f"{run.step:,}", f"of {run.total_steps:,} planned" if run.total_steps else ""))
    if seconds:
        found.append(("time", short_time(seconds), "evaluation and saving included"))
    if not found:
        return Html("")
    inner = [tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in found]
    return tag("dl", *inner, class_="tiles")


def summary(run: RunFolder, seconds: float | None) -> Html:
    """The first paragraph, the first numbers, and what to type next."""
    sentences: list[str] = [skill_words(run), probe_words(run)] if run.task == "pretrain" else []
    sentences += [card_words(card) for card in run.cards[:4]]
    worked = join([one for one in sentences if one], " ")
    parts = [paragraph(what_it_is(run), class_="lead")]
    parts += [paragraph(worked, class_="lead")] if worked else []
    parts.append(tiles(run, seconds))
    told = advice(run)
    if told:
        rows = [paragraph(f"{name}: ", code(line) if line.startswith("maekit ") else line) for name, line in told]
        parts.append(tag("div", *rows, class_="next"))
    if run.remarks:
        parts.append(tag("div", paragraph("What could not be read:"), bullets(run.remarks[:12]), class_="warn"))
    return join(parts)
