"""The model: gradients, initialisation, sizes, refusals, encode(), and what may influence what."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import timm
import torch
from conftest import tiny_config
from torch import Tensor, nn

from maekit.config import ModelConfig, UserError
from maekit.models.encoder import build_encoder, patch_weight, resolve, use_fused_attention
from maekit.models.mae import MaskedAutoencoder, model_problems
from maekit.models.masking import make_masks
from maekit.models.targets import patchify, unpatchify

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
BOTH_DECODERS = pytest.mark.parametrize("decoder", ["self", "cross"])


def tiny_model(seed: int = 0, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(tiny_config(**changes), MEAN, STD)


def random_images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


# ---- gradients ----


@BOTH_DECODERS
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 2])
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_every_weight_learns(decoder: str, class_token: bool, reg_tokens: int, pos_embed: str) -> None:
    """One step gives each trainable parameter a gradient that is not zero; fixed positions get none."""
    model = tiny_model(decoder=decoder, class_token=class_token, reg_tokens=reg_tokens, pos_embed=pos_embed)
    assert model.num_prefix == class_token + reg_tokens
    model(random_images(4)).loss.backward()
    fixed = {"decoder.pos_embed"} | ({"encoder.pos_embed"} if pos_embed == "sincos" else set())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in fixed), name
        if name in fixed:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# ---- initialisation ----


@BOTH_DECODERS
def test_initialisation_is_the_papers(decoder: str) -> None:
    """Linear layers and the patch embedding fill the Xavier bounds evenly, biases are 0, norms 1 and 0, tokens 0.02."""
    model = tiny_model(decoder=decoder, embed_dim=128, decoder_dim=64, reg_tokens=8)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all(), name
            assert layer.eps == 1e-6, name
        elif isinstance(layer, nn.Linear):
            check_xavier(layer.weight, name)
            assert (layer.bias == 0).all(), name
    check_xavier(patch_weight(model.encoder), "patch embedding")
    assert (model.encoder.patch_embed.proj.bias == 0).all()
    for token in (model.encoder.cls_token, model.encoder.reg_token, model.decoder.mask_token):
        assert token is not None
        spread = token.std(unbiased=False).item()
        assert abs(spread - 0.02) < 5 * 0.02 / math.sqrt(2 * token.numel()), spread
        assert abs(token.mean().item()) < 5 * 0.02 / math.sqrt(token.numel())


def check_xavier(weight: Tensor, name: str) -> None:
    """Uniform within +-sqrt(6 / (fan in + fan out)): never beyond, nearly reached, with that spread."""
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.98 * bound < weight.abs().max() <= bound, name
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.05, name


def test_learned_positions_start_small() -> None:
    """Learned positions are random with deviation 0.02, not the sine-cosine table."""
    table = tiny_model(pos_embed="learned").encoder.pos_embed
    assert table is not None and table.requires_grad
    assert abs(table.std().item() - 0.02) < 0.002


# ---- sizes ----

FULL_SIZES = {
    "mae_vit_base_patch16": (85_798_656, 26_109_184),
    "mae_vit_large_patch16": (303_301_632, 26_240_256),
    "mae_vit_huge_patch14": (630_764_800, 26_309_708),
}
"""Encoder and decoder with their position tables; B: counted in the released files."""


def encoder_parameters(dim: int, depth: int, patches: int, patch_values: int) -> int:
    """By hand: patch embedding, class token, positions, blocks (4 + 8 D^2, 13 D), last norm."""
    return patch_values * dim + dim + dim + (patches + 1) * dim + depth * (12 * dim**2 + 13 * dim) + 2 * dim


def decoder_parameters(dim: int, patches: int, patch_values: int) -> int:
    """By hand: projection, mask token, positions, 8 blocks of width 512, norm, prediction."""
    blocks = 8 * (12 * 512**2 + 13 * 512)
    return (dim * 512 + 512) + 512 + (patches + 1) * 512 + blocks + 2 * 512 + (512 * patch_values + patch_values)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_official_sizes(name: str) -> None:
    """The paper's three models have the released weights' parameter counts; built without memory."""
    with torch.device("meta"):
        model = MaskedAutoencoder(ModelConfig(model=name), MEAN, STD)
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    assert (encoder, decoder) == FULL_SIZES[name]
    config = model.config
    assert config.embed_dim is not None and config.depth is not None
    patch_values = 3 * model.patch_size**2
    assert encoder == encoder_parameters(config.embed_dim, config.depth, model.num_patches, patch_values)
    assert decoder == decoder_parameters(config.embed_dim, model.num_patches, patch_values)
    if name == "mae_vit_base_patch16":
        assert encoder + decoder == 111_907_840
        assert (model.grid_hw, model.num_visible) == ((14, 14), 49)
        assert config.num_heads == 12 and config.decoder_heads == 16


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eva02_tiny_patch14_224", "it is a Eva"),
        ("resnet50", "it is a ResNet"),
        ("vit_base_r50_s16_224", "its patch embedding is a HybridEmbed"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("aimv2_large_patch14_224", "SwiGLU"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_other_models_are_refused_by_reason(name: str, reason: str) -> None:
    """A model that MAE cannot train here is refused before anything is built, and the message says why."""
    with pytest.raises(UserError) as caught:
        resolve(ModelConfig(model=name))
    assert f"--model {name}" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("vit_base_patch16_225", "vit_base_patch16_224"), ("mae_vit_base_patch", "mae_vit_base_patch16")],
)
def test_unknown_model_gets_near_names(name: str, near: str) -> None:
    """A mistyped name is answered with the nearest ones."""
    with pytest.raises(UserError, match=f"--model {name}: no such model.*{near}"):
        resolve(ModelConfig(model=name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": (30, 24)}, ["--img-size 30 24", "--patch-size 4", "--img-size 32 24"]),
        ({"img_size": (4,)}, ["--img-size 4 4", "--patch-size", "single patch"]),
        ({"num_heads": 5}, ["--embed-dim 32", "--num-heads 5"]),
        ({"embed_dim": 18, "num_heads": 2}, ["--embed-dim 18", "multiple of 4"]),
        ({"patch_size": 1, "in_chans": 1, "target": "norm-pixels"}, ["--target norm-pixels", "no deviation"]),
        ({"patch_size": 1, "target": "norm-pixels-whitened"}, ["--target norm-pixels-whitened", "no frequencies"]),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], words: list[str]) -> None:
    """A size that does not divide names both flags and the way out."""
    (problem,) = model_problems(tiny_config(**changes))
    assert all(word in problem for word in words), problem
    with pytest.raises(UserError, match=words[0]):
        MaskedAutoencoder(tiny_config(**changes), MEAN, STD)


def test_all_size_problems_at_once() -> None:
    """Two mistakes make two lines, not one after the other."""
    assert len(model_problems(tiny_config(img_size=(30, 24), num_heads=5))) == 2
    assert model_problems(tiny_config()) == []


def test_images_of_another_shape_are_refused() -> None:
    """A wrong size or channel count names what was given, what is taken and what may be meant (test_inputs.py)."""
    model = tiny_model()
    for shape in [(1, 3, 16, 16), (1, 1, 16, 24), (3, 16, 24)]:
        with pytest.raises(UserError, match=rf"{re.escape(str(list(shape)))}.*\[batch, 3, 16, 24\]"):
            model.encode(torch.zeros(shape))


# ---- the encoder ----

PLAIN_MODELS = ["test_vit", "test_vit2", "test_vit3", "test_vit4", "deit3_small_patch16_224", "vit_tiny_patch16_224"]


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN_MODELS)
def test_encoder_is_a_plain_timm_model(name: str) -> None:
    """encode() equals timm's own forward_features, also where the class token has no position (deit3)."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        tiny_config(model=name, pos_embed="learned", mlp_ratio=2.0, patch_size=8), MEAN, STD
    ).eval()
    images = random_images()
    expected = model.encoder.forward_features(images)
    tokens = model.encode(images, pool="tokens")
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_resolved_sizes_are_timms() -> None:
    """ "The model's own" of every field builds the same weights as timm does, odd MLP ratios included."""
    for name in ("vit_tiny_patch16_224", "vit_giant_patch14_224", "test_vit2"):
        with torch.device("meta"):
            expected: Any = timm.create_model(name, num_classes=0, global_pool="")
            encoder = build_encoder(resolve(ModelConfig(model=name, img_size=expected.default_cfg["input_size"][1:])))
        assert {k: v.shape for k, v in encoder.state_dict().items()} == {
            k: v.shape for k, v in expected.state_dict().items()
        }, name


