"""What a checkpoint holds besides the weights: AdamW's state and the generators' states, as flat dicts of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from maekit.config import UserError

Tensors = dict[str, Tensor]
ParameterNames = Mapping[Parameter, str] | Iterable[tuple[str, Parameter]]
"""`model.named_parameters()`, or a mapping the other way round."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: ParameterNames) -> Tensors:
    """AdamW's state under flat names, e.g. "exp_avg/blocks.0.attn.qkv.weight": the live tensors, not copies."""
    tensors = {}
    for parameter, name, group in _named(optimizer, names):
        state = optimizer.state.get(parameter)
        if not state:  # no gradient so far: said aloud, so that a lost state is not taken for it
            tensors[f"none/{name}"] = torch.empty(0, dtype=torch.uint8)
            continue
        slots = _slots(group)
        assert set(state) == set(slots), f"not the state of AdamW: {sorted(state)}"
        tensors |= {f"{slot}/{name}": state[slot].detach() for slot in slots}
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: ParameterNames, tensors: Mapping[str, Tensor]
) -> None:
    """Give AdamW copies of what `optimizer_tensors` took, bit for bit, in the memory layout that it would have chosen.

    Raises:
        UserError: a name is missing or unknown, or a tensor has another shape or dtype; nothing is changed then.
    """
    named = list(_named(optimizer, names))
    if problems := _mismatches(named, tensors):
        raise UserError(*problems)
    for parameter, name, group in named:
        if f"none/{name}" in tensors:
            optimizer.state.pop(parameter, None)
            continue
        step = tensors[f"step/{name}"]
        # as torch.optim does: kernels that count on the device want float32 there, the others a number on the host
        if group.get("fused") or group.get("capturable"):
            state = {"step": step.to(parameter.device, torch.float32, copy=True)}
        else:
            state = {"step": step.to("cpu", copy=True)}
        for slot in _slots(group)[1:]:
            state[slot] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{slot}/{name}"])
        optimizer.state[parameter] = state


def rng_tensors(rank: int) -> Tensors:
    """The states of this process's torch generators: the CPU's, and the current CUDA device's if it is in use."""
    states = {f"torch_cpu/rank{rank}": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"torch_cuda/rank{rank}"] = torch.cuda.get_rng_state()
    return states


def restore_rng(tensors: Mapping[str, Tensor], rank: int) -> list[str]:
    """Restore this process's torch generators; return the names without a saved state (more ranks, another device).

    Raises:
        UserError: a state is not one that this torch can take.
    """
    wanted = [f"torch_cpu/rank{rank}"]
    if torch.cuda.is_available():
        wanted.append(f"torch_cuda/rank{rank}")
    for name in wanted:
        if name in tensors:
            try:
                (torch.cuda if name.startswith("torch_cuda") else torch).set_rng_state(tensors[name].cpu())
            except (RuntimeError, TypeError) as error:
                raise UserError(f"generator state {name!r}: {error}") from error
    return [name for name in wanted if name not in tensors]


def _named(optimizer: torch.optim.Optimizer, names: ParameterNames) -> Iterator[tuple[Parameter, str, dict[str, Any]]]:
    """Each parameter of the optimiser with its name and its group."""
    pairs = names.items() if isinstance(names, Mapping) else ((parameter, name) for name, parameter in names)
    by_id = {id(parameter): name for parameter, name in pairs}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) in by_id, f"a parameter of shape {tuple(parameter.shape)} has no name"
            yield parameter, by_id[id(parameter)], group


def _slots(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of AdamW's state tensors for one parameter, the counter first."""
    return ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 4 if group.get("amsgrad") else 3]


def _mismatches(named: list[tuple[Parameter, str, dict[str, Any]]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps these tensors from being the state of these parameters."""
    problems, known = [], set()
    for parameter, name, group in named:
        if f"none/{name}" in tensors:
            known.add(f"none/{name}")
            continue
        for slot in _slots(group):
            key = f"{slot}/{name}"
            known.add(key)
            if (tensor := tensors.get(key)) is None:
                problems.append(f"optimizer state {key!r} is missing")
            elif slot == "step":
                if tensor.ndim or not tensor.is_floating_point():
                    problems.append(f"optimizer state {key!r} is {_kind(tensor)}, expected one floating-point number")
            elif (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
                problems.append(f"optimizer state {key!r} is {_kind(tensor)}, the parameter is {_kind(parameter)}")
    return problems + [f"optimizer state {key!r} belongs to no parameter" for key in sorted(tensors.keys() - known)]


def _kind(tensor: Tensor) -> str:
    """For example float32[768, 3, 16, 16]."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
