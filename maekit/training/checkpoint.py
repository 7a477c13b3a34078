"""Atomic, exact checkpoints: a folder of safetensors and JSON that appears whole or not at all; nothing is pickled.

    checkpoints/step-000123/
        model.safetensors       weights, with the passport in the header
        optimizer.safetensors   "step/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"; "none/NAME": no state yet
        rng.safetensors         "torch_cpu/rank0", "torch_cuda/rank0": states of generators, uint8
        state.json              position of the run: any JSON values
        manifest.json           format version, step, size in bytes and sha256 of the four files above

A save builds `.step-000123.tmp-PID@HOST` beside it, syncs it to the disk, reads it back and only then renames it. An
older folder of the same step waits as `.step-000123.old-PID@HOST` for the instant between two renames: `latest` finds
it there too. Only one process (rank 0) may save into a folder. Rename is atomic on local disks and on NFS.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import reprlib
import shutil
import stat
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maekit.config import UserError

Tensors = dict[str, Tensor]
VERSION = 1
MODEL, OPTIMIZER, RNG, STATE, MANIFEST = FILES = (
    "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json",
)  # fmt: skip
MAX_JSON_BYTES = 16 << 20
"""A larger state.json or manifest.json is refused; real ones hold kilobytes."""

_short = reprlib.Repr()
_short.maxother = _short.maxstring = _short.maxlong = 80
_STEP_NAME = re.compile(r"step-(\d{6,})")
_OWNER = r"([1-9]\d{0,8})@([A-Za-z0-9_-]+)"
_HIDDEN_NAME = re.compile(rf"\.step-(\d{{6,}})\.(tmp|old)-{_OWNER}")


@dataclass
class Checkpoint:
    """All that a run needs to continue exactly."""

    model: Tensors
    """Weights and buffers by name; tied ones are stored once under each of their names."""
    optimizer: Tensors
    """From `run_state.optimizer_tensors`."""
    rng: Tensors
    """From `run_state.rng_tensors`, those of all ranks merged."""
    state: dict[str, Any]
    """Position of the run. JSON values: tuples come back as lists, keys as strings, floats to the last bit."""
    model_metadata: dict[str, str] = field(default_factory=dict)
    """Header of model.safetensors: the passport."""


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint of a step, then remove the oldest beyond `keep`; return its folder.

    A failure at any point, a killed process included, leaves the earlier checkpoints as they were, and this one whole
    or absent. The read-back goes through the page cache: it finds faults of software and memory, not of the disk.

    Raises:
        OSError: the disk is full (ENOSPC, found out before anything is written where possible) or fails.
        TypeError: the state holds something that JSON has no form for.
    """
    assert step >= 0 and keep >= 1, f"step {step}, keep {keep}"
    state_json = json.dumps(checkpoint.state, indent=1).encode()
    if len(state_json) > MAX_JSON_BYTES:
        raise UserError(f"the state of a checkpoint has {len(state_json)} bytes; at most {MAX_JSON_BYTES} can be read")
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync_folder(folder.parent)
    _tidy(folder, saving=True)
    _check_space(folder, len(state_json), checkpoint)
    final = folder / f"step-{step:06d}"
    temporary, aside = _hidden(folder, step, "tmp"), _hidden(folder, step, "old")
    try:
        os.mkdir(temporary)
        _write(temporary, step, checkpoint, state_json)
        if final.exists():
            os.rename(final, aside)  # a folder cannot replace one that has files
        os.rename(temporary, final)
        _sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            if aside.exists() and not final.exists():
                os.rename(aside, final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _prune(folder, step, keep)
    return final


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole (checksums), None where there is none, and why newer ones were skipped."""
    if not folder.is_dir():
        return None, []
    _tidy(folder, saving=False)
    candidates = [(step, 1, path) for step, path in _steps(folder)]
    candidates += [(int(match[1]), 0, path) for match, path in _hidden_folders(folder) if match[2] == "old"]
    messages: list[str] = []
    for _, _, path in sorted(candidates, reverse=True):
        problems = verify(path)
        if not problems:
            return path, messages
        messages.append(f"{path.name} skipped: {'; '.join(problems)}")
    return None, messages


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a checkpoint's folder; empty where each file is as it was written."""
    try:
        manifest = _read_json(path / MANIFEST)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {_reason(error)}"]
    if manifest.get("format") != "maekit checkpoint":
        return [f"{MANIFEST}: not the manifest of a maekit checkpoint"]
    if manifest.get("version") != VERSION:
        return [
            f"{MANIFEST}: format version {_short.repr(manifest.get('version'))}, this maekit reads version {VERSION}"
        ]
    step_name = _STEP_NAME.search(path.name)  # a copy may have any other name
    if step_name and manifest.get("step") != int(step_name[1]):
        return [f"{MANIFEST}: belongs to step {_short.repr(manifest.get('step'))}"]
    entries = manifest.get("files")
    if not isinstance(entries, dict) or set(entries) != set(FILES) - {MANIFEST}:
        named = sorted(entries) if isinstance(entries, dict) else entries  # a name is never used as a path
        return [f"{MANIFEST}: must name {', '.join(FILES[:-1])} and nothing else, found {str(named)[:200]}"]
    problems = []
    for name in FILES[:-1]:
        try:
            found = _entry(path / name)
        except OSError as error:
            problems.append(f"{name}: {_reason(error)}")
            continue
        wanted = entries[name] if isinstance(entries[name], dict) else {}
        if found["size"] != wanted.get("size"):
            problems.append(f"{name}: has {found['size']} bytes, the manifest says {_short.repr(wanted.get('size'))}")
        elif found != wanted:
            problems.append(f"{name}: checksum differs from the manifest")
    return problems


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint after verifying it; weights and optimiser state go to `device`, generator states to the CPU.

    Raises:
        UserError: it is not whole, or not a checkpoint.
    """
    if problems := verify(path):
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    try:
        model, metadata = _read_tensors(path / MODEL, device)
        optimizer, _ = _read_tensors(path / OPTIMIZER, device)
        rng, _ = _read_tensors(path / RNG, "cpu")
        return Checkpoint(model, optimizer, rng, _read_json(path / STATE), metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def publish(checkpoint_path: Path, destination: Path) -> None:
    """Put a checkpoint's weights at `destination` (the run's model.safetensors); readers see the old or the new file.

    A hard link where the file system has them, else a copy.
    """
    source = checkpoint_path / MODEL
    prefix = f".{destination.name}.tmp-"
    for path in destination.parent.iterdir():
        owner = re.fullmatch(re.escape(prefix) + _OWNER, path.name)
        if owner and _abandoned(int(owner[1]), owner[2], saving=True):
            path.unlink(missing_ok=True)
    temporary = destination.with_name(f"{prefix}{os.getpid()}@{_host()}")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # no hard links here, or another file system
            shutil.copyfile(source, temporary)
            shutil.copymode(source, temporary)
            _sync_file(temporary)
        os.replace(temporary, destination)
        _sync_folder(destination.parent)
    finally:
        # POSIX: renaming one hard link over another of the same file does nothing and leaves both
        temporary.unlink(missing_ok=True)


# ---- writing ----


def _write(folder: Path, step: int, checkpoint: Checkpoint, state_json: bytes) -> None:
    """Fill a new folder, sync it, and compare what is read back with what is in memory."""
    _write_bytes(folder / STATE, state_json)
    entries = {STATE: _entry(folder / STATE)}
    parts: tuple[tuple[str, Tensors, dict[str, str] | None], ...] = (
        (MODEL, checkpoint.model, checkpoint.model_metadata or None),
        (OPTIMIZER, checkpoint.optimizer, None),
        (RNG, checkpoint.rng, None),
    )
    for name, tensors, metadata in parts:
        _write_tensors(folder / name, tensors, metadata)
        with suppress(OSError):
            shutil.copymode(folder / STATE, folder / name)  # safetensors gives 0600; ours follow the umask
        entries[name] = _entry(folder / name)
    manifest = {"format": "maekit checkpoint", "version": VERSION, "step": step, "files": entries}
    _write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(folder)


def _write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "read back differently from what was written", str(path))


def _write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """Write one safetensors file; on the host this needs a copy of those tensors that are elsewhere or share memory."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        storage = data.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != data.nbytes:
            data = data.clone()  # tied, or a view of something larger: safetensors refuses shared memory
        storages.add(data.untyped_storage().data_ptr())
        plain[name] = data
    try:
        save_file(plain, path, metadata=metadata)
    except SafetensorError as error:  # it hides the system's error number in the text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    _sync_file(path)
    with safe_open(path, framework="pt") as file:
        same = set(file.keys()) == set(plain) and (file.metadata() or None) == metadata
        same = same and all(_bit_equal(file.get_tensor(name), plain[name]) for name in plain)
    if not same:
        raise OSError(errno.EIO, "read back differently from what was written", str(path))