@torch.no_grad()
def test_encode_pools_are_consistent() -> None:
    """tokens are class, registers, patches in row-major order; cls is the first, mean that of the patches alone."""
    model = tiny_model(reg_tokens=2)
    images = random_images()
    tokens = model.encode(images, pool="tokens")
    assert tokens.shape == (2, 1 + 2 + 24, 32)
    assert torch.equal(model.encode(images, pool="cls"), tokens[:, 0])
    torch.testing.assert_close(model.encode(images, pool="mean"), tokens[:, 3:].mean(dim=1))
    assert torch.equal(model.encode(images), model.encode(images, pool="mean"))
    with pytest.raises(UserError, match="choose cls, mean or tokens"):
        model.encode(images, pool="max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no class token"):
        tiny_model(class_token=False).encode(images, pool="cls")


@torch.no_grad()
def test_encode_never_masks() -> None:
    """Every patch of the image changes the features, and calls repeat exactly, in training mode too."""
    model = tiny_model().double()
    images = random_images(1).double()
    features = model.encode(images)
    assert torch.equal(model.encode(images), features)
    patches = patchify(images, 4)
    for number in range(24):
        changed = patches.clone()
        changed[:, number] += 1
        assert (model.encode(unpatchify(changed, 4, (4, 6))) - features).abs().max() > 1e-6, number


