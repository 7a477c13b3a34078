"""Weights at another input size, patch size or number of channels: as timm does it, and said in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import weight_files as files
from conftest import tiny_config
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from weight_files import assert_close

from maekit.config import UserError
from maekit.weights.resize import adapt_channels, channel_values, resize_kernel, resize_positions
from maekit.weights.store import load, random_model, require_decoder


def saved(tmp_path: Path, **changes: Any) -> tuple[Any, Path]:
    """A model of ours whose every number is random, and its file."""
    mae = random_model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    path = tmp_path / "m.safetensors"
    save_file(mae.state_dict(), path, metadata=mae.passport.to_metadata())
    return mae, path


def test_equal_sizes_change_nothing(tmp_path: Path) -> None:
    mae, path = saved(tmp_path)
    same = load(path, img_size=(16, 24), patch_size=4, in_chans=3)
    for name, value in mae.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    assert not same.key_report.resized
    assert same.key_report.remarks() == []


def test_positions_are_interpolated_on_their_grid_and_prefix_tokens_stay() -> None:
    """A plane that rises along the rows in one channel and along the columns in the other still does."""
    rows, columns = torch.arange(4.0)[:, None].expand(4, 6), torch.arange(6.0).expand(4, 6)
    table = torch.cat([torch.full((1, 2, 2), 7.0), torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)], dim=1)
    wide = resize_positions(table, (4, 6), (8, 12))
    assert torch.equal(wide[:, :2], table[:, :2])
    grid = wide[0, 2:].reshape(8, 12, 2)
    # A new patch lies at (k + 1/2) / 2 - 1/2 of the old ones; the edges, where bicubic clamps, are left out.
    expected = (torch.arange(8.0) + 0.5) / 2 - 0.5
    assert_close(grid[3:5, :, 0], expected[3:5, None].expand(2, 12), rtol=0, atol=1e-4)
    assert (grid[:, 1:, 1] >= grid[:, :-1, 1]).all()
    assert (grid[:, :, 1].std(dim=0) < 1e-5).all()  # columns do not leak into rows
    assert torch.equal(resize_positions(table, (4, 6), (4, 6)), table)


@pytest.mark.parametrize("size", [(32, 48), (24, 16), (8, 8)])
def test_encoder_and_decoder_positions_follow_the_image(size: tuple[int, int], tmp_path: Path) -> None:
    """Against torch's own interpolation; (24, 16) has as many patches as before, on another grid."""
    mae, path = saved(tmp_path)
    other = load(path, img_size=size)
    grid = (size[0] // 4, size[1] // 4)
    assert other.passport.grid == other.grid_hw == grid
    assert other.config.size_hw == size
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        old, new = mae.state_dict()[name], other.state_dict()[name]
        assert torch.equal(new[:, :1], old[:, :1])
        image = old[:, 1:].reshape(1, 4, 6, -1).permute(0, 3, 1, 2)
        expected = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
        assert_close(new[:, 1:], expected.flatten(2).transpose(1, 2))
        assert not torch.equal(new[:, 1 : 1 + 4], old[:, 1 : 1 + 4])
    assert other.key_report.resized == [f"positions 4 x 6 -> {grid[0]} x {grid[1]} (bicubic)"]
    assert not other.key_report.missing
    assert other(torch.randn(2, 3, *size)).loss.isfinite()
    require_decoder(other, "m")


def test_the_encoder_resized_by_timm_is_the_same(tmp_path: Path) -> None:
    """timm's own way of loading a file at another image size and patch size gives the same tokens."""
    mae, path = saved(tmp_path, img_size=(16,))
    weights = {name.removeprefix("encoder."): value for name, value in mae.state_dict().items()}
    weights = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0, "in_chans": 3}
    theirs: Any = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=6, **sizes)
    theirs.load_state_dict(checkpoint_filter_fn(dict(weights), theirs))
    other = load(path, img_size=48, patch_size=6)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert_close(other.encode(images, pool="tokens"), theirs.eval().forward_features(images))
    assert len(other.key_report.resized) == 2


def test_a_new_patch_size_means_a_new_prediction_layer(tmp_path: Path) -> None:
    mae, path = saved(tmp_path)
    other = load(path, patch_size=8)
    assert other.grid_hw == (2, 3)
    assert other.key_report.missing == ["decoder.pred.weight", "decoder.pred.bias"]
    assert other.passport.kind == "encoder"
    assert torch.equal(other.state_dict()["decoder.norm.weight"], mae.state_dict()["decoder.norm.weight"])
    with pytest.raises(UserError, match="not trained"):
        require_decoder(other, "m")
    assert "initial values in decoder.pred" in " ".join(other.key_report.remarks())
    again = load(path, patch_size=8)
    assert torch.equal(again.state_dict()["decoder.pred.weight"], other.state_dict()["decoder.pred.weight"])


