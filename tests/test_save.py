"""`maekit.save`: weights from a loop of one's own, as a source for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import nn

import maekit
from maekit.config import UserError
from maekit.models.mae import MaskedAutoencoder

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_what_was_saved_is_loaded_with_its_sizes_and_statistics(tmp_path: Path) -> None:
    model = MaskedAutoencoder(tiny_config(mask_ratio=0.6, target="pixels"), MEAN, STD)
    path = tmp_path / "mine.safetensors"
    maekit.save(model, path, epochs=2.5, data="mine", license="CC0")
    again = maekit.load(path)
    assert again.config == model.config
    assert again.mean.flatten().tolist() == pytest.approx(MEAN) and again.std.flatten().tolist() == pytest.approx(STD)
    assert (again.passport.epochs, again.passport.data, again.passport.weights_license) == (2.5, "mine", "CC0")
    images = torch.randint(0, 256, (2, 3, *model.config.size_hw), dtype=torch.uint8)
    assert torch.equal(again(images, seed=1).loss, model.eval()(images, seed=1).loss)


def test_a_loaded_model_keeps_what_its_file_said(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    maekit.save(MaskedAutoencoder(tiny_config(), MEAN, STD), first, epochs=1, data="one", license="CC0")
    model = maekit.load(first)
    nn.init.ones_(model.decoder.pred.bias)
    maekit.save(model, second, epochs=3)
    again = maekit.load(second)
    assert (again.passport.epochs, again.passport.data, again.passport.weights_license) == (3, "one", "CC0")
    assert bool((again.decoder.pred.bias == 1).all()) and maekit.load(first).passport.epochs == 1


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.pth: weights are written as NAME\.safetensors"):
        maekit.save(MaskedAutoencoder(tiny_config(), MEAN, STD), tmp_path / "mine.pth")
    with pytest.raises(UserError, match="a Linear without a passport"):
        maekit.save(nn.Linear(2, 2), tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrapped_and_small_models_are_saved_as_what_they_are(tmp_path: Path) -> None:
    """Names of weights without the wrappers' prefixes, numbers as float32: else no command could read the file."""
    model = MaskedAutoencoder(tiny_config(), MEAN, STD).eval()
    images = torch.randint(0, 256, (2, 3, *model.config.size_hw), dtype=torch.uint8)
    path = tmp_path / "new" / "folder" / "mine.safetensors"
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert isinstance(wrapped, nn.Module)
        maekit.save(wrapped, path)
        assert torch.equal(maekit.load(path).encode(images), model.encode(images))
    half = maekit.load(path).half()
    maekit.save(half, path)
    again = maekit.load(path)
    assert again.decoder.pred.weight.dtype == torch.float32
    assert torch.equal(again.decoder.pred.weight, half.decoder.pred.weight.float())


def test_facts_that_no_file_can_hold_are_refused_before_it_is_written(tmp_path: Path) -> None:
    model = MaskedAutoencoder(tiny_config(), MEAN, STD)
    path = tmp_path / "mine.safetensors"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"epochs": "many"}, "epochs='many': must be a number"), ({"epochs": -1}, "epochs=-1: must not be negative"),
        ({"epochs": float("nan")}, "epochs=nan"), ({"data": "two\nlines"}, "not printable"),
    ]  # fmt: skip
    for named, words in wrong:
        with pytest.raises(UserError, match=words):
            maekit.save(model, path, **named)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        maekit.save(model, tmp_path / "file" / "mine.safetensors")
