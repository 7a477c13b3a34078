"""What training on labels shares: seeds of library generators, layer decay, a run's folder and its exact return."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from safetensors.torch import load_file
from torch import nn

from maekit.config import SupervisedConfig, UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.seeding import sample_generators, seed_step
from maekit.stopping import StopRequest
from maekit.terminal import make_console
from maekit.training import supervised
from maekit.training.guard import Guard
from maekit.training.supervised import (
    BEST_FILE,
    Position,
    SupervisedRun,
    claim,
    layer_decay_groups,
    set_scaled_rate,
)
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.sources import read_passport
from maekit.weights.written import write_weights

ENCODER = MaskedAutoencoder(tiny_config(), (0.5,) * 3, (0.2,) * 3).encoder


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_a_samples_generators_are_its_own_and_leave_the_others_alone() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = [draws(), draws()]
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    first = draws()
    inside = {}
    for key in ((0, 0, 5), (0, 1, 5), (1, 0, 5), (0, 0, 6)):
        with sample_generators(*key):
            inside[key] = draws()
    assert [first, draws()] == expected
    assert len({value for values in inside.values() for value in values}) == 12, "two samples share their numbers"
    with sample_generators(0, 0, 5):
        assert draws() == inside[0, 0, 5]


def test_a_steps_seed_depends_on_seed_step_and_rank() -> None:
    seen: set[float] = set()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_step(*key)
        one = draws()
        seed_step(*key)
        assert draws() == one
        seen.update(one)
    assert len(seen) == 12


def test_layer_decay_by_hand() -> None:
    """Two blocks: embedding 0.5^3, blocks 0.5^2 and 0.5, last normalisation and head 1; matrices alone decay."""
    model = nn.ModuleDict({"encoder": ENCODER, "head": nn.Linear(32, 5)})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, ENCODER, weight_decay=0.3, decay=0.5)
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters()), "each trained parameter once"
    expected = {
        "encoder.cls_token": (0.125, 0.0), "encoder.patch_embed.proj.weight": (0.125, 0.3),
        "encoder.blocks.0.attn.qkv.weight": (0.25, 0.3), "encoder.blocks.0.norm1.weight": (0.25, 0.0),
        "encoder.blocks.1.mlp.fc1.weight": (0.5, 0.3), "encoder.blocks.1.mlp.fc1.bias": (0.5, 0.0),
        "encoder.norm.weight": (1.0, 0.0), "head.weight": (1.0, 0.3), "head.bias": (1.0, 0.0),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert "encoder.pos_embed" not in found, "the sine-cosine positions are constants"
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_scaled_rate(optimizer, 2.0)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in optimizer.param_groups)


def open_run(out: Path, fingerprint: str = "f", **changes: Any) -> SupervisedRun:
    """A run of a small model with a batch normalisation, whose counter is an integer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    config = SupervisedConfig(task="test", data="d", out=str(out), **changes)
    passport = Passport(model=tiny_config(), mean=(0.5,) * 3, std=(0.2,) * 3, kind="classifier", classes=("a", "b"))
    run = SupervisedRun(
        config=config, out=out, console=make_console(), accelerator=Accelerator(cpu=True), model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), position=Position(6, fingerprint=fingerprint),
        passport=lambda: dataclasses.replace(passport, steps=run.position.step), stop=StopRequest(),
        ema=copy.deepcopy(model),
    )  # fmt: skip
    return run


def take_steps(run: SupervisedRun, until: int) -> None:
    """Steps on noise that belongs to the step, as mixup and stochastic depth draw theirs."""
    while run.position.step < until:
        seed_step(0, run.position.step, 0)
        run.model(torch.randn(8, 4)).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.ema is not None
        with torch.no_grad():
            for mean, value in zip(run.ema.parameters(), run.model.parameters(), strict=True):
                mean.lerp_(value, 0.1)
        run.position.step += 1
        run.log({"kind": "step", "loss": 0.5})


def everything(run: SupervisedRun) -> dict[str, torch.Tensor]:
    assert run.ema is not None
    averaged = {f"ema.{name}": value for name, value in run.ema.state_dict().items()}
    return {name: value.clone() for name, value in {**run.model.state_dict(), **averaged}.items()}


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = open_run(tmp_path / "whole")
    whole.begin(fresh=True)
    take_steps(whole, 6)
    part = open_run(tmp_path / "part")
    part.begin(fresh=True)
    take_steps(part, 3)
    part.keep_best(0.25)
    assert part.save()
    take_steps(part, 5)  # lost
    again = open_run(tmp_path / "part")
    again.restore()
    assert (again.position.step, again.position.best, again.position.best_step) == (3, 0.25, 3)
    take_steps(again, 6)
    for name, value in everything(whole).items():
        assert torch.equal(value, everything(again)[name]), name
    assert [line["step"] for line in again.metrics.read()] == [1, 2, 3, 4, 5, 6]
    passport = read_passport(tmp_path / "part" / "model.safetensors")
    assert (passport.kind, passport.classes) == ("classifier", ("a", "b"))


