"""What is this file, what can it do, and what to type next?

    maekit info mae_pretrain_vit_base.pth
    maekit info runs/c10 --json

Works on every source of weights. No model is built: the header and the keys say it all, or say what must be asked.
Cost: seconds, most of them for loading PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import torch
from rich.markup import escape

from maekit.config import InfoConfig, ModelConfig, SourceConfig, flag
from maekit.models.mae import MaskedAutoencoder
from maekit.terminal import make_console, print_settings
from maekit.weights.facts import NON_COMMERCIAL, files_with_decoder
from maekit.weights.passport import Passport
from maekit.weights.report import KeyReport
from maekit.weights.sources import gather


def main(source: str, config: InfoConfig) -> int:
    """Print what is known of a source of weights, as a table or as JSON.

    Raises:
        UserError: no such source, or one of no known kind.
    """
    facts = collect(source, config)
    if config.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = make_console()
    model, uses = facts["model"], facts["can"]
    rows = [
        ("kind", facts["what"] + (f" ({facts['layout']} layout)" if facts["layout"] != "maekit" else "")),
        ("architecture", architecture(facts)),
        ("input", f"{by(model['img_size'])} px, {model['in_chans']} channels, patches of {model['patch_size']} px: "
                  f"{by(facts['grid'])}; {model['pos_embed']} positions"),
        ("decoder", decoder(facts)),
        ("parameters", f"encoder {facts['parameters']['encoder']:,}, decoder {facts['parameters']['decoder']:,}"),
        ("mean, std", f"{spaced(facts['mean'])}; {spaced(facts['std'])}" if facts["mean"] else "not in the file"),
        ("trained", trained(facts)),
        ("licence", facts["license"]),
        ("can be used to", ", ".join(name for name, can in uses.items() if can)),
    ]  # fmt: skip
    rows += [("cannot", text) for text in facts["cannot"]]
    rows += [(f"must be said {number}", need) for number, need in enumerate(facts["needs"], 1)]
    if facts["keys"]["loaded"]:
        rows += [("keys" if number == 0 else " ", line) for number, line in enumerate(facts["keys"]["summary"])]
    print_settings(console, escape(source), dict(rows))
    if NON_COMMERCIAL.search(facts["license"]):
        console.print("[yellow]warning:[/yellow] these weights, and all that is derived from them, are non-commercial")
    console.print(f"next: {facts['next']}", soft_wrap=True, markup=False)
    return 0


def collect(source: str, config: InfoConfig) -> dict[str, Any]:
    """All facts of a source, in plain values."""
    labelled: Passport | None = None
    if source.startswith("random:"):
        passport, sizes, report, what, needs = random_source(source, config)
    else:
        material = gather(source, config)
        passport, report, what, needs = material.passport, material.report, material.what, material.needs
        labelled = material.labelled
        sizes = {room: count(material.state, room) for room in ("encoder", "decoder")}
        report.loaded = report.loaded or [name for name in material.state if name not in report.missing]
    is_random = report.layout == "random"
    has_decoder = passport.kind == "mae"
    can_reconstruct = has_decoder and not is_random
    classifies = labelled is not None and labelled.kind == "classifier"
    segments = labelled is not None and labelled.kind == "segmenter"
    model = dataclasses.asdict(passport.model)
    model |= {"img_size": list(passport.model.size_hw)}
    cannot = [] if can_reconstruct else [f"reconstruct: it has no trained decoder; {decoder_hint(passport)}"]
    shown = shlex.quote(source) + given_flags(config) + "".join(f" {placeholder(need)}" for need in needs)
    return {
        "source": source, "kind": labelled.kind if labelled else passport.kind, "layout": report.layout,
        "what": what, "model": model,
        "grid": list(passport.grid), "eps": passport.eps, "parameters": sizes,
        "target": passport.model.target if has_decoder and not any("--target" in need for need in needs) else None,
        "mask_ratio": passport.model.mask_ratio, "epochs": passport.epochs, "steps": passport.steps,
        "mean": list(passport.mean), "std": list(passport.std), "data": passport.data,
        "fingerprint": passport.fingerprint, "recipe": passport.recipe, "license": passport.weights_license,
        "origin": passport.origin, "versions": passport.versions,
        "classes": list(labelled.classes) if labelled else [],
        "can": {"classify": classifies, "segment": segments, "probe": True, "fine-tune": True,
                "start a pretraining": not is_random, "reconstruct": can_reconstruct},
        "cannot": cannot, "needs": needs,
        "keys": {"loaded": len(report.loaded), "renamed": len(report.renamed), "resized": report.resized,
                 "missing": report.missing, "unused": report.unused, "notes": report.notes,
                 "summary": report.summary()},
        "next": (
            f"maekit predict {shown} --data FOLDER" if classifies
            else f"maekit segment {shown} --predict IMAGES --out DIR" if segments
            else f"maekit reconstruct {shown} --image photo.jpg" if can_reconstruct
            else f"maekit probe {shown} --data FOLDER"
        ),
    }  # fmt: skip


def random_source(source: str, config: InfoConfig) -> tuple[Passport, dict[str, int], KeyReport, str, list[str]]:
    """A model that has no file: built without memory to count it."""
    changes = {name: getattr(config, name) for name in ("img_size", "patch_size", "in_chans", "num_heads")}
    named = ModelConfig(
        model=source.removeprefix("random:"), **{key: value for key, value in changes.items() if value is not None}
    )
    with torch.device("meta"):
        model = MaskedAutoencoder(named, [0.5] * named.in_chans, [0.5] * named.in_chans)
    state = model.state_dict()
    passport = Passport(model=model.config, mean=(), std=(), grid=model.grid_hw, weights_license="none: not trained")
    sizes = {room: count(state, room) for room in ("encoder", "decoder")}
    return passport, sizes, KeyReport(source, "random"), "untrained encoder and decoder", []


def given_flags(config: InfoConfig) -> str:
    """What was said here and must be said again to the next command."""
    words = []
    for field in dataclasses.fields(SourceConfig):
        value = getattr(config, field.name)
        if value is True:
            words.append(f" --{flag(field.name)}")
        elif value not in (None, False):
            values = value if isinstance(value, tuple) else (value,)
            words.append(f" --{flag(field.name)} {' '.join(map(str, values))}")
    return "".join(words)


def placeholder(need: str) -> str:
    """The flag of what must be said, with a word for its value."""
    values = {
        "--num-heads": "N",
        "--decoder-heads": "N",
        "--target": "TARGET",
        "--mean": "... --std ...",
        "--grid": "H W",
    }
    name = need.split()[0]
    return f"{name} {values.get(name, '...')}"


def count(state: dict[str, torch.Tensor], room: str) -> int:
    """Numbers in the tensors of the encoder or the decoder, fixed positions included."""
    return sum(value.numel() for name, value in state.items() if name.startswith(f"{room}."))


def decoder_hint(passport: Passport) -> str:
    """Which file has one."""
    return files_with_decoder(passport.model.embed_dim)


def architecture(facts: dict[str, Any]) -> str:
    """The encoder in one line."""
    model = facts["model"]
    heads = f"{model['num_heads']} heads" if model["num_heads"] else "heads unknown"
    tokens = ["a class token"] if model["class_token"] else []
    tokens += [f"{model['reg_tokens']} registers"] if model["reg_tokens"] else []
    heads += f" of {model['head_dim']}" if model["head_dim"] else ""
    twice = " with GELU after both layers" if model["mlp_act"] == "both" else ""
    size = f"width {model['embed_dim']}, {model['depth']} blocks, {heads}, MLP x{model['mlp_ratio']:g}{twice}"
    return f"{model['model']}: {size}, {' and '.join(tokens) or 'no class token'}, LayerNorm eps {facts['eps']:g}"


def decoder(facts: dict[str, Any]) -> str:
    """The decoder in one line."""
    model = facts["model"]
    if facts["kind"] != "mae":
        return "none that is trained"
    heads = (
        "heads unknown"
        if any("--decoder-heads" in one for one in facts["needs"])
        else f"{model['decoder_heads']} heads"
    )
    target = facts["target"] or "target unknown"
    kind = "" if model["decoder"] == "self" else f"{model['decoder']}, "
    size = f"{kind}width {model['decoder_dim']}, {model['decoder_depth']} blocks, {heads}"
    return f"{size}; predicts {target}, {model['mask']} masks of {100 * model['mask_ratio']:g} %"


def trained(facts: dict[str, Any]) -> str:
    """Where the weights come from in one line."""
    if facts["layout"] == "random":
        return "not at all"
    parts = [f"{facts['epochs']:.4g} epochs" if facts["epochs"] else "epochs unknown"]
    parts += [f"{facts['steps']:,} steps"] if facts["steps"] else []
    parts += [f"on {facts['data']}"] if facts["data"] else []
    parts += [f"data fingerprint {facts['fingerprint'][:12]}"] if facts["fingerprint"] else []
    parts += [f"recipe {facts['recipe']}"] if facts["recipe"] else []
    parts += [f"from {facts['origin']}"] if facts["origin"] else []
    return ", ".join(parts)


def by(pair: list[int]) -> str:
    """Height and width as they are read aloud."""
    return f"{pair[0]} x {pair[1]}"


def spaced(values: list[float]) -> str:
    """A few numbers, and no more than a line holds."""
    return " ".join(f"{value:.4g}" for value in values[:6]) + (" ..." if len(values) > 6 else "")
