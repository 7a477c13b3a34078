"""The processes that decode images: how many, how each one begins, and work on a whole part in the order of ids."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from maekit.config import UserError
from maekit.data.parts import Part
from maekit.runtime import Choice

Result = TypeVar("Result")


def choose_workers(requested: int | None, local_processes: int) -> Choice[int]:
    """How many processes decode images for each training process."""
    if requested is not None:
        return Choice(requested, "as asked for")
    cores = available_cores()
    share = max(1, min(16, cores // local_processes))
    return Choice(share, f"{cores} cores for {local_processes} process{'es' if local_processes > 1 else ''}")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_context() -> multiprocessing.context.BaseContext:
    """How processes are started: as Python does it here, but forked from this one where a server would fork them.

    Such a server (on Linux by default from Python 3.14 on) ends at the first SIGTERM to the process group, and takes
    its workers along in the middle of a step; and a worker would have another parent than the one it decodes for.
    """
    method = multiprocessing.get_start_method()
    return multiprocessing.get_context("fork" if method == "forkserver" else method)


def worker_options(workers: int) -> dict[str, Any]:
    """What a DataLoader is told of its processes."""
    context = start_context() if workers else None
    return {"num_workers": workers, "worker_init_fn": WorkerStart(os.getpid()), "multiprocessing_context": context}


class WorkerStart:
    """How a loader worker begins: deaf to stop signals, and never outliving the process that it decodes for.

    Stop signals reach the whole process group, and only the main process may act on them, after its last batch. But
    when that one is killed, nothing else would end its workers: torch's own watch misses a death during their start.
    """

    def __init__(self, trainer: int) -> None:
        self.trainer = trainer

    def __call__(self, _worker: int) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if sys.platform == "linux":
            set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != self.trainer:  # it died before this was set
                os._exit(1)


def in_order(
    part: Part, work: Callable[[Part, range], Result], chunks: Iterable[range], workers: int
) -> Iterator[tuple[range, Result]]:
    """`work` done on each chunk of a part's ids by so many processes (0: this one); results in the order of chunks.

    A few chunks for each process are under way at a time, so memory does not grow with their number.

    Raises:
        UserError: a process died, as the system kills one that takes too much memory.
    """
    if workers == 0:
        yield from ((chunk, work(part, chunk)) for chunk in chunks)
        return
    waiting: deque[tuple[range, Future[Result]]] = deque()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, start_context(), _start, (part, work, os.getpid())) as pool:
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_do, chunk)))
                if len(waiting) > 4 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()  # the pool asks them by SIGTERM, which they ignore, and would wait for ever
            raise UserError(
                f"a process that reads images died near {part.name(done.start)}, perhaps for want of memory: "
                "--workers 0 shows where"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_task: list[Any] = []
"""In a worker process: the part that it reads and what is done with it."""


def _start(part: Part, work: Callable[[Part, range], Any], parent: int) -> None:
    _task[:] = [part, work]
    WorkerStart(parent)(0)


def _do(chunk: range) -> Any:
    part, work = _task
    return work(part, chunk)
