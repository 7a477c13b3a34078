"""The machine: device, precision, attention kernel, compilation, processes. Each automatic choice is (value, reason).

torch is imported inside the functions, so that the command line can answer before it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from maekit.config import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Value = TypeVar("Value")


_UNPINNED_BYTES = 2**16
"""CUDA's driver takes so much of unpinned memory along with the command to copy it."""


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
    kind, colon, index = requested.partition(":")
    if colon and (kind != "cuda" or not index.isdecimal() or int(index) >= max(1, torch.cuda.device_count())):
        raise UserError(f"--device {requested}: no such device; {torch.cuda.device_count()} GPUs, counted from cuda:0")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        raise UserError(f"--device {requested}: not available on this machine; take --device auto")
    return Choice(torch.device(requested), "as asked for")


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on a device, without waiting for the copy on CUDA.

    There, a little memory that is not pinned is copied aside first; for more than that the driver would wait for all
    that the device still has to do. On MPS nothing is copied aside: a copy that is still to be made reads what has
    taken the place of a temporary.
    """
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > _UNPINNED_BYTES:
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type == "cuda")


def choose_precision(requested: str, device: torch.device) -> Choice[str]:
    """fp32 or bf16 for the matrix products: bf16 only where the hardware multiplies in it.

    On CUDA, fp32 is so in convolutions too from here on, where torch's default is 19 bits (TF32).
    """
    import torch

    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
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


def choose_compile(requested: str, device: torch.device, alone: bool = True) -> Choice[str]:
    """What torch.compile is given: off, blocks, whole or graphs. On a CPU it needs a C++ compiler, often absent.

    alone: a step is one batch of one process, so that it can be recorded as a whole.
    """
    if requested == "off":
        return Choice("off", "as asked for")
    if requested == "auto" and device.type != "cuda":
        return Choice("off", f"compiling on {device.type} takes a minute and gains 3 to 5 %; --compile blocks does it")
    if sys.platform == "win32":
        return Choice("off", "torch.compile needs a compiler that Windows lacks by default")
    compilers = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        return Choice("off", "eager: no C++ compiler was found (g++ or clang++), which torch.compile needs on a CPU")
    if requested == "graphs" and device.type != "cuda":
        return Choice("whole", f"there are no CUDA graphs on {device.type}")
    if requested == "graphs" and not alone:
        return Choice("whole", "graphs hold one batch of one process")
    if requested != "auto":
        return Choice(requested, "as asked for")
    if alone:
        return Choice("graphs", "CUDA: the model is compiled, and a whole step replayed as one graph")
    return Choice("whole", "CUDA; graphs hold one batch of one process")


def start_accelerator(device: torch.device, trackers: tuple[str, ...], out: Path) -> Accelerator:
    """Accelerate's handle on processes, and the trackers that were asked for.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    if device.type == "cuda" and device.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"--device {device}: several processes take a GPU each; choose by CUDA_VISIBLE_DEVICES")
        import torch

        torch.cuda.set_device(device)  # Accelerate takes the current one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=", UserWarning)  # said below, with what to type
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


def refuse_several(command: str) -> None:
    """Refuse a command that one process does where a launcher has started several: each would write the same files.

    Raises:
        UserError: several were started.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and "LOCAL_RANK" in os.environ:  # some clusters set the former for every job
        raise UserError(
            f"maekit {command} runs in one process, and {world} were started: start it without torchrun or accelerate "
            "launch"
        )


def check_batch(batch_size: int, accum: int, world: int, unit: int = 1, goes_on: bool = False) -> None:
    """Refuse a batch that the processes and accumulation steps cannot share evenly.

    unit: what each part must be a multiple of, for what is named instead.
    goes_on: a resumed run keeps its batch.

    Raises:
        UserError: names the numbers, and batches near to it, or fewer processes.
    """
    if batch_size % (world * accum):
        fewer = next((n for n in range(world, 1, -1) if batch_size % (n * accum * unit) == 0), 1)
        raise UserError(
            f"--batch-size {batch_size} is not divisible by {world} processes x --accum {accum}: it "
            "counts the images of one optimiser step over all of them; "
            + (f"a run that goes on keeps it: start {fewer} process{'es' if fewer > 1 else ''}" if goes_on
               else f"such as {near_batches(batch_size, world * accum * unit)}")
        )  # fmt: skip


def near_batches(batch_size: int, unit: int) -> str:
    """The flag with the multiples of a unit that are next to a batch: --batch-size 63 or 66."""
    lower = batch_size // unit * unit
    return "--batch-size " + " or ".join(str(one) for one in (lower, lower + unit) if one)


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


def compile_or_eager(model: torch.nn.Module, how: str, report: Callable[[str], None]) -> Callable[..., Any]:
    """The model compiled for static shapes; where its first call fails to compile, the model itself from then on.

    how: off; blocks (each transformer block by itself: all of a kind share what is compiled, so it takes seconds, but
    for stochastic depth, where each has a share of its own); whole; graphs (the same here: the step around it is what
    is recorded, `training.replayed`).
    """
    import torch

    if how == "off":
        return model.__call__
    _lower_both_passes()
    compiled, parts = model.__call__, []
    if how == "blocks":
        parts = [block for name, block in model.named_modules() if re.search(r"\.blocks\.\d+$", name)]
        _allow_compilations(2 * len(parts))
        for part in parts:
            part.compile(dynamic=False)
    else:
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
                for part in parts:
                    part._compiled_call_impl = None
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                report(f"eager from here on, torch.compile failed: {reason}")
            else:
                use["proven"] = True
                return output
        return model(*arguments, **named)

    return run


def _lower_both_passes() -> None:
    """Compile the backward pass with the forward one, where torch has that switch: its failure then comes in the call
    that can still go on without, and not in the first `backward`.
    """
    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True


def _allow_compilations(count: int) -> None:
    """Let torch compile one function so many times: it stops at eight, and blocks that drop paths are all different."""
    from torch._dynamo import config

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), count))


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Around passes that are not the training step: compiled blocks would be compiled anew for the shapes of each, and
    torch stops compiling after eight, the training step's among them where it comes late.
    """
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def seed_everything(seed: int) -> None:
    """Seed torch's generators: initial weights, and dropout where a model has any."""
    import torch

    torch.manual_seed(seed)


def own_version() -> str:
    """maekit's version; where the sources are imported from a folder that pip knows nothing of, that."""
    try:
        return metadata.version("maekit")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def package_versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    names = (
        "torch",
        "timm",
        "torchvision",
        "accelerate",
        "numpy",
        "pillow",
        "simplejpeg",
        "safetensors",
        "scikit-learn",
    )
    return {"maekit": own_version()} | {name: metadata.version(name) for name in names}


@functools.cache
def _commit() -> str | None:
    """The commit of maekit's own checkout, where it runs from one.

    An environment inside a project of the user's holds a package, and the commit there is that project's.
    """
    try:
        here = Path(__file__).parent
        asked = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "--short", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5)
        root, commit = answer.stdout.splitlines()
        return commit if answer.returncode == 0 and Path(root).samefile(here.parent) else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


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
