"""The same weights, image and mask in Hugging Face's ViTMAE give the same loss, predictions and features."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import sincos_loops, tiny_config
from torch import Tensor

from maekit.models.encoder import sincos_positions
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks

pytest.importorskip("transformers", reason="needs the [export] extra: transformers")

from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_mae import modeling_vit_mae

GRID = (4, 4)
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def theirs(norm_pix_loss: bool = True) -> ViTMAEForPreTraining:
    """A tiny model of theirs with random weights everywhere, and with the positions that a fresh one lacks."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=16,
            patch_size=4,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            layer_norm_eps=1e-6,  # theirs is 1e-12; the released weights were trained with 1e-6
            mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            rows = sincos_loops(table.shape[-1], GRID)
            table.copy_(torch.tensor([[0.0] * table.shape[-1], *rows]).unsqueeze(0))
    return model


def block_weights(weights: dict[str, Tensor], block: str, name: str) -> dict[str, Tensor]:
    """One transformer block of theirs under timm's names: query, key and value in one matrix."""
    found = {}
    for kind in ("weight", "bias"):
        parts = [weights[f"{block}.attention.{part}_proj.{kind}"] for part in "qkv"]
        found[f"{name}.attn.qkv.{kind}"] = torch.cat(parts)
        for target, source in {
            "attn.proj": "attention.o_proj",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            found[f"{name}.{target}.{kind}"] = weights[f"{block}.{source}.{kind}"]
    return found


def ours(model: ViTMAEForPreTraining) -> MaskedAutoencoder:
    """Our model with their weights, every one of which is used."""
    weights = model.state_dict()
    names = {
        "encoder.cls_token": "vit.embeddings.cls_token",
        "encoder.pos_embed": "vit.embeddings.position_embeddings",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.pos_embed": "decoder.decoder_pos_embed",
    }
    for ours_name, theirs_name in {
        "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.norm": "vit.layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.pred": "decoder.decoder_pred",
    }.items():
        names |= {f"{ours_name}.{kind}": f"{theirs_name}.{kind}" for kind in ("weight", "bias")}
    copied = {ours_name: weights[theirs_name] for ours_name, theirs_name in names.items()}
    for index in range(2):
        copied |= block_weights(weights, f"vit.layers.{index}", f"encoder.blocks.{index}")
        copied |= block_weights(weights, f"decoder.decoder_layers.{index}", f"decoder.blocks.{index}")
    assert sum(value.numel() for value in copied.values()) == sum(value.numel() for value in weights.values())
    target = "norm-pixels" if model.config.norm_pix_loss else "pixels"
    mae = MaskedAutoencoder(tiny_config(img_size=(16,), target=target), [0.5] * 3, [0.25] * 3).eval()
    mae.load_state_dict(copied, strict=True)
    return mae


def noise_for(ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> Tensor:
    """Noise whose ascending order is: visible patches, then hidden ones."""
    order = torch.cat([ids_keep_BV, ids_masked_BM], dim=1)
    ranks = torch.arange(order.shape[1], dtype=torch.float32).expand(order.shape)
    return torch.zeros(order.shape).scatter(1, order, ranks)


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("kind", ["random", "block"])
def test_loss_and_predictions_agree(norm_pix_loss: bool, kind: str) -> None:
    """One mask, given to them as noise: the same loss, and the same prediction of each hidden patch."""
    model = theirs(norm_pix_loss)
    mae = ours(model)
    images = torch.randn(3, 3, 16, 16)
    masks = make_masks(kind, GRID, 0.75, range(3), seed=0)
    expected = model(images, noise=noise_for(masks.ids_keep_BV, masks.ids_masked_BM))
    assert torch.equal(expected.mask.bool(), masks.masked_BN)
    out = mae(images, masks.ids_keep_BV)
    assert_close(out.loss, expected.loss)
    hidden = torch.take_along_dim(expected.logits, out.ids_masked_BM.unsqueeze(-1), dim=1)
    assert out.pred_BMP.std() > 0.1  # the comparison is not one of zeros
    assert_close(out.pred_BMP, hidden)


@torch.no_grad()
def test_features_without_a_mask_agree() -> None:
    """encode() equals their encoder with nothing masked and ordered noise: they shuffle even then."""
    model = theirs()
    encoder = ViTMAEModel(ViTMAEConfig(**{**model.config.to_dict(), "mask_ratio": 0.0})).eval()
    encoder.load_state_dict(model.vit.state_dict())
    images = torch.randn(2, 3, 16, 16)
    expected = encoder(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    mae = ours(model)
    assert_close(mae.encode(images, pool="tokens"), expected)
    assert_close(mae.encode(images, pool="cls"), expected[:, 0])
    assert_close(mae.encode(images, pool="mean"), expected[:, 1:].mean(dim=1))


@pytest.mark.parametrize("grid_hw", [(4, 4), (14, 14)])
def test_positions_are_those_that_they_mean(grid_hw: tuple[int, int]) -> None:
    """Our sine-cosine table is their helper's with its halves swapped, as they do for the released weights."""
    helper = getattr(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", None)
    if helper is None:
        pytest.skip("this transformers has no build_2d_sinusoidal_position_embedding")
    row_first = helper(height=grid_hw[0], width=grid_hw[1], embed_dim=32, cls_token=True)
    expected = torch.cat([row_first[:, 16:], row_first[:, :16]], dim=1)
    torch.testing.assert_close(sincos_positions(32, grid_hw, 1)[0], expected, rtol=0, atol=1e-7)
