"""Loss, predictions and gradients against a slow float64 reference, written from the paper with plain loops.

The reference handles one sample, one token and one head at a time, and puts the decoder's sequence back into image
order. It shares no code with maekit but the names of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import sincos_loops, tiny_config
from torch import Tensor

from maekit.config import ModelConfig
from maekit.models.encoder import sincos_positions
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks

Weights = dict[str, Tensor]
SMALL = {"img_size": (8, 12), "patch_size": 2, "embed_dim": 16, "num_heads": 2, "decoder_dim": 8}
TOLERANCE = 1e-9


# ---- the reference ----


def layer_norm(x_D: Tensor, weights: Weights, name: str) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6), scaled and shifted; the variance is the biased one."""
    mean = x_D.sum() / len(x_D)
    variance = ((x_D - mean) ** 2).sum() / len(x_D)
    return (x_D - mean) / torch.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x_D: Tensor, weights: Weights, name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x_D + weights[f"{name}.bias"]


def gelu(x_D: Tensor) -> Tensor:
    """x times the normal distribution function, exactly."""
    return x_D * 0.5 * (1 + torch.erf(x_D / math.sqrt(2)))


def attention(tokens: list[Tensor], weights: Weights, name: str, num_heads: int) -> list[Tensor]:
    """Multi-head self-attention: each head of each token looks at each token in turn."""
    dim = len(tokens[0])
    size = dim // num_heads
    triples = [linear(token, weights, f"{name}.qkv") for token in tokens]
    out = []
    for query_of in triples:
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            query = query_of[:dim][part]
            scores = [(query * other[dim : 2 * dim][part]).sum() / math.sqrt(size) for other in triples]
            powers = [torch.exp(score) for score in scores]
            total = sum(powers, torch.zeros((), dtype=torch.float64))
            mixed = torch.zeros(size, dtype=torch.float64)
            for power, other in zip(powers, triples, strict=True):
                mixed = mixed + power / total * other[2 * dim :][part]
            heads.append(mixed)
        out.append(linear(torch.cat(heads), weights, f"{name}.proj"))
    return out


def transformer(tokens: list[Tensor], weights: Weights, name: str, depth: int, num_heads: int) -> list[Tensor]:
    """Pre-norm blocks: attention, then an MLP, each added to its input."""
    for index in range(depth):
        tokens = block(tokens, weights, f"{name}.{index}", num_heads)
    return tokens


def block(tokens: list[Tensor], weights: Weights, name: str, num_heads: int) -> list[Tensor]:
    """One of them."""
    normed = [layer_norm(token, weights, f"{name}.norm1") for token in tokens]
    attended = attention(normed, weights, f"{name}.attn", num_heads)
    tokens = [token + change for token, change in zip(tokens, attended, strict=True)]
    return [token + mlp(layer_norm(token, weights, f"{name}.norm2"), weights, f"{name}.mlp") for token in tokens]


