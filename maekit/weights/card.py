"""The README beside weights that leave the house: what they are, how to load them, and under which licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maekit.weights.passport import Passport

_HUB_LICENSES = (
    "apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
    "bsd-3-clause", "gpl-3.0", "agpl-3.0",
)  # fmt: skip
"""Identifiers that the hub knows: https://huggingface.co/docs/hub/repositories-licenses"""


def hub_license(text: str) -> dict[str, str]:
    """A licence's entries in the hub's card: its identifier where the text names one, else `other` with the words."""
    words = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    exact = [name for name in _HUB_LICENSES if re.search(rf"(^|-){re.escape(name)}(-|$)", words)]
    if exact:
        return {"license": max(exact, key=len)}
    if not text or text.lower().startswith("unspecified"):
        return {"license": "unknown"}
    return {"license": "other", "license_name": words[:60]}


def model_card(title: str, passport: Passport, usage: str, cards: Mapping[str, Any], library: str) -> str:
    """The README: the hub's header, what the model is, the probes' numbers where there are any, how to load it.

    `usage` is Python; `cards` are card.json files by the name of their folder.
    """
    model = passport.model
    head = [f"{key}: {value}" for key, value in hub_license(passport.weights_license).items()]
    head += [f"library_name: {library}"] if library else []
    classifies = passport.kind == "classifier"
    head += [f"pipeline_tag: image-{'classification' if classifies else 'feature-extraction'}", "tags:", "- maekit",
             "- mae", *([] if classifies else ["- self-supervised"])]  # fmt: skip
    size = " x ".join(str(side) for side in model.size_hw)
    extras = "".join(
        [" with a class token" if model.class_token else " without a class token",
         f" and {model.reg_tokens} register tokens" if model.reg_tokens else ""]
    )  # fmt: skip
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (passport.mean, passport.std))
    rows = {
        "encoder": f"{model.model}, {model.depth} blocks, width {model.embed_dim}, {model.num_heads} heads{extras}",
        "input": f"{size} pixels, {model.in_chans} channels, patches of {model.patch_size} px",
        "normalisation": f"pixels in 0..1 (8 bits / 255, 16 bits / 65535), minus mean ({mean}), over deviation ({std})",
        "resizing": f"{passport.interpolation}, antialiased"
        + (f", to the input's size / {passport.crop_pct:g}; then the centre" if passport.crop_pct < 1 else ""),
        "fine-tuning" if classifies else "pretraining": f"{passport.epochs:.4g} epochs ({passport.steps:,} steps) on "
        f"{passport.data or 'no data'}, "
        + (
            f"{len(passport.classes)} classes"
            if classifies
            else f"{model.mask} masks over {model.mask_ratio:.0%} of the patches, target {model.target}"
        ),
        "recipe": passport.recipe or "-",
        **({"classes": ", ".join(passport.classes)} if classifies else {}),
        "licence of the weights": passport.weights_license,
    }
    lines = ["---", *head, "---", "", f"# {title}", ""]
    lines += ["A vision transformer pretrained by masked autoencoding ([He et al. 2021]"
              "(https://arxiv.org/abs/2111.06377)) with maekit.", "", "| | |", "|---|---|"]  # fmt: skip
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", "## Use", "", "```python", usage.strip(), "```", ""]
    for name, card in cards.items():
        lines += ["## Probes", ""] if name == next(iter(cards)) else []
        lines += _probe_lines(card)
    return "\n".join(lines).rstrip() + "\n"


def _probe_lines(card: Mapping[str, Any]) -> list[str]:
    """One probe's table; features without training stand beside it, as its floor."""
    lines = [f"{card['data']}: {card['training_images']:,} training and {card['test_images']:,} test images.", ""]
    lines += ["| features | pooling | linear probe % | k-NN % |", "|---|---|---|---|"]
    for score in card["scores"]:
        # The name of a source may be a path of the owner's machine.
        name = re.sub(r"^.*[/\\]", "", score["source"])
        lines.append(f"| {name} | {score['pooling']} | {100 * score['linear']:.1f} | {100 * score['knn']:.1f} |")
    return [*lines, ""]


def find_cards(folder: Path) -> dict[str, Any]:
    """The probes' cards in a run's folder, by the name of theirs; damaged ones are passed over."""
    found = {}
    for path in sorted(folder.glob("probe-*/card.json")):
        try:
            card = json.loads(path.read_text())
            _probe_lines(card)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        found[path.parent.name] = card
    return found
