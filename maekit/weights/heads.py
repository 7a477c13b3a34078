"""Weights with a head that learned labels: told apart into encoder and head, and put together again.

Everything that works on an encoder takes these files too and leaves the head out, which its report says. A classifier
that pools by the mean normalises once, after the pooling; as an encoder alone, that is its final normalisation.
"""

from __future__ import annotations

import dataclasses

from timm.data import ImageNetInfo

from maekit.weights.facts import OFFICIAL_CROP_PCT
from maekit.weights.foreign import Material
from maekit.weights.layouts import State
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.report import KeyReport

KINDS = ("classifier", "segmenter")
"""Kinds of passports that speak of an encoder with a head."""
NORM, POOLED_NORM = "encoder.norm.", "fc_norm."
_SHOWN = 3


def part(passport: Passport, tensors: State, report: KeyReport) -> Material:
    """Our own weights with a head, as those of an encoder, with the head beside them."""
    state = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
    head = {name: value for name, value in tensors.items() if name not in state}
    for kind in ("weight", "bias"):
        if POOLED_NORM + kind in head and NORM + kind not in state:
            state[NORM + kind] = head.pop(POOLED_NORM + kind)
            report.renamed[POOLED_NORM + kind] = NORM + kind
    if report.renamed:
        report.notes.append("fc_norm.* stood after the pooling and is now the final norm of each token")
    report.unused += list(head)
    count = len(passport.classes)
    names = ", ".join(passport.classes[:_SHOWN]) + (", ..." if count > _SHOWN else "")
    alone = dataclasses.replace(passport, kind="encoder", classes=(), head=HeadFacts())
    what = f"{passport.kind} of {count} classes ({names})"
    return Material(alone, state, report, what, head=head, labelled=passport)


def find_foreign(found: Material, tensors: State, said_pool: object = None, said_crop_pct: float | None = None) -> None:
    """Note the linear head of a file in timm's names, where it has one: such a file is a classifier too.

    It pools by the mean where a norm stands behind the pooling, and by the class token otherwise (timm's rule, and
    that of the official code). A config beside it that says another pooling is not ours to read: then it is an encoder.
    """
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    width = found.passport.model.embed_dim
    if found.report.layout not in ("timm", "official") or weight is None or bias is None:
        return
    if weight.ndim != 2 or weight.shape != (len(bias), width) or found.passport.kind != "encoder":
        return
    pool = "mean" if "fc_norm.weight" in tensors else "cls"
    if pool == "cls" and not found.passport.model.class_token:
        return
    if said_pool not in (None, {"mean": "avg", "cls": "token"}[pool]):
        return
    classes = foreign_classes(found.passport.data, len(bias))
    found.head = {"head.weight": weight.float(), "head.bias": bias.float()}
    facts = HeadFacts(kind="linear", pool=pool)
    crop_pct = said_crop_pct or OFFICIAL_CROP_PCT
    found.labelled = dataclasses.replace(
        found.passport, kind="classifier", classes=classes, head=facts, crop_pct=crop_pct
    )


def foreign_classes(data: str, count: int) -> tuple[str, ...]:
    """Names of the classes of a file that names none: those of ImageNet's folders, else numbers."""
    if data == "ImageNet-1k" and count == 1000:
        return tuple(ImageNetInfo("imagenet-1k").label_names())
    return tuple(f"class {index}" for index in range(count))