def test_what_others_read_is_the_average(tmp_path: Path) -> None:
    """It is what is measured and kept, so a run that is stopped must leave it too."""
    run = open_run(tmp_path)
    take_steps(run, 2)
    assert run.save() and run.ema is not None
    averaged, stepped = run.ema.state_dict(), run.model.state_dict()
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == averaged.keys()
    for name, value in found.items():
        assert torch.equal(value, averaged[name]), name
    assert not torch.equal(found["0.weight"], stepped["0.weight"])


def test_only_a_better_score_replaces_the_best_weights(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.keep_best(0.5)
    before = (tmp_path / BEST_FILE).read_bytes()
    assert run.ema is not None
    nn.init.zeros_(next(run.ema.parameters()))
    assert not run.keep_best(0.5)
    assert (tmp_path / BEST_FILE).read_bytes() == before
    assert run.keep_best(0.75)
    assert (tmp_path / BEST_FILE).read_bytes() != before


def test_the_best_is_what_its_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be written is not the best; one that is newer than the checkpoint is judged anew."""
    run = open_run(tmp_path)
    run.begin(fresh=True)
    take_steps(run, 2)
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "write_weights", Mock(side_effect=OSError("full")))
        assert not run.keep_best(0.9)
    assert run.keep_best(0.5) and (run.position.best, run.position.best_step) == (0.5, 2)
    run.save()
    take_steps(run, 4)
    assert run.keep_best(0.7)  # and killed before the next checkpoint
    again = open_run(tmp_path)
    again.restore()
    assert again.position.best == -1
    take_steps(again, 4)
    assert again.keep_best(0.69)


def test_another_length_restarts_the_schedule_or_is_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.begin(fresh=True)
    take_steps(run, 4)
    run.save()
    longer = open_run(tmp_path)
    longer.position.total_steps = 9
    longer.restore()
    assert (longer.position.total_steps, longer.position.schedule_start) == (9, 4)
    shorter = open_run(tmp_path)
    shorter.position.total_steps = 3
    with pytest.raises(UserError, match="at step 4, beyond the new end at 3"):
        shorter.restore()


def test_what_may_not_be_resumed(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UserError, match="no whole checkpoint"):
        run.restore()
    run.begin(fresh=True)
    with pytest.raises(UserError, match="not the data"):
        open_run(tmp_path, fingerprint="other").restore()
    two = open_run(tmp_path)
    run.position.world = 2
    run.save()
    with pytest.raises(UserError, match="by 2 processes"):
        two.restore()
    with pytest.raises(UserError, match="not empty"):
        claim(tmp_path, fresh=True)


def test_a_row_of_bad_steps_ends_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path, max_bad_steps=2)
    guard = Guard(torch.device("cpu"), 2)
    guard.note(0, guard.judge(torch.tensor(float("nan"))))
    run.settle(guard)
    assert run.position.bad_steps == 1
    guard.note(1, guard.judge(torch.tensor(float("nan"))))
    with pytest.raises(UserError, match="--max-bad-steps 2"):
        run.settle(guard)


def test_positions_and_passports_that_cannot_be_true() -> None:
    assert Position(5, step=1, watched=2).problems()
    assert Position(5, best=2.0).problems()
    assert not Position(5, step=5, watched=5, best=1.0).problems()
    good = Passport(model=tiny_config(), mean=(0.5,) * 3, std=(0.2,) * 3)
    for changes in ({"classes": ("a\x1b[2J",)}, {"head": HeadFacts(blocks=(7,))}, {"head": HeadFacts(width=1 << 40)}):
        assert dataclasses.replace(good, **changes).problems(), changes


def test_all_problems_of_a_config_are_named_at_once() -> None:
    found = SupervisedConfig(batch_size=0, layer_decay=2.0, drop_path=1.0, heldout_share=0.0, device="tpu").problems()
    for flag in ("--batch-size", "--data", "--layer-decay", "--drop-path", "--heldout-share", "--device"):
        assert any(flag in line for line in found), flag
    assert not SupervisedConfig(data="d").problems()


def test_weights_are_written_whole(tmp_path: Path) -> None:
    passport = Passport(model=tiny_config(), mean=(0.5,) * 3, std=(0.2,) * 3)
    write_weights(tmp_path / "w.safetensors", nn.Linear(2, 2), passport)
    (tmp_path / "plain").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "w.safetensors"]
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it"