@torch.no_grad()
def test_encode_does_not_depend_on_the_batch() -> None:
    """A sample's features are its own, whatever else is in the batch and wherever it stands."""
    model = tiny_model().double()
    images = random_images(5).double()
    together = model.encode(images, pool="tokens")
    for index in range(5):
        alone = model.encode(images[index : index + 1], pool="tokens")
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(images.flip(0), pool="tokens"), together.flip(0), rtol=0, atol=1e-12)


@BOTH_DECODERS
@torch.no_grad()
def test_fused_attention_is_the_same_attention(decoder: str) -> None:
    """Switching the attention kernel changes the speed, not the features."""
    model = tiny_model(decoder=decoder).double()
    images = random_images().double()
    layers = [layer for layer in model.modules() if hasattr(layer, "fused_attn")]
    assert len(layers) == 4
    found = []
    for fused in (True, False):
        use_fused_attention(model, fused)
        assert {bool(layer.fused_attn) for layer in layers} == {fused}
        found.append(model(images).pred_BMP)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


# ---- inputs ----


@BOTH_DECODERS
@torch.no_grad()
def test_uint8_equals_normalised_floats(decoder: str) -> None:
    """8-bit pixels are divided by 255 and normalised by the model's own mean and deviation, channel by channel."""
    model = tiny_model(decoder=decoder)
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    by_hand = torch.stack([(pixels[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model.normalize(pixels), by_hand, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.normalize(pixels.float() / 255), by_hand, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(pixels).loss, model(by_hand).loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.encode(pixels), model.encode(by_hand), rtol=0, atol=1e-5)


@BOTH_DECODERS
@torch.no_grad()
@pytest.mark.parametrize("target", ["pixels", "norm-pixels"])
def test_hidden_pixels_reach_only_the_target(decoder: str, target: str) -> None:
    """Other hidden pixels leave every prediction as it was, bit for bit, and change the loss."""
    model = tiny_model(decoder=decoder, target=target)
    images = random_images()
    keep = model.draw_masks([0, 1], seed=0).ids_keep_BV
    first = model(images, keep)
    patches = patchify(images, 4)
    noise = torch.randn_like(patches)
    hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, keep, False)
    other = unpatchify(torch.where(hidden.unsqueeze(-1), noise, patches), 4, (4, 6))
    second = model(other, keep)
    assert torch.equal(first.pred_BMP, second.pred_BMP)
    assert first.loss != second.loss
    visible_changed = unpatchify(torch.where(hidden.unsqueeze(-1), patches, noise), 4, (4, 6))
    assert not torch.equal(first.pred_BMP, model(visible_changed, keep).pred_BMP)


# ---- masks given and drawn ----


@BOTH_DECODERS
@torch.no_grad()
def test_ids_keep_alone_is_enough(decoder: str) -> None:
    """Hidden ids follow from the visible ones: with and without them the results are the same."""
    model = tiny_model(decoder=decoder).double()
    images = random_images().double()
    masks = model.draw_masks([0, 1], seed=0)
    alone = model(images, masks.ids_keep_BV)
    assert (alone.ids_masked_BM.diff(dim=1) > 0).all()
    assert torch.equal(alone.ids_masked_BM, masks.ids_masked_BM.sort(dim=1).values)
    both = model(images, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM)
    assert torch.equal(both.ids_masked_BM, masks.ids_masked_BM)
    assert abs(alone.loss - both.loss) < 1e-12
    place = both.ids_masked_BM.argsort(dim=1).unsqueeze(-1)
    in_order = torch.take_along_dim(both.pred_BMP, place, dim=1)
    torch.testing.assert_close(in_order, alone.pred_BMP, rtol=0, atol=1e-12)


@BOTH_DECODERS
@torch.no_grad()
def test_order_of_visible_patches_does_not_matter(decoder: str) -> None:
    """Permuting ids_keep gives the same loss and predictions: each token carries the position of its patch."""
    model = tiny_model(decoder=decoder).double()
    images = random_images().double()
    keep = model.draw_masks([0, 1], seed=0).ids_keep_BV
    first, second = model(images, keep), model(images, keep.flip(1))
    assert torch.equal(second.ids_keep_BV, keep.flip(1))
    assert abs(first.loss - second.loss) < 1e-9
    torch.testing.assert_close(first.pred_BMP, second.pred_BMP, rtol=0, atol=1e-9)


@torch.no_grad()
def test_drawn_masks_follow_seed_and_sample_ids() -> None:
    """Without ids the masks are those of the pretraining for (seed, sample ids); the default ids are 0..B-1."""
    model = tiny_model(mask="block", mask_ratio=0.6)
    images = random_images(3)
    out = model(images, seed=5, sample_ids=[7, 1, 9])
    expected = make_masks("block", (4, 6), 0.6, [7, 1, 9], seed=5)
    assert torch.equal(out.ids_keep_BV, expected.ids_keep_BV)
    assert torch.equal(out.ids_masked_BM, expected.ids_masked_BM)
    assert torch.equal(model(images).ids_keep_BV, model(images, seed=0, sample_ids=[0, 1, 2]).ids_keep_BV)
    assert not torch.equal(model(images, seed=1).ids_keep_BV, model(images, seed=2).ids_keep_BV)


def test_bad_ids_are_refused() -> None:
    """Ids beyond the grid, or named twice, are the user's mistake and said so."""
    model = tiny_model()
    images = random_images(1)
    with pytest.raises(UserError, match="between 0 and 23"):
        model(images, torch.tensor([[0, 24]]))
    with pytest.raises(UserError, match="twice"):
        model(images, torch.tensor([[0, 3, 3]]))


@BOTH_DECODERS
def test_loss_stays_in_float32_under_bf16(decoder: str) -> None:
    """Under autocast the matrix products are bf16; loss and target are not."""
    model = tiny_model(decoder=decoder)
    images = random_images()
    exact = model(images).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    assert out.pred_BMP.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    target = model.loss(out.pred_BMP.float(), patches_of(images, out.ids_masked_BM))
    assert out.loss == target
    assert abs(out.loss / exact - 1) < 0.02


def patches_of(images: Tensor, ids: Tensor) -> Tensor:
    return torch.take_along_dim(patchify(images, 4), ids.unsqueeze(-1), dim=1)
