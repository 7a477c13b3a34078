"""torch.compile: where it is worth it, and how a model goes on without where it fails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from maekit.runtime import Choice

if TYPE_CHECKING:
    import torch


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
