"""Stop signals: how a run that is asked to end does so between two steps, on all its processes together."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")


class Stopped(BaseException):
    """A signal ends what is going on. No `Exception`, so that nobody takes it for an error of an image or a kernel."""


class StopRequest:
    """Remembers that a signal asked the run to stop, so that it ends between two steps with a checkpoint.

    The first SIGINT, SIGTERM or SIGUSR1 is remembered, and ends what may be ended in the middle (`patience`); the
    second stops the process at once, as without a handler.
    """

    GRACE = 10.0
    """Seconds that a step which was begun may take to its end, where it must not be cut short at once."""

    def __init__(self) -> None:
        self.number = 0
        self.patience: float | None = 0.0
        """Seconds from the signal to `Stopped`, raised wherever the main thread is. None: the signal is remembered."""
        self._strangers: set[int | None] = set()
        """Child processes that were there before the run."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block, which `Stopped` ends in peace; a stopped block leaves no loader workers.

        A worker ignores the signals; one that hangs in a read would keep this process from ending.
        """
        stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        timed = [signal.SIGALRM] if hasattr(signal, "setitimer") else []
        before = {number: signal.getsignal(number) for number in stops + timed}
        self._strangers = {child.pid for child in multiprocessing.active_children()}
        for number in stops:
            signal.signal(number, self._remember)
        for number in timed:
            signal.signal(number, self._alarm)
        try:
            yield
        except Stopped:
            pass
        except Exception:
            # before the first step's end the processes stop each for itself, and the last may miss the others
            if not self.number or self.patience is None:
                raise
        finally:
            self.patience = None
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.number:
                _kill_children(self._strangers)

    def _remember(self, number: int, _frame: object) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if self.patience is not None:
            self._arm()

    def _arm(self) -> None:
        """Raise `Stopped` when the patience is over; again every second, as a destructor may swallow an exception."""
        assert self.patience is not None
        if not hasattr(signal, "setitimer"):
            raise Stopped
        signal.setitimer(signal.ITIMER_REAL, max(self.patience, 1e-3), 1.0)

    def _alarm(self, _number: int, _frame: object) -> None:
        if self.number and self.patience is not None:
            raise Stopped

    def unless_stopped(
        self, accelerator: Accelerator, work: Callable[[], Value], patience: float = 0.0
    ) -> Value | None:
        """What `work` returns; None, on all processes, where a signal came while any of them was still at it.

        `work` talks to no other process, changes nothing that is saved, and does not return None. Every process calls
        this at the same place. As long as there is nothing to save (`patience` of the request) `Stopped` goes through.
        """
        if self.patience is not None:
            return work()
        result = None
        try:
            try:
                self.patience = patience
                if self.number:
                    self._arm()
                result = work()
            finally:
                self.patience = None
        except Stopped:
            self.patience = None  # the exception may have come in the `finally`
            _kill_children(self._strangers)  # a loader would wait 5 s for each worker that hangs, before the save
        lost, number = greatest(accelerator, result is None, self.number)
        self.number = int(number)
        return None if lost else result

    def agreed(self, accelerator: Accelerator, save_is_due: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any finds a save due: the same on all."""
        number, due = greatest(accelerator, self.number, save_is_due)
        self.number = int(number)
        return self.number != 0, bool(due)

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number


def greatest(accelerator: Accelerator, *numbers: float) -> list[float]:
    """The greatest value of each number among all processes. The hosts exchange them; nobody waits for a device."""
    if accelerator.num_processes == 1:
        return list(numbers)
    import torch

    values = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=host_group())
    return [float(value) for value in values]


@functools.cache
def host_group() -> Any:
    """The processes as a group that exchanges tensors in the hosts' memory; None for the default group if it does."""
    import torch

    return None if torch.distributed.get_backend() == "gloo" else torch.distributed.new_group(backend="gloo")


def _kill_children(strangers: Collection[int | None]) -> None:
    """End the child processes that a run has started; `strangers` were there before it."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if before is not None:  # torch's handler would call the end of a worker an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.pid not in strangers:
            child.kill()
            child.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