def _bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors hold the same bytes (NaN equals NaN, 0.0 does not equal -0.0)."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _check_space(folder: Path, json_bytes: int, checkpoint: Checkpoint) -> None:
    parts = (checkpoint.model, checkpoint.optimizer, checkpoint.rng)
    # 256 bytes: a tensor's line in the header; the last 10 % leave room for the logs
    needed = 1.1 * (json_bytes + sum(tensor.nbytes + 256 for tensors in parts for tensor in tensors.values()))
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free: free some space, or lower"
        raise OSError(errno.ENOSPC, f"{message} --keep; the earlier checkpoints are untouched", str(folder))


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a folder's names durable; some network file systems cannot, and do it by themselves."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


# ---- reading ----


def _entry(path: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    with _open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size and depth; ValueError otherwise."""
    with _open_plain(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _open_plain(path: Path) -> BufferedReader:
    """Open for reading; anything but a plain file is an OSError, so that a pipe cannot block the reader."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return open(path, "rb")


def _read_tensors(path: Path, device: str | torch.device) -> tuple[Tensors, dict[str, str]]:
    """Copies, so that the file may be changed or removed afterwards; safetensors maps it into memory."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name).to(device, copy=True) for name in names}, file.metadata() or {}


def _reason(error: Exception) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)


# ---- names and leftovers ----


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", platform.node()) or "localhost"


def _hidden(folder: Path, step: int, kind: str) -> Path:
    return folder / f".step-{step:06d}.{kind}-{os.getpid()}@{_host()}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The visible checkpoints with their steps, oldest first."""
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name)))


