"""Every source of weights, from its name to its tensors: runs, files and folders of any layout, timm's and hub names.

Maekit's own files say in a passport what they are; all others are identified by their keys (foreign.py). No model is
built here, so that `maekit info` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError

from maekit.config import SourceConfig, UserError, did_you_mean
from maekit.hub import offline_at_once
from maekit.models.encoder import EPS, plain_vit
from maekit.weights import facts, heads, hub
from maekit.weights.files import PICKLES, Raw, is_pickle, one_line, open_once, read, read_json, weights_in
from maekit.weights.foreign import Hints, Material, identify
from maekit.weights.passport import Passport
from maekit.weights.report import KeyReport
from maekit.weights.resize import adapt

Shapes = dict[str, tuple[int, ...]]
WEIGHTS_FILE = "model.safetensors"
FORMS = "a run's folder, a weights file or folder of a known layout, timm:NAME, hub:OWNER/NAME, or random:MODEL"


def gather(source: str, given: SourceConfig) -> Material:
    """Tensors under our names and a passport, at the wanted sizes; nothing is built.

    Raises:
        UserError: no such source, one of no known kind, or claims that contradict it.
    """
    if source.startswith("timm:") and not source.startswith("timm:local-dir:"):
        found = _from_timm(source.removeprefix("timm:"), given)
    elif source.startswith("hub:"):
        found = _from_path(hub.fetch(source), source, given)
    else:
        name = source.removeprefix("timm:").removeprefix("local-dir:")
        found = _from_path(Path(name).expanduser(), source, given)
    if facts.NON_COMMERCIAL.search(found.passport.weights_license):
        found.report.license = found.passport.weights_license
    if given.crop_pct is not None:
        if not 0 < given.crop_pct <= 1:
            raise UserError(f"--crop-pct {given.crop_pct:g}: must lie above 0 and at most at 1")
        found.passport = dataclasses.replace(found.passport, crop_pct=given.crop_pct)
        if found.labelled is not None:
            found.labelled = dataclasses.replace(found.labelled, crop_pct=given.crop_pct)
    if not any("--grid" in need for need in found.needs) and found.passport.mean and found.passport.std:
        found.state, found.passport, resized, anew = adapt(
            found.state, found.passport, img_size=given.img_size, patch_size=given.patch_size, in_chans=given.in_chans,
            mean=given.mean, std=given.std,
        )  # fmt: skip
        found.report.resized += resized
        found.report.missing += anew
        if anew:
            found.passport.kind = "encoder"
    return found


def _from_path(path: Path, source: str, given: SourceConfig) -> Material:
    """A run, a file, or a folder that Hugging Face or timm wrote."""
    if not path.exists():
        hint = f"; on the hub: hub:{source}" if source.count("/") == 1 and source[0] not in "./~" else ""
        raise UserError(f"{source}: no such run or file ({FORMS}){hint}")
    file = weights_in(path) if path.is_dir() else path
    if not is_pickle(file):
        own = read_own(file)
        if own is not None:
            return _own_material(*own, KeyReport(source, "maekit"), given)
    folder = file.parent if file.name in ("model.safetensors", "pytorch_model.bin") else None
    hints = _hints(folder) if folder and (folder / "config.json").is_file() else Hints()
    raw = read(file)
    found = identify(raw, source, file.name if folder is None else folder.name, given, hints)
    beside = read_json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    heads.find_foreign(found, raw.tensors, beside.get("global_pool"), hints.crop_pct)
    return found


def _own_material(passport: Passport, tensors: dict[str, Any], report: KeyReport, given: SourceConfig) -> Material:
    """Our own weights: the passport knows all, and what is said besides must agree with it."""
    model = passport.model
    known: dict[str, tuple[Any, Any]] = {
        "--model": (given.model, model.model), "--num-heads": (given.num_heads, model.num_heads),
        "--decoder-heads": (given.decoder_heads, model.decoder_heads), "--target": (given.target, model.target),
        "--grid": (given.grid, passport.grid),
    }  # fmt: skip
    for flag, said_values, own in (("--mean", given.mean, passport.mean), ("--std", given.std, passport.std)):
        if said_values is not None and (given.in_chans in (None, model.in_chans) or len(said_values) != given.in_chans):
            known[flag] = (said_values, own)
    wrong = [
        f"{flag} {said}: the passport of {report.source} says {holds}; leave the flag away"
        for flag, (said, holds) in known.items()
        if said is not None and said != holds
    ]
    if wrong:
        raise UserError(*wrong)
    if passport.kind in heads.KINDS:
        return heads.part(passport, tensors, report)
    if given.encoder_only and passport.kind == "mae":
        report.unused += [name for name in tensors if name.startswith("decoder.")]
        tensors = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}
        passport = dataclasses.replace(passport, kind="encoder")
    what = "encoder and decoder" if passport.kind == "mae" else "encoder"
    return Material(passport, tensors, report, what)


def read_own(path: Path) -> tuple[Passport, dict[str, Any]] | None:
    """Passport and weights from one handle, since a run that trains may replace the file between two openings.

    None where a safetensors file has no passport and its keys are not ours.
    """
    try:
        with open_once(path) as file:
            names = file.keys()
            if "maekit" not in (file.metadata() or {}) and not any(name.startswith("decoder.embed.") for name in names):
                return None
            passport, shapes = _header(file, path)
            if passport.kind not in ("mae", "encoder", *heads.KINDS):
                raise UserError(f"{path}: holds a {passport.kind!r}, not a masked autoencoder")
            check_claims(passport, shapes, str(path))
            return passport, {name: file.get_tensor(name) for name in names}
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


def _header(file: Any, path: Path) -> tuple[Passport, Shapes]:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return Passport.from_metadata(file.metadata(), str(path)), shapes


def read_passport(path: Path) -> Passport:
    """The passport in a safetensors header; the weights are not read.

    Raises:
        UserError: not a safetensors file, or one without a passport.
    """
    return read_header(path)[0]


def read_header(path: Path) -> tuple[Passport, Shapes]:
    """The passport, and the shape of each tensor; the weights are not read, so this costs the same for any size.

    Raises:
        UserError: not a safetensors file, or one without a passport, or with one that cannot be true.
    """
    if is_pickle(path):
        raise UserError(f"{path}: looks like a pickle (torch.save), not a .safetensors file with a passport")
    try:
        with open_once(path) as file:
            return _header(file, path)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


def check_claims(passport: Passport, shapes: Shapes, source: str) -> None:
    """Refuse a passport whose sizes are not those of the tensors beside it, before a model of those sizes is built.

    safetensors has checked that the file is as long as its tensors, so what is built is bounded by the file's size.
    """
    config = passport.model
    has_decoder = passport.kind == "mae" or "decoder.mask_token" in shapes
    rooms = [("", config.depth, "encoder.blocks.")]
    rooms += [("decoder-", config.decoder_depth, "decoder.blocks.")] if has_decoder else []
    claims: dict[str, tuple[Any, Any]] = {
        f"--{room}depth": (claimed, sum(name.endswith(".norm1.weight") and name.startswith(prefix) for name in shapes))
        for room, claimed, prefix in rooms
    }
    patch = shapes.get("encoder.patch_embed.proj.weight", ())
    if has_decoder:
        wide = "decoder.norm.weight" if config.decoder == "flat" else "decoder.mask_token"
        claims["--decoder-dim"] = (config.decoder_dim, math.prod(shapes.get(wide, (0,))))
    if config.patch_size is not None and config.embed_dim is not None:
        kernel = (config.embed_dim, config.in_chans, config.patch_size, config.patch_size)
        claims["--embed-dim, --in-chans, --patch-size"] = (kernel, patch)
        grid = tuple(side // config.patch_size for side in config.size_hw)
        table = "decoder.pos_embed" if has_decoder and config.decoder != "flat" else "encoder.pos_embed"
        places = shapes.get(table, (0, 0))[1:2]
        if not places or not math.prod(grid) <= places[0] <= math.prod(grid) + 1 + (config.reg_tokens or 0):
            raise UserError(
                f"{source}, passport: {grid[0]} x {grid[1]} patches, but the weights have {places} positions"
            )
    found = [
        f"{source}, passport: {flag} {claimed}, but the weights have {held}"
        for flag, (claimed, held) in claims.items()
        if claimed is not None and held != claimed
    ]
    if found:
        raise UserError(*found)


# ---- what stands beside the weights, and where they are fetched from ----


def _hints(folder: Path) -> Hints:
    """What a Hugging Face or timm config.json says; every value is checked, since it may say anything."""
    values = read_json(folder / "config.json")
    if isinstance(values.get("architecture"), str):
        return _timm_hints(values["architecture"], values.get("pretrained_cfg"), values.get("model_args"))
    kind = values.get("model_type")
    if kind is None:
        return Hints()
    if kind not in ("vit_mae", "vit"):
        raise UserError(f"{folder}: a Hugging Face model of type {short(kind)}; vit_mae and vit are known")
    wrong = [
        f"{folder}: {name} {short(values[name])} in config.json; only {expected!r} is known here"
        for name, expected in (("hidden_act", "gelu"), ("qkv_bias", True))
        if values.get(name, expected) != expected
    ]
    if wrong:
        raise UserError(*wrong)
    hints = Hints(
        num_heads=_whole(values, "num_attention_heads", folder), what=f"Hugging Face {kind}",
        eps=_number(values, "layer_norm_eps", folder) or 1e-12, mask_ratio=_number(values, "mask_ratio", folder),
    )  # fmt: skip
    if kind == "vit_mae":
        hints.decoder_heads = _whole(values, "decoder_num_attention_heads", folder) or 16
        hints.target = "norm-pixels" if values.get("norm_pix_loss", False) is True else "pixels"
    if not 0 < hints.eps < 1:
        raise UserError(f"{folder}: layer_norm_eps {hints.eps:g} in config.json")
    if hints.eps != EPS:
        hints.notes.append(f"layer_norm_eps is {hints.eps:g}, as its config says (the paper's code: 1e-06)")
    if str(values.get("_name_or_path", "")).startswith("facebook/vit-mae") or "vit-mae" in folder.name:
        hints.license, hints.data = facts.META_LICENSE, "ImageNet-1k"
    hints.grid = _grid(values)
    if (folder / "preprocessor_config.json").is_file():
        beside = read_json(folder / "preprocessor_config.json")
        hints.mean, hints.std = _floats(beside.get("image_mean")), _floats(beside.get("image_std"))
        hints.interpolation = "bilinear" if beside.get("resample") == 2 else "bicubic"  # Pillow's number
        hints.crop_pct = _processors_crop(beside)
    return hints


def short(value: Any) -> str:
    """A stranger's value as it can be printed; numbers of thousands of digits cannot even be formatted."""
    return ascii(value)[:60] if not isinstance(value, int) or abs(value) < 1 << 63 else "a number beyond 64 bits"


