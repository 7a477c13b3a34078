"""A training step as one CUDA graph: recorded once, then replayed by a single call.

A small model's kernels take microseconds, and each takes Python longer to launch: a step of the cifar10 recipe is 600
of them. A graph launches them all. What it computes is the same; what changes from step to step goes in by copying.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WARM_UP = 3
"""Steps before the recording: they compile, choose kernels and make the optimiser's state, none of which may be
recorded."""


class Replayed:
    """A step, as a function of tensors on a CUDA device, that updates weights by a fused optimiser.

    The first calls run it as it is; then it is recorded for their shapes and types, and from then on replayed. Calls of
    others run it as it is. What it returns holds until the next call.
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
        self._rates: Tensor | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step, at the learning rates that the optimiser's groups have."""
        self.calls += 1
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups])
        if self._rates is None:
            self._rates = torch.empty_like(rates, device=inputs[0].device)
        self._rates.copy_(rates, non_blocking=True)
        if self.calls == WARM_UP + 1:
            self._record(inputs)
        # A batch with one 16-bit image is of floats: copied into the bytes that were recorded, it would be black.
        if self._graph is None or list(map(_form, inputs)) != list(map(_form, self._inputs)):
            with self._rates_on_device(self._rates):
                return self.step(*inputs)
        torch._foreach_copy_(list(self._inputs), list(inputs))
        self._graph.replay()
        return self._outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the step without doing it; where that fails, steps stay as they are."""
        assert self._rates is not None
        graph = torch.cuda.CUDAGraph()
        try:
            fixed = tuple(torch.empty_like(one).copy_(one) for one in inputs)
            torch.cuda.empty_cache()  # the graph has memory of its own
            # Other threads, such as those that pin batches, may go on calling CUDA.
            with self._rates_on_device(self._rates), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self.step(*fixed)
            self._graph, self._inputs = graph, fixed
        except Exception as error:
            self.optimizer.zero_grad(set_to_none=True)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.report(f"kernels are launched one by one, since no CUDA graph could be recorded: {reason}")

    @contextlib.contextmanager
    def _rates_on_device(self, rates: Tensor) -> Iterator[None]:
        """Inside, the groups have their rates as tensors: as numbers they would be recorded with the rest.

        Steps that are not replayed do so too, or a run that goes on would round its first rates otherwise.
        """
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group.update(lr=rate, capturable=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