@pytest.mark.parametrize("patch", [3, 7, 12])
def test_kernels_see_resized_patches_alike(patch: int) -> None:
    """FlexiViT, section 3.4: where the patch was enlarged, the new kernel's response to it is the old one's."""
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float32)
    resized = resize_kernel(weight, patch)
    assert resized.shape == (5, 3, patch, patch)
    if patch > 4:
        pixels = torch.randn(2, 3, 4, 4)
        larger = F.interpolate(pixels, size=(patch, patch), mode="bicubic", antialias=True)
        old, new = (torch.einsum("bcij,dcij->bd", a, w) for a, w in ((pixels, weight), (larger, resized)))
        assert_close(new, old, rtol=1e-3, atol=1e-3)
    assert torch.equal(resize_kernel(weight, 4), weight)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_channels_are_summed_or_repeated(channels: int, tmp_path: Path) -> None:
    mae, path = saved(tmp_path)
    other = load(path, in_chans=channels)
    old, new = (one.state_dict()["encoder.patch_embed.proj.weight"] for one in (mae, other))
    for channel in range(channels):
        expected = old.sum(dim=1) if channels == 1 else old[:, channel % 3] * 3 / channels
        assert_close(new[:, channel], expected)
    assert len(other.passport.mean) == len(other.passport.std) == channels
    assert other.mean.shape == (1, channels, 1, 1)
    assert bool(other.key_report.missing) == (channels != 3)
    if channels not in (1, 3):
        assert other.passport.mean == tuple(mae.passport.mean[channel % 3] for channel in range(channels))
        given = tuple(0.1 * (1 + channel) for channel in range(channels))
        assert load(path, in_chans=channels, mean=given, std=given).passport.mean == given
        with pytest.raises(UserError, match="the passport of"):
            load(path, in_chans=channels, mean=(0.1, 0.2, 0.3))
    assert other.encode(torch.randn(1, channels, 16, 24)).isfinite().all()


def test_channels_from_other_numbers_than_three() -> None:
    weight = torch.randn(2, 5, 4, 4)
    assert_close(adapt_channels(weight, 1)[:, 0], weight.sum(dim=1))
    assert_close(adapt_channels(weight, 3), weight[:, :3] * 5 / 3)
    assert channel_values((0.2, 0.4), 5) == (0.2, 0.4, 0.2, 0.4, 0.2)
    assert channel_values((0.2, 0.4), 1) == pytest.approx((0.3,))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"img_size": 30}, "not divisible by --patch-size 4"), ({"patch_size": 5}, "not divisible by --patch-size 5"),
        ({"img_size": 0}, "must be positive"), ({"in_chans": -1}, "must be positive"),
        ({"img_size": (16, 16, 16)}, "one number, or height and width"), ({"img_size": 10**6}, "at most"),
        ({"in_chans": 10**6}, "at most"), ({"patch_size": 10**6}, "at most"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(wanted: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        load(saved(tmp_path)[1], **wanted)


def test_registers_keep_their_places(tmp_path: Path) -> None:
    mae, path = saved(tmp_path, reg_tokens=3)
    other = load(path, img_size=(8, 48))
    assert torch.equal(other.state_dict()["encoder.pos_embed"][:, :4], mae.state_dict()["encoder.pos_embed"][:, :4])
    assert other.state_dict()["decoder.pos_embed"].shape == (1, 4 + 2 * 12, 16)


def test_foreign_files_are_resized_too(tmp_path: Path) -> None:
    path = files.save_pth(files.hf4(files.official_full()), tmp_path / "a.pth")
    mae = load(path, img_size=(16, 32), in_chans=1, **files.SAID)
    assert mae.key_report.resized == ["positions 4 x 4 -> 4 x 8 (bicubic)", "channels 3 -> 1 (summed)"]
    assert mae.passport.mean == pytest.approx((0.4,))
    assert len(mae.key_report.summary()) == 2
    grey = load(path, in_chans=1, **(files.SAID | {"mean": (0.3,), "std": (0.1,)}))
    assert (grey.passport.mean, grey.passport.std) == ((0.3,), (0.1,))
