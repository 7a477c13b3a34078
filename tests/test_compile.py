"""torch.compile in every form gives the loss and the gradients of the eager step, and its failure is no end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from tiny_runs import SMALLEST, run
from torch._dynamo.backends.common import aot_autograd

from maekit.compiling import choose_compile, compile_or_eager
from maekit.config import PretrainConfig
from maekit.models.mae import MaskedAutoencoder
from maekit.training.step import part_loss


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What one test compiles counts towards torch's limit for a function in the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(how: str, said: list[str]) -> tuple[float, torch.Tensor]:
    """Loss and the gradient of the patch embedding."""
    config = PretrainConfig(**(TINY | {"precision": "fp32", "data": "-"}))
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8, generator=generator)
    forward = compile_or_eager(model, how, said.append)
    for _ in range(2):
        model.zero_grad()
        loss = part_loss(model, config, images, model.draw_masks(range(4), seed=0), forward)
        loss.backward()
    gradient = model.encoder.patch_embed.proj.weight.grad
    assert gradient is not None
    return float(loss.detach()), gradient


@pytest.mark.slow  # compiling takes half a minute each
@pytest.mark.parametrize("how", ["blocks", "whole", "graphs"])
def test_compiled_is_the_same(how: str) -> None:
    if choose_compile(how, torch.device("cpu")).value == "off":
        pytest.skip("needs a C++ compiler")
    said: list[str] = []
    loss, gradient = step(how, said)
    wanted_loss, wanted = step("off", said)
    assert said == []
    assert abs(loss - wanted_loss) < 1e-5
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["blocks", "whole", "graphs"])
def test_a_failed_compilation_is_said_and_survived(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler today")

    def compile_to_nothing(self: torch.nn.Module, **_: Any) -> None:
        self._compiled_call_impl = broken

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_to_nothing)
    said: list[str] = []
    loss, gradient = step(how, said)
    assert said == ["eager from here on, torch.compile failed: no compiler today"]
    monkeypatch.undo()
    wanted_loss, wanted = step("off", said)
    assert loss == wanted_loss
    assert torch.equal(gradient, wanted)


def test_a_failed_backward_compilation_is_survived_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes are compiled in the first call, which can still go on without."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("\n  no backward today")

    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_it(model, backend=backend, dynamic=False))
    said: list[str] = []
    loss, gradient = step("whole", said)
    assert len(said) == 1 and "no backward today" in said[0]
    wanted_loss, wanted = step("off", said)
    assert loss == wanted_loss
    assert torch.equal(gradient, wanted)


def test_blocks_of_their_own_stochastic_depth_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks that drop twelve shares of their paths are twelve functions to torch, which stops at eight."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compile_it(module, **how, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=8):  # timm.optim raises it where it is imported
        config = PretrainConfig(**(TINY | {"precision": "fp32", "data": "-", "depth": 12, "drop_path": 0.1}))
        model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3).train()
        forward = compile_or_eager(model, "blocks", pytest.fail)
        images = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
        part_loss(model, config, images, model.draw_masks(range(4), seed=0), forward).backward()
    assert len(compiled) >= 12


def test_only_the_training_step_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out passes, probes and pictures have other shapes and would each compile both kinds of block again."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append([tuple(value.shape) for value in inputs])
        return graph.forward

    in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: in_place(self, backend=backend, **how))
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a C++ compiler that is never called
    words = ["pretrain", "digits", *SMALLEST, "--batch-size", "128", "--compile", "blocks"]
    assert run([*words, "--drop-path", "0", "--steps", "2", "--probe-every", "1"], tmp_path / "run") == 0
    assert len(compiled) == 2  # a block of the encoder and one of the decoder


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("asked", "device", "alone", "found"),
    [
        ("auto", "cuda", True, "graphs"),
        ("auto", "cuda", False, "whole"),
        ("graphs", "cuda", False, "whole"),
        ("blocks", "cuda", False, "blocks"),
        ("auto", "cpu", True, "off"),
        ("graphs", "mps", True, "whole"),
        ("off", "cuda", True, "off"),
    ],
)
def test_a_step_is_recorded_where_it_is_one_batch_of_one_process(
    asked: str, device: str, alone: bool, found: str
) -> None:
    choice = choose_compile(asked, torch.device(device), alone)
    assert choice.value == found
    assert choice.reason
