"""AdamW and the generators continue bit-equal from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import bits
from torch import nn

from maekit.config import UserError
from maekit.training import run_state
from maekit.training.checkpoint import Checkpoint, load, save


class Tiny(nn.Module):
    """A convolution in channels-last, tied weights, a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.tanh(self.first(self.conv(x).mean((2, 3)))))
        return hidden


def make_run(seed: int, **options: Any) -> tuple[Tiny, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tiny()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05, "lr_scale": 0.7}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def train(model: Tiny, optimizer: torch.optim.AdamW, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9  # a schedule that lives in the group alone
        optimizer.zero_grad()
        model(torch.randn(5, 2, 6, 6)).square().mean().backward()  # drawn from the global generator
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}, {"amsgrad": True}], ids=str
)
def test_adamw_continues_bit_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer = make_run(0, **options)
    train(model, optimizer, 3)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = run_state.optimizer_tensors(optimizer, model.named_parameters())
    path = save(tmp_path, 3, Checkpoint(model.state_dict(), state, run_state.rng_tensors(0), {"rates": rates}), keep=1)
    train(model, optimizer, 3)
    straight = {name: bits(t) for name, t in model.state_dict().items()}
    straight |= {name: bits(t) for name, t in run_state.optimizer_tensors(optimizer, model.named_parameters()).items()}

    model, optimizer = make_run(1, **options)
    train(model, optimizer, 1)  # what is there before must not matter
    optimizer.state[model.unused] = {"step": torch.tensor(1.0)}
    read = load(path)
    model.load_state_dict(read.model)
    by_parameter = {parameter: name for name, parameter in model.named_parameters()}
    run_state.load_optimizer_tensors(optimizer, by_parameter, read.optimizer)
    for group, rate in zip(optimizer.param_groups, read.state["rates"], strict=True):
        group["lr"] = rate
    assert run_state.restore_rng(read.rng, 0) == [f"torch_cuda/rank{0}"] * torch.cuda.is_available()
    assert optimizer.state[model.conv.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert model.unused not in optimizer.state
    assert "none/unused" in read.optimizer
    train(model, optimizer, 3)
    resumed = {name: bits(t) for name, t in model.state_dict().items()}
    resumed |= {name: bits(t) for name, t in run_state.optimizer_tensors(optimizer, model.named_parameters()).items()}
    assert resumed == straight


def test_loaded_optimizer_state_is_a_copy_with_the_step_where_adamw_wants_it() -> None:
    model, optimizer = make_run(0)
    train(model, optimizer, 2)
    saved = {
        name: t.double() if name.startswith("step/") else t
        for name, t in run_state.optimizer_tensors(optimizer, model.named_parameters()).items()
    }
    for options, dtype in ({}, torch.float64), ({"fused": True}, torch.float32):
        model, optimizer = make_run(0, **options)
        run_state.load_optimizer_tensors(optimizer, model.named_parameters(), saved)
        assert optimizer.state[model.conv.weight]["step"].dtype == dtype
        train(model, optimizer, 1)
    assert saved["step/conv.bias"] == 2


def test_optimizer_problems_are_listed_together_and_change_nothing() -> None:
    model, optimizer = make_run(0)
    train(model, optimizer, 1)
    tensors = run_state.optimizer_tensors(optimizer, model.named_parameters())
    before = {name: bits(t) for name, t in tensors.items()}
    bad = {name: t.clone() for name, t in tensors.items() if name != "exp_avg/conv.bias"}
    bad["exp_avg/ghost"] = torch.ones(1)
    bad["exp_avg_sq/first.weight"] = torch.ones(2, 3)
    bad["exp_avg/first.bias"] = torch.ones(4, dtype=torch.float64)
    bad["step/first.bias"] = torch.ones(2)
    with pytest.raises(UserError) as caught:
        run_state.load_optimizer_tensors(optimizer, model.named_parameters(), bad)
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "'exp_avg/conv.bias' is missing" in text
    assert "'exp_avg/ghost' belongs to no parameter" in text
    assert "'exp_avg_sq/first.weight' is float32[2, 3], the parameter is float32[4, 4]" in text
    assert "'exp_avg/first.bias' is float64[4]" in text
    assert "'step/first.bias' is float32[2]" in text
    after = run_state.optimizer_tensors(optimizer, model.named_parameters())
    assert {name: bits(t) for name, t in after.items()} == before


def test_generators_continue_and_a_new_rank_is_reported() -> None:
    torch.manual_seed(3)
    states = run_state.rng_tensors(1)
    expected = torch.randn(4)
    torch.randn(9)
    assert "torch_cpu/rank1" not in run_state.restore_rng(states, 1)
    assert torch.equal(torch.randn(4), expected)
    assert "torch_cpu/rank2" in run_state.restore_rng(states, 2)
    with pytest.raises(UserError, match="torch_cpu/rank1"):
        run_state.restore_rng({"torch_cpu/rank1": torch.zeros(3, dtype=torch.uint8)}, 1)


def test_cuda_generator_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device itself is simulated: what matters here is which state goes where."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([1, 2], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    states = run_state.rng_tensors(0)
    assert set(states) == {"torch_cpu/rank0", "torch_cuda/rank0"}
    assert run_state.restore_rng(states, 0) == []
    assert [state.tolist() for state in given] == [[1, 2]]
    del states["torch_cuda/rank0"]  # saved on a machine without a GPU
    assert run_state.restore_rng(states, 0) == ["torch_cuda/rank0"]
