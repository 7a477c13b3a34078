"""Files of one commit of a data set on the hub, by the hub's own client, with one bar for all of them.

The client's own way for many files (snapshot_download) cannot be left before the files that it is at have come whole,
which may be gigabytes after Ctrl-C. So the files are asked for one by one, in threads that nobody waits for.
"""

from __future__ import annotations

import importlib
import inspect
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from maekit.config import UserError
from maekit.hub import client, endpoint
from maekit.terminal import short_size

WORKERS = 8
"""Files at a time, as many as the client takes by itself."""
_ROOM = 1 << 26
"""Bytes of the disk that are left free."""
_PATIENCE = 2.0
"""Seconds for which threads that are told to end are waited for, so that the client can tidy up."""

Say = Callable[[dict[str, int], str], None]


class _Ended(BaseException):
    """Nobody waits for this download any more. No `Exception`, so that the client does not try again."""


class _Shared:
    """What the threads of a download know of it."""

    def __init__(self, files: dict[str, int]) -> None:
        self.waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for path in files:
            self.waiting.put(path)
        self.done = 0
        self.error: BaseException | None = None
        self.ended = False
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count


def download(repo: str, commit: str, files: dict[str, int], say: Say) -> Path:
    """The folder in the hub's cache with these files (path -> bytes) of a data set at a commit.

    `say` is told what is missing, and where it goes, before anything is downloaded. What came whole before an end of
    any kind is not asked for again.

    Raises:
        UserError: no room on the disk; the client's errors otherwise.
    """
    cached = client().try_to_load_from_cache
    held = {path: cached(repo, path, repo_type="dataset", revision=commit) for path in files}
    missing = {path: size for path, size in files.items() if not isinstance(held[path], str)}
    place = str(client().constants.HF_HUB_CACHE)
    say(missing, place)
    if missing:
        _check_room(sum(missing.values()), place, f"--data hub:{repo}")
        shared = _Shared(missing)
        _fetch(repo, commit, shared, missing)
        held |= {path: cached(repo, path, repo_type="dataset", revision=commit) for path in missing}
    path, first = next(iter(held.items()))
    return Path(first).parents[path.count("/")]


def _check_room(size: int, place: str, shown: str) -> None:
    folder = Path(place).expanduser()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size + _ROOM > free:
        raise UserError(
            f"{shown}: {short_size(size)} are to be downloaded, and the disk of the hub's cache has "
            f"{short_size(free)} free ({place}); HF_HOME names another place"
        )


def _fetch(repo: str, commit: str, shared: _Shared, files: dict[str, int]) -> None:
    """All waiting files, in threads; the first error ends all of them, and so does a signal."""
    counts = "tqdm_class" in inspect.signature(client().hf_hub_download).parameters
    more: dict[str, Any] = {"tqdm_class": _counter(shared)} if counts else {}

    def work() -> None:
        while not shared.ended:
            try:
                path = shared.waiting.get_nowait()
                client().hf_hub_download(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint(), **more)
            except queue.Empty:
                return
            except BaseException as error:
                if isinstance(error, RuntimeError):  # of the part of the client that is not Python
                    error = ConnectionError(str(error))
                shared.error = shared.error or error
                shared.ended = True
                return
            if not counts:
                shared.add(files[path])

    # Of several processes on a machine the first does nearly all; where two want the same file, the client's lock lets
    # one of them have it and the other find it.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS if first else 1, len(files)))]
    columns = (
        TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    console, utils = Console(stderr=True, quiet=not first), client().utils
    barred = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        with Progress(
            *columns, console=console, transient=True, disable=console.quiet or not console.is_terminal
        ) as progress:
            bar = progress.add_task("", total=sum(files.values()))
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not shared.ended:
                time.sleep(0.1)
                progress.update(bar, completed=shared.done)
    finally:
        shared.ended = True
        until = time.monotonic() + _PATIENCE
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        if barred:
            utils.enable_progress_bars()
    if shared.error is not None:
        raise shared.error


def _counter(shared: _Shared) -> Any:
    """A bar of the client's that draws nothing: it counts for ours, and ends a download that nobody waits for."""
    bar: Any = importlib.import_module("tqdm.auto").tqdm  # the client needs it too

    class Counter(bar):  # type: ignore[misc]
        monitor_interval = 0  # no thread that watches it

        def __init__(self, *given: Any, **named: Any) -> None:
            named.pop("name", None)
            super().__init__(*given, **{**named, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if shared.ended:
                raise _Ended
            shared.add(int(n or 0))

    return Counter
