"""Tensors out of files that strangers wrote: safetensors, and torch.save's archives by the unpickler for weights only.

Nothing in such a file is believed before it is checked, and no code in it is run: there is no flag that changes this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maekit.config import UserError
from maekit.weights.layouts import State

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
"""Suffixes of what torch.save and its kin write."""
MAX_HEADER_BYTES = 32 << 20
"""A larger safetensors header is refused; ViT-H has 60 kB."""
MAX_TENSORS = 100_000
"""Tensors of one file: a hundred times what the largest model has."""
MAX_JSON_BYTES = 16 << 20
_PICKLE_MAGICS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Where training scripts put the weights in what they save, the first that is there."""
_FACTS = {"epoch": (int,), "norm_pix_loss": (bool,), "mask_ratio": (int, float), "model": (str,)}
_HOW = (
    "ask its author for a .safetensors file; or, where you trust it, take the weights out with what wrote it: "
    "x = torch.load(FILE, weights_only=False); torch.save(x['model'], NEW), with x['state_dict'] of Lightning and "
    "mmengine, x.state_dict() of a whole module"
)


@dataclass
class Raw:
    """What a file holds: tensors by their names there, and the few plain values beside them."""

    tensors: State
    metadata: dict[str, str] = field(default_factory=dict)
    """A safetensors header's entries."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers and switches of a training checkpoint: epoch, norm_pix_loss, mask_ratio; `wrapped` by which keys."""


def is_pickle(path: Path) -> bool:
    """Whether the first bytes are those of torch.save or pickle; nothing is read further.

    Raises:
        UserError: not a plain file, one that cannot be read, or a safetensors header that is too large.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a plain file")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # A safetensors header whose length has the bytes of a pickle is told apart by the brace that follows it.
    if (head.startswith(_PICKLE_MAGICS) and head[8:] != b"{") or (path.suffix.lower() in PICKLES and head[8:] != b"{"):
        return True
    if len(head) == 9 and (header := int.from_bytes(head[:8], "little")) > MAX_HEADER_BYTES:
        raise UserError(f"{path}: not a readable safetensors file (a header of {header:,} bytes)")
    return False


def read(path: Path) -> Raw:
    """Every tensor of a weights file, in the file's own names and types.

    Raises:
        UserError: no weights file, a damaged one, or one that holds more than weights.
    """
    raw = _read_pickle(path) if is_pickle(path) else _read_safetensors(path)
    if not raw.tensors:
        raise UserError(f"{path}: no weights in this file")
    for name, value in raw.tensors.items():
        _check_tensor(path, name, value)
    claimed = sum(value.numel() * value.element_size() for value in raw.tensors.values())
    if claimed > 4 * path.stat().st_size + (1 << 20):  # tensors may share numbers, but not all of them
        raise UserError(f"{path}: its tensors claim {claimed:,} bytes, far more than the file holds")
    return raw


@contextlib.contextmanager
def open_once(path: Path) -> Iterator[Any]:
    """A safetensors file for reading, which a run that trains may replace meanwhile: header and data are of one file.

    safetensors opens a file by its name twice, for the header and for the data; the name of an open handle always
    leads to the same file. Systems without such names do not let an open file be replaced.
    """
    with path.open("rb") as handle:
        same = Path(f"/dev/fd/{handle.fileno()}")
        with safe_open(same if same.exists() else path, framework="pt") as file:
            yield file


def _read_safetensors(path: Path) -> Raw:
    try:
        with open_once(path) as file:
            return Raw({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from None


def _read_pickle(path: Path) -> Raw:
    """The weights in torch.save's file; argparse's Namespace is let pass, as training scripts put theirs beside them.

    It cannot run anything: the unpickler makes an empty one and fills its attributes with what it has already let
    pass. Only numbers and switches are read from it, by exact type.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except UserError:
        raise
    except Exception as error:  # an unpickler fed with anything raises anything
        names = re.findall(r"(?:GLOBAL|Unsupported global:|global) ([\w.]+)", str(error))
        if names and "nsupported" in str(error):
            what = f"looks like a pickle with more than weights in it ({names[0][:80]}), which can run code when read"
        elif path.suffix.lower() in PICKLES or zipped:
            what = f"looks like a pickle, but not one that holds weights alone ({one_line(error)[:120]})"
        else:
            what = "not a readable safetensors file, and no weights-only pickle either"
        raise UserError(f"{path}: {what}: it was not loaded; {_HOW}") from None
    facts: dict[str, Any] = {}
    while isinstance(content, dict):
        _collect(content, facts)
        inner = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        facts["wrapped"] = [*facts.get("wrapped", []), inner]
        if len(facts["wrapped"]) > len(_WRAPPERS):
            break
        content = content[inner]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the weights of a model by their names")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return Raw(tensors, facts=facts)


def _collect(content: dict[Any, Any], facts: dict[str, Any]) -> None:
    """Numbers and switches of a checkpoint and of the arguments in it, by exact type."""
    arguments = content.get("args")
    for place in (content, vars(arguments) if type(arguments) is argparse.Namespace else arguments):
        if isinstance(place, dict):
            facts |= {name: place[name] for name, kinds in _FACTS.items() if type(place.get(name)) in kinds}


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is: torch.save stores its records as they are."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MAX_TENSORS or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{path}: looks like a pickle, but not one that torch.save wrote (it is compressed)")


def _check_tensor(path: Path, name: str, value: Tensor) -> None:
    """Refuse what is no plain block of numbers; a tensor may claim to be larger than its storage by repeating it."""
    shown = ascii(name)[1:-1][:100]
    if not name.isprintable() or len(name) > 500:
        raise UserError(f"{path}: a tensor's name is not printable ({shown})")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{path}: {shown} is no dense tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: {shown} claims {value.numel():,} numbers, more than the file holds")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        UserError: not a plain file, or not a JSON object.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a plain file")
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


_PHOTOGRAPHS, _LOOKED_AT = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}, 1000
"""Suffixes by which a folder of images is known, among so many of its files and folders."""


def weights_in(folder: Path) -> Path:
    """The one weights file of a folder that Hugging Face or timm wrote.

    Raises:
        UserError: none, or weights in several files.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
        if (folder / f"{name}.index.json").exists():
            raise UserError(f"{folder}: its weights are in several files; save them again with max_shard_size='50GB'")
    hint, is_run = "", (folder / "config.json").exists()
    if not is_run and any(path.suffix.lower() in _PHOTOGRAPHS for path in islice(folder.rglob("*"), _LOOKED_AT)):
        hint = "; it holds images, which --data names: what stands first is a run or a file of weights"
    raise UserError(f"{folder}: not a run: no model.safetensors or pytorch_model.bin in this folder{hint}")


def one_line(error: Exception) -> str:
    """A library's message, short, printable and on one line."""
    text = " ".join(str(error).split())[:300]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
