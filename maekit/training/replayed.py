"""A training step as one CUDA graph: recorded once, then replayed by a single call.

A small model's kernels take microseconds, and each takes Python longer to launch: a step of the cifar10 recipe is 600
of them. A graph launches them all. What it computes is the same; what changes from step to step goes in by copying.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Steps before the recording: they compile, choose kernels and make the optimiser's state, none of which may be
recorded."""


class Replayed:
    """A step, as a function of tensors on a CUDA device, that updates weights by a fused optimiser.

    The first calls run it as it is; then it is recorded for their shapes, and from then on replayed. Calls of other
    shapes run it as it is. What it returns holds until the next call.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        optimizer: torch.optim.Optimizer,
        report: Callable[[str], None],
    ) -> None:
        self.step, self.optimizer, self.report = step, optimizer, report
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rates = torch.empty(0)
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step. Learning rates are read from the optimiser's groups, as ever."""
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._record(inputs)
        if self._graph is None or any(a.shape != b.shape for a, b in zip(inputs, self._inputs, strict=True)):
            return self.step(*inputs)
        torch._foreach_copy_(list(self._inputs), list(inputs))
        self._rates.copy_(torch.tensor([group["lr"] for group in self.optimizer.param_groups]), non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the step without doing it; where that fails, steps stay as they are."""
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
        graph, device = torch.cuda.CUDAGraph(), inputs[0].device
        self._rates = torch.zeros(len(groups), device=device)
        try:
            fixed = tuple(torch.empty_like(one).copy_(one) for one in inputs)
            for group, rate in zip(groups, self._rates, strict=True):  # as numbers they would be recorded too
                group.update(lr=rate, capturable=True)
            torch.cuda.empty_cache()  # the graph has memory of its own
            # Other threads, such as those that pin batches, may go on calling CUDA.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self.step(*fixed)
            self._graph, self._inputs = graph, fixed
        except Exception as error:
            self.optimizer.zero_grad(set_to_none=True)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.report(f"kernels are launched one by one, since no CUDA graph could be recorded: {reason}")
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)
