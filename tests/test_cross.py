"""The cross-attention decoder against a slow reference, its files and cost, and gradient checkpointing.

The reference takes one query and one head at a time, in float64; it shares the encoder's loops with test_reference.py
and no code with maekit. What both decoders must do stands in test_model.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_config
from safetensors.torch import save_file
from test_reference import (
    TOLERANCE,
    Weights,
    block,
    cut,
    embedded,
    flatten,
    layer_norm,
    linear,
    mlp,
    positions,
    prefix,
    random_model,
    wanted,
    weights_of,
)
from torch import Tensor

from maekit.config import ModelConfig, PretrainConfig, UserError
from maekit.models.encoder import flops_per_image, resolve
from maekit.models.mae import MaskedAutoencoder
from maekit.models.targets import patchify, take_patches
from maekit.training.optim import make_optimizer
from maekit.weights.passport import Passport, size_problems
from maekit.weights.store import load

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def cross_model(seed: int = 0, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(tiny_config(decoder="cross", **changes), MEAN, STD)


def random_images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(0))


# ---- the reference ----


def read_by(query_E: Tensor, context: list[Tensor], weights: Weights, name: str, num_heads: int) -> Tensor:
    """What one query takes from the context: each head weighs each token in turn."""
    dim = len(query_E)
    size = dim // num_heads
    asked = linear(query_E, weights, f"{name}.q")
    pairs = [linear(token, weights, f"{name}.kv") for token in context]
    heads = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        powers = [torch.exp((asked[part] * pair[:dim][part]).sum() / math.sqrt(size)) for pair in pairs]
        mixed = torch.zeros(size, dtype=torch.float64)
        for power, pair in zip(powers, pairs, strict=True):
            mixed = mixed + power / sum(powers) * pair[dim:][part]
        heads.append(mixed)
    return linear(torch.cat(heads), weights, f"{name}.proj")


def predict_one(maps: list[list[Tensor]], weights: Weights, config: ModelConfig, place_E: Tensor) -> Tensor:
    """The values of the hidden patch with this position, from the encoder's feature maps."""
    query = weights["decoder.mask_token"][0, 0] + place_E
    for index in range(config.decoder_depth):
        name = f"decoder.blocks.{index}"
        context = []
        for token in range(len(maps[0])):
            total = torch.zeros(len(maps[0][0]), dtype=torch.float64)
            for weight, one_map in zip(weights["decoder.mix"][index], maps, strict=True):
                total = total + weight * one_map[token]
            context.append(layer_norm(total, weights, f"{name}.norm_context"))
        normed = layer_norm(query, weights, f"{name}.norm1")
        query = query + read_by(normed, context, weights, f"{name}.attn", config.decoder_heads)
        query = query + mlp(layer_norm(query, weights, f"{name}.norm2"), weights, f"{name}.mlp")
    return linear(layer_norm(query, weights, "decoder.norm"), weights, "decoder.pred")


