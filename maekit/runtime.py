"""The machine: device, precision, attention kernel, compilation, processes. Each automatic choice is (value, reason).

torch is imported inside the functions, so that the command line can answer before it is needed.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from maekit.config import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Value = TypeVar("Value")


class Choice(NamedTuple, Generic[Value]):
    """A setting that was chosen, and why."""

    value: Value
    reason: str


def choose_device(requested: str) -> Choice[torch.device]:
    """The device to compute on.

    Raises:
        UserError: a device that this machine does not have.
    """
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return Choice(torch.device("cuda"), torch.cuda.get_device_name())
        if torch.backends.mps.is_available():
            return Choice(torch.device("mps"), "Apple GPU")
        return Choice(torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads")
    kind = requested.split(":")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        raise UserError(f"--device {requested}: not available on this machine; take --device auto")
    return Choice(torch.device(requested), "as asked for")


def choose_precision(requested: str, device: torch.device) -> Choice[str]:
    """fp32 or bf16 for the matrix products: bf16 only where the hardware multiplies in it."""
    import torch

    if requested != "auto":
        return Choice(requested, "as asked for")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return Choice("bf16", "tensor cores multiply in bfloat16")
        return Choice("fp32", "this GPU has no fast bfloat16")
    if device.type == "mps":
        return Choice("fp32", "bfloat16 is not faster on MPS")
    flags = _cpu_flags()
    if "amx_bf16" in flags:
        return Choice("bf16", "the CPU has AMX matrix units for bfloat16")
    # avx512_bf16 alone doubles the peak on paper; casts and short rows eat that up at ViT sizes.
    return Choice("fp32", "the CPU has no matrix units for bfloat16 (AMX), where it would be slower")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux: macOS and Windows CPUs with AMX are not known to us
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def choose_attention(device: torch.device, precision: str) -> Choice[bool]:
    """Whether attention is torch's fused kernel, or plain products with a softmax."""
    if device.type == "cpu" and precision == "bf16":
        return Choice(False, "plain products: the CPU's fused kernel has a slow bfloat16 backward pass")
    return Choice(True, f"fused scaled_dot_product_attention on {device.type}")


def choose_compile(requested: str, device: torch.device) -> Choice[bool]:
    """Whether the step is compiled. CPU compilation needs a C++ compiler, which a user's machine need not have."""
    if requested == "off":
        return Choice(False, "as asked for")
    if requested == "auto" and device.type != "cuda":
        return Choice(False, f"compiling on {device.type} gains little and takes a minute; --compile on forces it")
    if sys.platform == "win32":
        return Choice(False, "torch.compile needs a compiler that Windows lacks by default")
    compilers = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        return Choice(False, "eager: no C++ compiler was found (g++ or clang++), which torch.compile needs on a CPU")
    return Choice(True, "as asked for" if requested == "on" else "CUDA")


def start_accelerator(device: torch.device, trackers: tuple[str, ...], out: Path) -> Accelerator:
    """Accelerate's handle on processes, and the trackers that were asked for.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # the tasks say themselves where autocast begins and ends
            log_with=list(trackers) or None,
            project_dir=str(out),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except (ImportError, ValueError) as error:
        if trackers:
            raise UserError(f"--trackers {' '.join(trackers)}: {error}") from None
        raise
    ready = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing := [name for name in trackers if name not in ready]:  # Accelerate drops them without a word
        raise UserError(f"--trackers {' '.join(missing)}: not installed; pip install {' '.join(missing)}")
    return accelerator


def check_processes(expected: int | None, actual: int) -> None:
    """Refuse to run on another number of processes than was asked for.

    `accelerate launch --num_processes 2` starts a single process on a machine without GPUs, without a word.

    Raises:
        UserError: the numbers differ; says how to start that many.
    """
    asked = expected if expected is not None else _asked_of_launcher()
    if asked is not None and asked != actual:
        raise UserError(
            f"{asked} processes were asked for, but {actual} started: on a machine without GPUs use "
            f"torchrun --nproc_per_node {asked} -m maekit ..., which starts them (accelerate launch does not)"
        )


def _asked_of_launcher() -> int | None:
    """`--num_processes N` in the command line of the parent process, if that is accelerate's launcher."""
    try:
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        words = psutil.Process(os.getppid()).cmdline()
    except Exception:
        return None
    if not any("accelerate" in word for word in words) or "launch" not in words:
        return None
    text = " ".join(words)
    found = re.search(r"--num[_-]processes[ =](\d+)", text)
    return int(found.group(1)) if found else None


def compile_or_eager(model: torch.nn.Module, report: Callable[[str], None]) -> Callable[..., Any]:
    """The model compiled for static shapes; where its first call fails to compile, the model itself from then on."""
    import torch

    compiled = torch.compile(model, dynamic=False)
    use = {"compiled": True, "proven": False}

    def run(*arguments: Any, **named: Any) -> Any:
        if use["compiled"]:
            try:
                output = compiled(*arguments, **named)
            except Exception as error:
                if use["proven"]:
                    raise
                use["compiled"] = False
                report(f"eager from here on, torch.compile failed: {str(error).splitlines()[0]}")
            else:
                use["proven"] = True
                return output
        return model(*arguments, **named)

    return run


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

    def agreed(self, accelerator: Accelerator, step: int, save_is_due: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop after this step, and whether any finds a save due: the same on all."""
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
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=_host_group())
    return [float(value) for value in values]


@functools.cache
def _host_group() -> Any:
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


def seed_everything(seed: int) -> None:
    """Seed torch's generators: initial weights, and dropout where a model has any."""
    import torch

    torch.manual_seed(seed)


def package_versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    names = ("maekit", "torch", "timm", "torchvision", "accelerate", "numpy", "pillow", "safetensors", "scikit-learn")
    return {name: metadata.version(name) for name in names}


@functools.cache
def _commit() -> str | None:
    """The commit of maekit's own checkout, where it runs from one."""
    try:
        here = Path(__file__).parent
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def environment(device: torch.device) -> dict[str, Any]:
    """What env.json holds: versions, hardware, commit and command."""
    import torch

    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()