def mlp(x_D: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(gelu(linear(x_D, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def positions(dim: int, grid_hw: tuple[int, int], num_prefix: int) -> list[Tensor]:
    """Fixed positions of prefix tokens (zeros) and patches, rounded to float32 as the weights are stored."""
    table = [[0.0] * dim] * num_prefix + sincos_loops(dim, grid_hw)
    return [torch.tensor(line, dtype=torch.float32).double() for line in table]


def cut(image_CHW: Tensor, patch: int, row: int, column: int) -> Tensor:
    """The patch at a place of the grid, [C, p, p]."""
    return image_CHW[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]


def flatten(patch_Cpp: Tensor) -> Tensor:
    """Values of a patch in the order (row, column, channel)."""
    channels, size, _ = patch_Cpp.shape
    values = [patch_Cpp[c, i, j] for i in range(size) for j in range(size) for c in range(channels)]
    return torch.stack(values)


def wanted(values_P: Tensor, target: str) -> Tensor:
    """What the decoder should say: the pixels, or the pixels normalised by their own mean and deviation."""
    if target == "pixels":
        return values_P
    mean = values_P.sum() / len(values_P)
    variance = ((values_P - mean) ** 2).sum() / (len(values_P) - 1)
    return (values_P - mean) / torch.sqrt(variance + 1e-6)


def embedded(weights: Weights, config: ModelConfig, image_CHW: Tensor, visible: list[int]) -> list[Tensor]:
    """What enters the encoder's first block: class token, registers, then the visible patches, with their positions."""
    patch = config.patch_size
    assert patch and config.embed_dim
    grid_hw = (config.size_hw[0] // patch, config.size_hw[1] // patch)
    first = prefix(weights)
    if config.pos_embed == "learned":
        places = list(weights["encoder.pos_embed"][0])
    else:
        places = positions(config.embed_dim, grid_hw, len(first))
    tokens = [token + place for token, place in zip(first, places, strict=False)]
    for number in visible:
        pixels = cut(image_CHW, patch, number // grid_hw[1], number % grid_hw[1])
        kernels = weights["encoder.patch_embed.proj.weight"]
        values = torch.stack([(kernel * pixels).sum() for kernel in kernels])
        tokens.append(values + weights["encoder.patch_embed.proj.bias"] + places[len(first) + number])
    return tokens


def prefix(weights: Weights) -> list[Tensor]:
    """The class token and the registers, those that there are."""
    first = [weights["encoder.cls_token"][0, 0]] if "encoder.cls_token" in weights else []
    return first + (list(weights["encoder.reg_token"][0]) if "encoder.reg_token" in weights else [])


def reference(
    weights: Weights, config: ModelConfig, images_BCHW: Tensor, ids_keep: list[list[int]]
) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """The loss, and for each sample the prediction of each hidden patch."""
    patch, depth, heads = config.patch_size, config.depth, config.num_heads
    assert patch and depth and heads and config.embed_dim
    grid_hw = (config.size_hw[0] // patch, config.size_hw[1] // patch)
    num_patches = grid_hw[0] * grid_hw[1]
    first = prefix(weights)
    decoder_places = positions(config.decoder_dim, grid_hw, len(first))

    errors, all_predictions = [], []
    for image_CHW, visible in zip(images_BCHW, ids_keep, strict=True):
        tokens = transformer(embedded(weights, config, image_CHW, visible), weights, "encoder.blocks", depth, heads)
        tokens = [layer_norm(token, weights, "encoder.norm") for token in tokens]

        narrow = [linear(token, weights, "decoder.embed") for token in tokens]
        seen = dict(zip(visible, narrow[len(first) :], strict=True))
        in_order = narrow[: len(first)]
        in_order += [seen.get(number, weights["decoder.mask_token"][0, 0]) for number in range(num_patches)]
        in_order = [token + place for token, place in zip(in_order, decoder_places, strict=True)]
        in_order = transformer(in_order, weights, "decoder.blocks", config.decoder_depth, config.decoder_heads)
        predictions = {}
        for number in range(num_patches):
            if number in seen:
                continue
            token = layer_norm(in_order[len(first) + number], weights, "decoder.norm")
            predictions[number] = linear(token, weights, "decoder.pred")
            truth = flatten(cut(image_CHW, patch, number // grid_hw[1], number % grid_hw[1]))
            difference = predictions[number] - wanted(truth, config.target)
            errors.append((difference**2).sum() / len(difference))
        all_predictions.append(predictions)
    return torch.stack(errors).sum() / len(errors), all_predictions


# ---- the comparison ----


def random_model(**changes: Any) -> MaskedAutoencoder:
    """A small float64 model in which no trainable weight has a special value: not 0, not 1."""
    config = tiny_config(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, [0.5] * config.in_chans, [0.25] * config.in_chans).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    return model


def weights_of(model: MaskedAutoencoder) -> Weights:
    """Copies of all weights, on their own graph; the fixed positions are left out: the reference makes its own."""
    return {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


CASES: dict[str, dict[str, Any]] = {
    **{
        f"{mask}, {target}": {"mask": mask, "target": target}
        for mask in ("random", "block", "grid")
        for target in ("pixels", "norm-pixels")
    },
    "no class token": {"class_token": False},
    "two registers": {"reg_tokens": 2},
    "registers, no class token": {"class_token": False, "reg_tokens": 2},
    "learned positions": {"pos_embed": "learned"},
    "learned positions, registers": {"pos_embed": "learned", "reg_tokens": 2},
    "learned positions, no class token": {"pos_embed": "learned", "class_token": False},
    "one channel": {"in_chans": 1},
    "four channels, pixels": {"in_chans": 4, "target": "pixels"},
    "tall": {"img_size": (12, 4)},
    "square": {"img_size": (8,)},
    "nothing but one patch hidden": {"mask_ratio": 0.0, "img_size": (4, 6)},
    "one patch visible": {"mask_ratio": 0.95, "img_size": (4, 6)},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_predictions_are_the_papers(case: str) -> None:
    """Every prediction and the loss agree with the slow reference to 1e-9, whatever mask, target, tokens and shape."""
    model = random_model(**CASES[case])
    config = model.config
    images = torch.randn(2, config.in_chans, *config.size_hw, dtype=torch.float64)
    masks = make_masks(config.mask, model.grid_hw, config.mask_ratio, [3, 4], seed=1)
    with torch.no_grad():
        out = model(images, masks.ids_keep_BV)
        loss, predictions = reference(weights_of(model), config, images, masks.ids_keep_BV.tolist())
    assert abs(out.loss.item() - loss.item()) < TOLERANCE
    for pred_MP, ids_M, wanted_by_id in zip(out.pred_BMP, out.ids_masked_BM, predictions, strict=True):
        assert sorted(ids_M.tolist()) == sorted(wanted_by_id)
        for pred_P, number in zip(pred_MP, ids_M.tolist(), strict=True):
            assert (pred_P - wanted_by_id[number]).abs().max() < TOLERANCE, number


@pytest.mark.parametrize("case", ["random, norm-pixels", "learned positions, registers", "four channels, pixels"])
def test_gradients_are_the_papers(case: str) -> None:
    """The gradient of every trainable parameter agrees with that of the slow reference to 1e-9."""
    model = random_model(**{"img_size": (6, 8), **CASES[case]})
    images = torch.randn(2, model.config.in_chans, *model.config.size_hw, dtype=torch.float64)
    ids_keep = model.draw_masks([0, 1], seed=2).ids_keep_BV
    weights = weights_of(model)
    reference(weights, model.config, images, ids_keep.tolist())[0].backward()
    model(images, ids_keep).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, expected = parameter.grad, weights[name].grad
            assert ours is not None and expected is not None, name
            assert (ours - expected).abs().max() < TOLERANCE, name


@pytest.mark.parametrize(("grid_hw", "num_prefix"), [((3, 5), 1), ((5, 3), 0), ((4, 4), 3)])
def test_fixed_positions_are_the_papers(grid_hw: tuple[int, int], num_prefix: int) -> None:
    """Positions made one number at a time equal maekit's; prefix tokens have zeros."""
    table = sincos_positions(16, grid_hw, num_prefix)
    assert table.dtype == torch.float32 and table.shape == (1, num_prefix + math.prod(grid_hw), 16)
    assert not table[0, :num_prefix].any()
    assert (table[0, num_prefix:].double() - torch.tensor(sincos_loops(16, grid_hw)).double()).abs().max() < 1e-7
