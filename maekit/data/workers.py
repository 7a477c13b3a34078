"""The processes that decode images: how many, and how each one begins."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from maekit.runtime import Choice


def choose_workers(requested: int | None, local_processes: int) -> Choice[int]:
    """How many processes decode images for each training process."""
    if requested is not None:
        return Choice(requested, "as asked for")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, min(16, cores // local_processes))
    return Choice(share, f"{cores} cores for {local_processes} process{'es' if local_processes > 1 else ''}")


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
