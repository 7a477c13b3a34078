"""The machine: device, precision, attention kernel. Each automatic choice is (value, reason).

torch is imported inside the functions, so that the command line can answer before it is needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from maekit.config import UserError

if TYPE_CHECKING:
    import torch

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