def _grid(values: dict[str, Any]) -> tuple[int, int] | None:
    """Patches along height and width by image_size and patch_size, one number or two each."""
    sides = []
    for name, default in (("image_size", 224), ("patch_size", 16)):
        value = values.get(name, default)
        pair = [value, value] if type(value) is int else value
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(one) is int and 0 < one < 1 << 20 for one in pair)
        ):
            return None
        sides.append(pair)
    return sides[0][0] // sides[1][0], sides[0][1] // sides[1][1]


def _whole(values: dict[str, Any], name: str, folder: Path) -> int | None:
    found = values.get(name)
    if found is not None and (type(found) is not int or not 0 < found < 1 << 16):
        raise UserError(f"{folder}: {name} {short(found)} in config.json is no count")
    return found


def _number(values: dict[str, Any], name: str, folder: Path) -> float | None:
    found = values.get(name)
    if found is not None and (type(found) not in (int, float) or not abs(found) < 1e300):
        raise UserError(f"{folder}: {name} {short(found)} in config.json is no number")
    return None if found is None else float(found)


def _floats(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, list | tuple) or not 0 < len(values) <= 4096:
        return None
    return (
        tuple(float(one) for one in values)
        if all(type(one) in (int, float) and abs(one) < 1e300 for one in values)
        else None
    )