def _hidden_folders(folder: Path) -> list[tuple[re.Match[str], Path]]:
    return [(match, path) for path in folder.iterdir() if (match := _HIDDEN_NAME.fullmatch(path.name))]


def _tidy(folder: Path, saving: bool) -> None:
    """Remove what dead processes left; who saves also brings back a checkpoint that one of them had put aside."""
    for match, path in _hidden_folders(folder):
        if not _abandoned(int(match[3]), match[4], saving):
            continue
        final = folder / f"step-{match[1]}"
        if match[2] == "tmp" or (saving and final.exists()):
            shutil.rmtree(path, ignore_errors=True)
        elif saving:
            os.rename(path, final)


def _abandoned(pid: int, host: str, saving: bool) -> bool:
    """Whether the process that a temporary name tells of has left it behind.

    A reader cannot see whether a process of another host lives, and leaves that one's files alone; who saves owns
    the folder. Its own number is that of an earlier process (in containers all have the same few), or of an earlier
    save that failed.
    """
    if host != _host() or pid == os.getpid():
        return saving
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.ESRCH  # EPERM: it lives, under another user
    return False


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove the oldest checkpoints, and newer ones that are not whole: the run has gone back behind them.

    Each is first renamed to a temporary name, so that a crash does not leave half of a checkpoint under a good name.
    A failure is a warning, since the new checkpoint stands; the next save tries again.
    """
    older = [path for other, path in _steps(folder) if other < step]
    doomed = older[: max(0, len(older) - (keep - 1))]
    doomed += [path for other, path in _steps(folder) if other > step and verify(path)]
    for path in doomed:
        trash = _hidden(folder, int(path.name.removeprefix("step-")), "tmp")
        try:
            os.rename(path, trash)
            shutil.rmtree(trash)
        except OSError as error:
            warnings.warn(f"{path} could not be removed: {error}", stacklevel=3)
