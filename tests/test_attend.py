"""maekit attend: the weights of a slow softmax, components with fixed signs, and a sheet that shows them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file

from maekit import cli
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import attend
from maekit.tasks.attend import attention
from maekit.viz.attention import AttentionRow, draw_attention, pca_colors
from maekit.weights.store import random_model


def make(**changes: Any) -> MaskedAutoencoder:
    model = random_model(tiny_config(**changes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "qkv" in name or "norm" in name:
                value.add_(torch.randn_like(value) * 0.3)
    return model


def save(model: MaskedAutoencoder, folder: Path) -> str:
    path = folder / "weights.safetensors"
    save_file(model.state_dict(), path, metadata=model.passport.to_metadata())
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"class_token": False, "reg_tokens": 2}])
def test_weights_are_those_of_a_slow_softmax(block: int, changes: dict[str, Any]) -> None:
    """Token by token and head by head, from the output of the blocks before."""
    model = make(**changes)
    images = torch.rand(2, 3, 16, 24)
    found, tokens = attention(model, images, block)
    torch.testing.assert_close(tokens, model.encode(model.normalize(images), "tokens"))
    encoder: Any = model.encoder
    x = encoder._pos_embed(encoder.patch_embed(model.normalize(images)))
    for before in encoder.blocks[: block - 1]:
        x = before(x)
    layer = encoder.blocks[block - 1]
    rows = layer.norm1(x[1])
    weight, bias = layer.attn.qkv.weight.double(), layer.attn.qkv.bias.double()
    for head in range(4):
        q = [weight[8 * head : 8 * head + 8] @ row.double() + bias[8 * head : 8 * head + 8] for row in rows]
        k = [weight[32 + 8 * head : 40 + 8 * head] @ row.double() + bias[32 + 8 * head : 40 + 8 * head] for row in rows]
        for i in (0, 5, len(q) - 1):
            powers = [math.exp(float(q[i] @ k[j]) / math.sqrt(8)) for j in range(len(k))]
            expected = torch.tensor(powers) / sum(powers)
            torch.testing.assert_close(found[1, head, i], expected, rtol=1e-4, atol=1e-6)


def test_colors_are_the_components() -> None:
    """Two images that vary along three known axes: each is found, in order of variance, with its largest loading up."""
    random = np.random.default_rng(0)
    centred = random.uniform(-1, 1, (2 * 12, 3))
    amounts = np.linalg.qr(centred - centred.mean(axis=0))[0] * [9.0, 3.0, 1.0]  # not correlated by chance
    axes = np.zeros((3, 8))
    axes[0, 5], axes[1, 2], axes[2, 7] = -1, 1, -1  # the sign that was put in does not matter
    colors = pca_colors((amounts @ axes).reshape(2, 12, 8), (3, 4)).reshape(-1, 3)
    for index, sign in enumerate((-1, 1, -1)):
        assert np.corrcoef(colors[:, index], sign * amounts[:, index])[0, 1] > 0.95
    assert colors.min() == 0
    assert colors.max() == 1
    again = pca_colors((-amounts @ -axes).reshape(2, 12, 8), (3, 4)).reshape(-1, 3)
    np.testing.assert_allclose(again, colors, atol=1e-9)


def test_few_or_equal_features_have_colors() -> None:
    assert np.isfinite(pca_colors(np.ones((1, 4, 8)), (2, 2))).all()
    assert pca_colors(np.arange(8.0).reshape(1, 4, 2), (2, 2)).shape == (1, 2, 2, 3)


def test_a_sheet_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is drawn are the class token's weights, row by row of the grid; each map has its brightest color."""
    names = []
    for index in range(2):
        names.append(str(tmp_path / f"image{index}.png"))
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 24, 3), np.uint8)).save(names[-1])
    drawn: list[Any] = []

    def spy(rows: Any, *arguments: Any, **more: Any) -> None:
        drawn[:] = rows
        draw_attention(rows, *arguments, **more)

    monkeypatch.setattr(attend, "draw_attention", spy)
    out, model = tmp_path / "maps.png", make(reg_tokens=1)
    words = ["attend", save(model, tmp_path), "--out", str(out), "--device", "cpu", "--image"]
    assert cli.main([*words, *names]) == 0
    assert "the class token, block 2 of 2" in capsys.readouterr().out
    with Image.open(names[1]) as opened:
        images = torch.from_numpy(np.asarray(opened) / np.float32(255)).permute(2, 0, 1).unsqueeze(0)
    weights = attention(model, images, 2)[0][0]
    for head in range(4):
        for row, column in ((0, 0), (1, 0), (3, 5)):
            expected = float(weights[head, 0, 2 + 6 * row + column].detach())  # after class token and register
            assert drawn[1].weights[head, row, column] == pytest.approx(expected, rel=1e-4)
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1] > 300
        seen = np.asarray(picture.convert("RGB"), np.int64)
    brightest = np.abs(seen - (252, 253, 191)).sum(axis=2) <= 3
    assert brightest.sum() > 8 * 100, "a patch in each of eight maps"

    model = make(class_token=False)
    assert cli.main([*words[:1], save(model, tmp_path), *words[2:], *names, "--block", "1"]) == 0
    assert "no class token), block 1 of 2" in capsys.readouterr().out
    mean = attention(model, images, 1)[0][0].mean(dim=1).unflatten(1, (4, 6))
    np.testing.assert_allclose(drawn[1].weights, mean.detach().numpy(), rtol=1e-4)


def test_stretched_levels_are_told_under_the_sheet(tmp_path: Path) -> None:
    heights = []
    for scale in (1.0, 0.05):
        pixels_HWC = scale * np.random.default_rng(0).uniform(0, 1, (16, 16, 3))
        row = AttentionRow(pixels_HWC, np.zeros((4, 4, 3)), np.ones((1, 4, 4)))
        draw_attention([row], tmp_path / "sheet.png", title="t", note="n", row_labels=["a"])
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[0] < heights[1]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--image", "a.png", "--out", "maps.jpg"], "ends in .png"),
        (["--image", "none.png", "also-none.png"], "--image also-none.png"),
        (["--image", "a.png", "--block", "3"], "blocks 1 to 2"),
        (["--image", "a.png", "--out", "a.png/maps.png"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save("a.png")
    assert cli.main(["attend", save(make(), tmp_path), *more]) == 2
    assert word in capsys.readouterr().err
