"""One run, one writer: RUN/lock is held by `flock` for as long as the process trains, so that a crash cannot leave it.

The system lets go of the lock when the process ends, however it ends; the file itself stays and says nothing. Its text
(who holds it) is for the message to the one that comes second. Of several processes of one run only the first takes it:
a refusal ends that one, and the launcher ends the others.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from maekit.config import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: no run begins there, but its files are read
    fcntl = None  # type: ignore[assignment]

FILE = "lock"
UNBORN = ".config.json.tmp"
"""All that a run leaves beside its lock when it is killed in the instant in which it writes its first file."""
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_held: dict[str, int] = {}
"""Real path of each folder whose lock this process holds, with the open file's number."""
_watching_forks: list[int] = []

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def take(out: Path, fresh: bool = False) -> None:
    """Hold the lock of a run's folder until `letting_go` returns or the process ends; taking it again does nothing.

    With `fresh` the folder must hold nothing but the lock: another run may have begun and ended since it was looked at.

    Raises:
        UserError: another process trains in this folder (it is named), or the folder cannot be written, or Windows.
    """
    if platform.system() == "Windows":
        raise UserError(
            "maekit does not train on Windows, which can neither make a folder's names durable nor lock a run as its "
            "promises need: take WSL, Linux or macOS (nothing but training needs them)"
        )
    key = os.path.realpath(out)
    if fcntl is None or os.environ.get("RANK", "0") != "0" or key in _held:
        return
    try:
        handle = _open(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}): name another folder by --out") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while not _is_current(handle, out):  # the holder before us removed it, with a run that never began
            os.close(handle)
            handle = _open(out)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UserError(
            f"{out}: {holder} is training in this folder; wait for it, stop it, or name another folder by --out"
        ) from None
    except OSError as error:
        os.close(handle)
        if error.errno not in _NO_LOCKS_HERE:
            raise
        warnings.warn(
            f"{out}: this file system has no locks: see to it that only one process trains here", stacklevel=2
        )
        return
    if not _watching_forks:
        os.register_at_fork(after_in_child=_forget)
        _watching_forks.append(os.getpid())
    _held[key] = handle
    if fresh and not _is_bare(out):
        release()
        raise UserError(f"--out {out}: another run has just begun in it; maekit resume {out} continues that one")
    _say(handle, f"process {os.getpid()} on {_host()}")


def named_in(text: str) -> str:
    """Who holds a lock, by the text in it; empty for another text, or a process of this host that is gone."""
    match = re.fullmatch(r"process (\d{1,9}) on (.{1,120})", text.strip())
    if match is None:
        return ""
    if match[2] == _host():
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            return ""
        except (OSError, OverflowError):
            pass
    return match[0]


def _host() -> str:
    return platform.node() or "this host"


def release() -> None:
    """Let go of every lock that this process holds; the file stays, empty, but in a folder where no run has begun."""
    while _held:
        key, handle = _held.popitem()
        _say(handle, "")
        with suppress(OSError):
            if _is_bare(Path(key)):
                for name in os.listdir(key):
                    os.unlink(os.path.join(key, name))
                os.rmdir(key)
        os.close(handle)


def letting_go(job: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a job give back the locks that it took when it ends: a notebook lives on after its run."""

    @functools.wraps(job)
    def run(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        try:
            return job(*arguments, **named)
        finally:
            release()

    return run


def is_free(out: Path) -> bool:
    """Whether a new run may begin in a folder: it does not exist, or holds nothing but a lock."""
    return not out.exists() or (out.is_dir() and _is_bare(out))


def _is_bare(out: Path) -> bool:
    return all(path.name in (FILE, UNBORN) for path in out.iterdir())


def _open(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    return os.open(out / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _is_current(handle: int, out: Path) -> bool:
    """Whether the open file is still the one that others would find under the lock's name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(out / FILE))
    except FileNotFoundError:
        return False


def _say(handle: int, text: str) -> None:
    """Write who holds the lock; on a full disk the lock holds without it."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _forget() -> None:
    """In a forked child: an open copy would keep the lock for a loader worker that outlives a killed run by seconds."""
    while _held:
        os.close(_held.popitem()[1])