def reference(
    weights: Weights, config: ModelConfig, images_BCHW: Tensor, visible: list[list[int]], asked: list[list[int]]
) -> tuple[Tensor, list[list[Tensor]]]:
    """The loss over the patches that are asked for, and their predictions."""
    patch, depth, heads = config.patch_size, config.depth, config.num_heads
    assert patch and depth and heads
    grid_hw = (config.size_hw[0] // patch, config.size_hw[1] // patch)
    num_prefix = len(prefix(weights))
    places = positions(config.decoder_dim, grid_hw, num_prefix)
    errors, found = [], []
    for image_CHW, ids_keep, ids_masked in zip(images_BCHW, visible, asked, strict=True):
        maps = [embedded(weights, config, image_CHW, ids_keep)]
        for index in range(depth):
            maps.append(block(maps[-1], weights, f"encoder.blocks.{index}", heads))
        maps[-1] = [layer_norm(token, weights, "encoder.norm") for token in maps[-1]]
        found.append([predict_one(maps, weights, config, places[num_prefix + n]) for n in ids_masked])
        for number, values in zip(ids_masked, found[-1], strict=True):
            truth = flatten(cut(image_CHW, patch, number // grid_hw[1], number % grid_hw[1]))
            errors.append(((values - wanted(truth, config.target)) ** 2).sum() / len(values))
    return torch.stack(errors).sum() / len(errors), found


CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pixels, block mask": {"target": "pixels", "mask": "block"},
    "no class token": {"class_token": False},
    "two registers, learned positions": {"reg_tokens": 2, "pos_embed": "learned"},
    "three encoder blocks, one decoder block": {"depth": 3, "decoder_depth": 1},
    "four channels, pixels": {"in_chans": 4, "target": "pixels"},
    "one patch visible": {"mask_ratio": 0.95, "img_size": (4, 6)},
    "a third predicted": {"predict_share": 0.25},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_predictions_and_gradients_are_the_references(case: str) -> None:
    """All agree with the slow reference to 1e-9, every trainable parameter's gradient included."""
    model = random_model(**{"decoder": "cross", "img_size": (6, 8), **CASES[case]})
    images = torch.randn(2, model.config.in_chans, *model.config.size_hw, dtype=torch.float64)
    out = model(images, seed=1, sample_ids=[3, 4])
    weights = weights_of(model)
    assert weights["decoder.mix"].std() > 0.05  # the sums are no plain means
    visible, asked = out.ids_keep_BV.tolist(), out.ids_masked_BM.tolist()
    loss, found = reference(weights, model.config, images, visible, asked)
    assert abs(out.loss.item() - loss.item()) < TOLERANCE
    for pred_MP, expected in zip(out.pred_BMP, found, strict=True):
        assert (pred_MP - torch.stack(expected)).abs().max() < TOLERANCE
    out.loss.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, theirs = parameter.grad, weights[name].grad
            assert ours is not None and theirs is not None, name
            assert (ours - theirs).abs().max() < TOLERANCE, name


# ---- queries and feature maps ----


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_prediction_depends_on_no_other(decoder: str) -> None:
    """cross: alone, in other company, or beside moved ones, a patch gets the same values; self: it does not."""
    model = random_model(**{**TINY, "decoder": decoder})
    images = random_images().double()
    masks = model.draw_masks([0, 1], seed=0)
    every = model(images, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM).pred_BMP
    changes = []
    for chosen in ([4], [9, 4], [2, 11, 4], range(17, 3, -1)):
        some = model(images, masks.ids_keep_BV, ids_masked=masks.ids_masked_BM[:, chosen]).pred_BMP
        changes.append((some[:, -1] - every[:, 4]).abs().max())
    assert (max(changes) < 1e-12) == (decoder == "cross"), changes
    moved = masks.ids_masked_BM.clone()
    moved[:, 5:] = moved[:, 5:].flip(1)
    other = model(images, masks.ids_keep_BV, ids_masked=moved).pred_BMP
    assert not torch.equal(other[:, 5:], every[:, 5:])
    if decoder == "cross":
        assert torch.equal(other[:, :5], every[:, :5])


def test_every_feature_map_is_weighed_and_used() -> None:
    """Each number of the weighted sums learns, and they start as means; each map of the encoder reaches the loss."""
    model = cross_model(depth=3)
    mix = dict(model.named_parameters())["decoder.mix"]
    assert mix.shape == (2, 4) and (mix == 0.25).all()
    model(random_images()).loss.backward()
    assert mix.grad is not None and mix.grad.abs().min() > 1e-9
    masks = model.draw_masks([0, 1], seed=0)
    patches = take_patches(patchify(random_images(), 4), masks.ids_keep_BV)
    maps = model.encode_blocks(patches, masks.ids_keep_BV)
    assert maps.shape == (4, 2, 7, 32)
    assert torch.equal(maps[-1], model.encode_patches(patches, masks.ids_keep_BV))
    pred: Tensor = model.decoder(maps, masks.ids_keep_BV, masks.ids_masked_BM)
    (slopes,) = torch.autograd.grad(pred.square().sum(), maps)
    assert (slopes.abs().amax(dim=(1, 3)) > 0).all()  # every map, every token, class token included


def test_self_never_collects_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's decoder and encode() need the last map alone, and no other is kept for them."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny_config(), MEAN, STD)
    monkeypatch.delattr(MaskedAutoencoder, "encode_blocks")
    model(random_images())
    cross_model().encode(random_images())


# ---- optimiser, cost, files ----


def test_weighted_sums_do_not_decay() -> None:
    """The sums' numbers are few and scale-free: no weight decay pulls on them, whereas it does on matrices."""
    config = PretrainConfig(**TINY, decoder="cross", weight_decay=0.07)
    model = cross_model()
    decay = {id(p): g["weight_decay"] for g in make_optimizer(model, config, 0.1).param_groups for p in g["params"]}
    weights = dict(model.named_parameters())
    assert decay[id(weights["decoder.mix"])] == 0
    assert decay[id(weights["decoder.blocks.0.attn.kv.weight"])] == 0.07


@pytest.mark.parametrize(("share", "decoder_gflop", "train_gflop"), [(0.25, 4.09, 38.3), (None, 10.37, 57.4)])
def test_operations_of_the_papers_crossmae(share: float | None, decoder_gflop: float, train_gflop: float) -> None:
    """ViT-B/16 with 12 cross blocks, counted by hand; all patches embedded and mixing left out there, 1 % together."""
    config = resolve(ModelConfig(model="mae_vit_base_patch16", decoder="cross", decoder_depth=12, predict_share=share))
    assert flops_per_image(config, 49) == pytest.approx(train_gflop * 1e9, rel=0.012)
    without = dataclasses.replace(config, decoder_depth=0)
    mixing = 12 * 2 * 13 * 50 * 768
    blocks = (flops_per_image(config, 49) - flops_per_image(without, 49)) / 3 - mixing
    assert blocks == pytest.approx(decoder_gflop * 1e9, rel=0.001)


def test_a_file_is_what_it_says(tmp_path: Path) -> None:
    """Saved and loaded, decoder and share come back and predictions are equal; false claims are refused."""
    model = cross_model(predict_share=0.25, reg_tokens=2).eval()
    passport = Passport(model=model.config, mean=tuple(MEAN), std=tuple(STD), grid=model.grid_hw)
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata=passport.to_metadata())
    loaded = load(tmp_path / "m.safetensors")
    assert (loaded.config.decoder, loaded.config.predict_share) == ("cross", 0.25)
    assert torch.equal(loaded(random_images()).pred_BMP, model(random_images()).pred_BMP)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    for claim, words in (
        ({"decoder": "self", "predict_share": None}, "is missing|is unknown"),
        ({"decoder": "self"}, "--predict-share 0.25"),
        ({"decoder_depth": 3}, "--decoder-depth 3"),
    ):
        other = dataclasses.replace(passport, model=dataclasses.replace(model.config, **claim))
        save_file(model.state_dict(), tmp_path / "f.safetensors", metadata=other.to_metadata())
        with pytest.raises(UserError, match=words):
            load(tmp_path / "f.safetensors")


def test_sizes_of_keys_and_values_are_bounded_too() -> None:
    """A claim that is absurd only because keys and values come from a wide encoder is refused before it is built."""
    claim = tiny_config(embed_dim=60_000, depth=1, mlp_ratio=0.1, decoder_depth=999, decoder_dim=8_000)
    assert size_problems(claim) == []
    (problem,) = size_problems(dataclasses.replace(claim, decoder="cross"))
    assert "parameters" in problem


# ---- gradient checkpointing ----


def step(model: MaskedAutoencoder, enable: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes of activations that the forward pass keeps for the backward pass."""
    kept: dict[tuple[int, int], int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    model.set_grad_checkpointing(enable)
    model.zero_grad()
    torch.manual_seed(1)  # stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(random_images(4)).loss
    size = sum(kept.values())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, size


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointing_keeps_less_and_changes_nothing(decoder: str, fused: bool) -> None:
    """The same loss and gradients to the last bit, stochastic depth included, from a third of the activations."""
    torch.manual_seed(0)
    config = tiny_config(decoder=decoder, drop_path=0.3, depth=4, decoder_depth=4)
    model = MaskedAutoencoder(config, MEAN, STD).train()
    plain_loss, plain, plain_bytes = step(model, False)
    loss, grads, size = step(model, True)
    assert torch.equal(loss, plain_loss)
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, plain[name]), name
    assert size < 0.4 * plain_bytes, (size, plain_bytes)
