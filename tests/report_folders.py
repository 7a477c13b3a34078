"""Run folders written by hand, for the page about them: every number in them is known to the tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maekit import recipes
from maekit.config import PRESETS
from maekit.config.segmentation import preset
from maekit.configfile import to_json

EVIL = "</script><script src=//evil>alert('x')</script>&amp;\"'<b>"
"""What must stay words wherever it stands."""
STEPS, EACH, TRIVIAL = 376, 94, 0.4889


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def environment(words: list[str], evil: str = "") -> dict[str, Any]:
    return {
        "command": ["maekit", *words, *([evil] if evil else [])], "python": "3.12", "platform": "Linux" + evil,
        "versions": {"torch": "2.10" + evil, "a" + evil: "1"}, "commit": "abc1234", "device": "cpu", "threads": 2,
        "cpu": "a processor \u202e" + evil,
    }  # fmt: skip


def step_lines(total: int, each: int) -> list[dict[str, Any]]:
    """A line every 20 steps and at the end; a second session begins at step 200; a quarter of the time is waiting."""
    lines, before = [], 0
    for step in [*range(20, total, 20), total]:
        began = 0 if step <= 200 else 200
        spent, since = float(step - began), float(step - (before if before >= began else began))
        lines.append({
            "kind": "step", "step": step, "epoch": step / each, "loss": 0.39 if step == total else 0.5, "skill": 0.2,
            "lr": 1e-3, "images_per_s": 64.0, "seconds": spent, "waited": since / 4,
        })  # fmt: skip
        before = step
    return lines


def card_of_probe(data: str, evil: str = "") -> dict[str, Any]:
    """Three rows: the run, random weights, raw pixels."""

    def row(name: str, linear: float, knn: float, blocks: int) -> dict[str, Any]:
        few = [{"test": share, "balanced": share, "setting": {"labels": 10}} for share in (linear - 0.3, linear - 0.2)]
        search = [
            {"block": block, "pooling": pooling, "linear": linear - 0.01 * block, "knn": knn}
            for block in range(1, blocks + 1) for pooling in ("cls", "mean")
        ] or [{"block": 0, "pooling": "mean", "linear": linear, "knn": knn}]  # fmt: skip
        probes = {name: [{"test": share, "balanced": share}] for name, share in (("linear", linear), ("knn", knn))}
        few_labels = {"10 % labels" + evil: few} if blocks else {}
        return {"source": name, "pooling": "2 cls", "linear": linear, "knn": knn, "search": search,
                "probes": probes | few_labels}  # fmt: skip

    name = "runs/pre" + evil
    return {
        "data": data + evil, "training_images": 5000, "test_images": 1300, "test": "test" + evil, "classes": 4,
        "most_frequent_class": 0.25, "environment": environment(["probe"]),
        "scores": [
            row(name, 0.873, 0.8, 3), row(f"{name}, random weights", 0.82, 0.7, 3), row("raw pixels", 0.42, 0.38, 0),
        ],
    }  # fmt: skip


def make_pretraining(folder: Path, mask_ratio: float = 0.75, skill: float = 0.181, evil: bool = False) -> Path:
    """Four epochs of the recipe photos, with a probe, two panels, bad files and bad steps."""
    word = EVIL if evil else ""
    folder.mkdir(parents=True)
    config = dataclasses.replace(
        recipes.get("photos"), epochs=4, warmup_epochs=0.4, mask_ratio=mask_ratio, betas=(0.9, 0.999), out=str(folder),
        data="photos" + word, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), precision="fp32", mlp_ratio=4.0,
    )  # fmt: skip
    (folder / "config.json").write_text(to_json(config))
    command = ["pretrain", "photos", "--epochs", "4", "--betas", "0.9", "0.999"]
    write_json(folder / "env.json", environment(command, word) | {"images": {"train": 5893, "held-out": 120}})
    records = step_lines(STEPS, EACH)
    for epoch in range(5):
        now = skill * epoch / 4
        records.append({"kind": "heldout", "step": epoch * EACH, "epoch": float(epoch), "loss": TRIVIAL * (1 - now),
                        "skill": now})  # fmt: skip
    records.append({"kind": "probe", "step": STEPS, "epoch": 4.0, "rankme": 20.5, "images": 120, "knn": 0.625,
                    "linear": 0.713})  # fmt: skip
    records.append({"kind": "spike", "step": 100, "epoch": 100 / EACH, "loss": 9.0, "median": 0.5})
    write_lines(folder / "metrics.jsonl", records)
    state = {"step": STEPS, "total_steps": STEPS, "heldout_trivial": [0.6, TRIVIAL], "bad_steps": 2, "rollbacks": 0}
    write_json(folder / "checkpoints" / f"step-{STEPS:06d}" / "state.json", state)
    write_json(folder / "checkpoints" / "step-000094" / "state.json", state | {"step": 94})
    bad = [{"id": n, "name": f"broken-{n}.jpg{word}", "reason": f"cut short{word}"} for n in range(12)]
    write_lines(folder / "quarantine.jsonl", bad)
    write_lines(folder / "nonfinite.jsonl", [{"step": 5, "ids": [1]}, {"step": 9, "ids": [2]}])
    write_json(folder / "probe-photos" / "card.json", card_of_probe("photos", word))
    (folder / "panels").mkdir()
    for epoch in (2, 4):
        picture = np.random.default_rng(epoch).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(picture).save(folder / "panels" / f"epoch-{epoch:04d}.png")
    (folder / "lock").write_text("")
    return folder


def make_finetuning(folder: Path, evil: bool = False) -> Path:
    """Two classes, 60 test images, 50 of them right."""
    word = EVIL if evil else ""
    folder.mkdir(parents=True)
    config = dataclasses.replace(
        PRESETS["small"], task="finetune", source="runs/pre" + word, data="pets" + word, epochs=4, warmup_epochs=1,
        layer_decay=0.8,
        follow_images=(), batch_size=64,
    )  # fmt: skip
    (folder / "config.json").write_text(to_json(config))
    write_json(folder / "env.json", environment(["finetune", "runs/pre"], word))
    records = step_lines(40, 10)
    records += [{"kind": "heldout", "step": 10 * e, "epoch": float(e), "loss": 1.0 / e, "top1": 0.2 * e, "top5": 1.0}
                for e in range(1, 5)]  # fmt: skip
    write_lines(folder / "metrics.jsonl", records)
    write_json(folder / "checkpoints" / "step-000040" / "state.json", {"step": 40, "total_steps": 40, "world": 1})
    names = ["cat" + word, "dog" + word]
    card = {
        "task": "finetune", "data": "pets" + word, "training_images": 640, "heldout_images": 20, "weights": "best",
        "epoch": 4.0, "steps": 40, "classes": names, "test": "test split", "test_images": 60, "unreadable": 0,
        "top1": 50 / 60, "top5": 1.0, "balanced": 0.85, "most_frequent_class": 0.5,
        "per_class": dict(zip(names, (0.9, 0.8), strict=True)), "class_images": dict.fromkeys(names, 30),
        "confusion": [[27, 3], [6, 24]],
    }  # fmt: skip
    write_json(folder / "card.json", card)
    return folder


def make_segmentation(folder: Path, evil: bool = False) -> Path:
    """Three classes, one of which is in no image."""
    word = EVIL if evil else ""
    folder.mkdir(parents=True)
    config = dataclasses.replace(
        preset("small"), source="runs/pre" + word, data="camvid" + word, steps=40, warmup_steps=4
    )
    (folder / "config.json").write_text(to_json(config))
    write_json(folder / "env.json", environment(["segment", "runs/pre"], word))
    records = [
        {key: value for key, value in one.items() if key not in ("epoch", "skill")} for one in step_lines(40, 10)
    ]
    for e in range(1, 5):
        scores = {"miou": 0.1 * e, "mean_accuracy": 0.15 * e, "pixel_accuracy": 0.2 * e}
        records.append({"kind": "heldout", "step": 10 * e, **scores})
    write_lines(folder / "metrics.jsonl", records)
    write_json(folder / "checkpoints" / "step-000040" / "state.json", {"step": 40, "total_steps": 40})
    classes = {
        "road" + word: {"iou": 0.75, "accuracy": 0.8, "share": 0.6},
        "car": {"iou": 0.3, "accuracy": 0.5, "share": 0.4}, "tree": {"iou": None, "accuracy": 0.0, "share": None},
    }  # fmt: skip
    score = {"miou": 0.525, "mean_accuracy": 0.65, "pixel_accuracy": 0.7, "pixels": 1000, "classes": classes}
    card = {
        "data": "camvid" + word, "part": "validation", "weights": "last", "steps": 40, "score": score,
        "images": {"train": 300, "held-out": 30, "validation": 100}, "confusion": [[1]],
    }  # fmt: skip
    write_json(folder / "card.json", card)
    Image.fromarray(np.full((30, 90, 3), 128, np.uint8)).save(folder / "overlays.png")
    return folder