def _share(value: Any) -> float | None:
    """A stranger's share above 0 and up to 1."""
    return float(value) if type(value) in (int, float) and 0 < value <= 1 else None


def _processors_crop(beside: dict[str, Any]) -> float | None:
    """Share of the shorter side that an image processor of transformers cuts out; None where it cuts nothing."""
    size, crop = beside.get("size"), beside.get("crop_size")
    if beside.get("do_center_crop") is not True or not isinstance(size, dict) or not isinstance(crop, dict):
        return None
    edges = size.get("shortest_edge"), crop.get("height"), crop.get("width")
    if not all(type(edge) is int and 0 < edge < 1 << 20 for edge in edges):
        return None
    return _share(min(crop["height"], crop["width"]) / size["shortest_edge"])


def _timm_hints(architecture: str, pretrained: Any, arguments: Any = None) -> Hints:
    """What timm says of one of its models."""
    name = architecture.split(".")[0]
    if not architecture.isprintable() or len(architecture) > 200:
        raise UserError(f"{short(architecture)} in config.json is no name of a model")
    plain_vit(name)
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    arguments = arguments if isinstance(arguments, dict) else {}
    license_ = pretrained.get("license")
    said = isinstance(license_, str) and license_.isprintable() and len(license_) < 200
    return Hints(
        model=name, num_heads=_whole(arguments, "num_heads", Path(name)), mean=_floats(pretrained.get("mean")),
        std=_floats(pretrained.get("std")), what=f"timm {architecture}",
        interpolation="bilinear" if pretrained.get("interpolation") == "bilinear" else "bicubic",
        crop_pct=_share(pretrained.get("crop_pct")),
        license=str(license_) if said else facts.UNKNOWN_LICENSE,
    )  # fmt: skip


def _from_timm(name: str, given: SourceConfig) -> Material:
    """A pretrained model of timm's by name, from its cache or the hub."""
    plain_vit(name.split(".")[0])
    known = timm.list_pretrained(f"{name.split('.')[0]}*")
    if not timm.is_model_pretrained(name):
        raise UserError(f"timm:{name}: timm has no pretrained weights of this name; {did_you_mean(name, known)}")
    try:
        with offline_at_once():
            model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub, the network and the disk raise what they like
        raise UserError(
            f"timm:{name}: cannot be fetched ({one_line(error)[:160]}): without a network, fill Hugging Face's cache "
            f"where there is one (HF_HOME), or give the file itself with --model {name.split('.')[0]}"
        ) from None
    hints = _timm_hints(name.split(".")[0], model.pretrained_cfg)
    tag = model.pretrained_cfg.get("tag") or ""
    hints.what = f"timm {name.split('.')[0]}" + (f".{tag}" if tag else "")
    grid = tuple(model.patch_embed.grid_size)
    hints.grid = (grid[0], grid[1])
    return identify(Raw(dict(model.state_dict())), f"timm:{name}", hints.what, given, hints)


__all__ = ["FORMS", "PICKLES", "WEIGHTS_FILE", "check_claims", "gather", "read_header", "read_own", "read_passport"]
