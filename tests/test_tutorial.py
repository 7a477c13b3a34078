"""The Keras tutorial's model against a slow reference written from its text, and its recipes number by number."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maekit import recipes
from maekit.config import ModelConfig, PretrainConfig
from maekit.data.loader import MemoryPool
from maekit.data.parts import ArrayPart
from maekit.data.transforms import apply_to_batch, apply_to_image, random_crops
from maekit.models.blocks import start_as_keras
from maekit.models.encoder import flops_per_image, resolve, use_fused_attention
from maekit.models.mae import MaskedAutoencoder, model_problems
from maekit.training.optim import learning_rate, make_optimizer

Array = npt.NDArray[np.float64]
NAMES = {
    "keras-3x1-m60": (3, 1, 38),
    "keras-3x1-m75": (3, 1, 48),
    "keras-6x2-m75": (6, 2, 48),
    "keras-9x3-m75": (9, 3, 48),
}


def tiny_config(**changes: Any) -> ModelConfig:
    """The recipe's architecture at a size for loops."""
    sizes: dict[str, Any] = {"img_size": (12, 18), "embed_dim": 8, "depth": 2, "num_heads": 2, "head_dim": 6}
    sizes |= {"decoder_dim": 4, "decoder_heads": 3} | changes
    config = replace(recipes.get("keras-6x2-m75"), **sizes)
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.__dataclass_fields__})


def tiny_model(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny_config(**changes), (0.0,) * 3, (1.0,) * 3).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and normalisations too must count
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---- the reference: NumPy, one image, one token, one head at a time ----


def gelu(x: Array) -> Array:
    return np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel()]).reshape(x.shape)


def norm(x: Array, w: dict[str, Array], name: str) -> Array:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(x: Array, w: dict[str, Array], name: str) -> Array:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def attend(tokens: list[Array], w: dict[str, Array], name: str, heads: int, key_dim: int) -> list[Array]:
    """Heads of `key_dim` each, whatever the tokens' width; the result is projected back to it."""
    whole = heads * key_dim
    triples = [dense(token, w, f"{name}.qkv") for token in tokens]
    out = []
    for mine in triples:
        read = []
        for head in range(heads):
            part = slice(head * key_dim, (head + 1) * key_dim)
            scores = np.array([mine[:whole][part] @ it[whole : 2 * whole][part] for it in triples]) / math.sqrt(key_dim)
            share = np.exp(scores) / np.exp(scores).sum()
            read.append(sum(s * it[2 * whole :][part] for s, it in zip(share, triples, strict=True)))
        out.append(dense(np.concatenate(read), w, f"{name}.proj"))
    return out


def blocks(tokens: list[Array], w: dict[str, Array], room: str, depth: int, heads: int, key_dim: int) -> list[Array]:
    """Pre-norm attention and an MLP with GELU after both layers, then the last normalisation."""
    for number in range(depth):
        at = f"{room}.blocks.{number}"
        mixed = attend([norm(x, w, f"{at}.norm1") for x in tokens], w, f"{at}.attn", heads, key_dim)
        tokens = [x + y for x, y in zip(tokens, mixed, strict=True)]
        hidden = [gelu(dense(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp.fc1")) for x in tokens]
        tokens = [x + gelu(dense(y, w, f"{at}.mlp.fc2")) for x, y in zip(tokens, hidden, strict=True)]
    return [norm(x, w, f"{room}.norm") for x in tokens]


def cut(image_HWC: Array, patch: int) -> list[Array]:
    height, width, _ = image_HWC.shape
    return [
        image_HWC[y : y + patch, x : x + patch].reshape(-1)
        for y in range(0, height, patch)
        for x in range(0, width, patch)
    ]


def reference(
    model: MaskedAutoencoder, image_HWC: Array, keep: list[int], masked: list[int]
) -> tuple[Array, list[Array]]:
    """The whole predicted image and the squared errors of its hidden patches."""
    config, patch = model.config, model.patch_size
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    kernel = w["encoder.patch_embed.proj.weight"].transpose(0, 2, 3, 1).reshape(config.embed_dim or 0, -1)
    w |= {"project.weight": kernel, "project.bias": w["encoder.patch_embed.proj.bias"]}
    positions, patches = w["encoder.pos_embed"][0], cut(image_HWC, patch)
    visible = [dense(patches[n], w, "project") + positions[n] for n in keep]
    encoded = blocks(visible, w, "encoder", config.depth or 0, config.num_heads or 0, config.head_dim or 0)
    token = dense(w["decoder.mask_token"].reshape(-1), w, "project")
    sequence = [x + positions[n] for x, n in zip(encoded, keep, strict=True)] + [token + positions[n] for n in masked]
    narrow = [dense(x, w, "decoder.embed") for x in sequence]
    last = blocks(narrow, w, "decoder", config.decoder_depth, config.decoder_heads, config.decoder_dim)
    values = 1 / (1 + np.exp(-dense(np.concatenate(last), w, "decoder.pred")))
    # Its layer writes the image; ours the same values patch by patch.
    (height, width), picture = config.size_hw, np.zeros(image_HWC.shape)
    for y in range(height):
        for x in range(width):
            number = (y // patch) * (width // patch) + x // patch
            start = (number * patch * patch + (y % patch) * patch + x % patch) * 3
            picture[y, x] = values[start : start + 3]
    found = cut(picture, patch)
    return picture, [(found[n] - patches[n]) ** 2 for n in masked]


@pytest.mark.parametrize("heads", [{}, {"num_heads": 3, "head_dim": 4, "decoder_depth": 1}])
def test_loss_and_predictions_are_the_references(heads: dict[str, int]) -> None:
    """float64, 1e-9: 2 of 6 patches visible, both groups in the order of the draw, not of the image."""
    model = tiny_model(**heads)
    images = torch.rand(2, 3, 12, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep, masked = torch.tensor([[4, 1], [0, 5]]), torch.tensor([[2, 5, 0, 3], [3, 1, 4, 2]])
    out = model(images, keep, ids_masked=masked)
    errors = []
    for row in range(2):
        image = images[row].permute(1, 2, 0).numpy()
        picture, squares = reference(model, image, keep[row].tolist(), masked[row].tolist())
        expected = np.stack([cut(picture, 6)[n] for n in masked[row].tolist()])
        np.testing.assert_allclose(out.pred_BMP[row].detach().numpy(), expected, rtol=0, atol=1e-9)
        errors += squares
    assert out.loss.item() == pytest.approx(float(np.mean(errors)), abs=1e-9)


def test_the_order_of_the_draw_changes_the_prediction() -> None:
    """The flaw that the tutorial's decoder has and the paper's has not: the same patches, drawn in another order."""
    keep, masked = torch.tensor([[4, 1]]), torch.tensor([[2, 5, 0, 3]])
    images = torch.rand(1, 3, 12, 18, dtype=torch.float64)
    for decoder, same in (("flat", False), ("self", True)):
        model = tiny_model(decoder=decoder, decoder_heads=2)
        one = model(images, keep, ids_masked=masked)
        other = model(images, keep.flip(1), ids_masked=masked)
        assert torch.allclose(one.pred_BMP, other.pred_BMP, atol=1e-9) == same


def test_every_weight_learns_the_mask_token_too() -> None:
    model = tiny_model()
    model(torch.rand(4, 3, 12, 18, dtype=torch.float64)).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())


# ---- the recipes ----


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_tutorials_experiment(name: str) -> None:
    """Parameters as its summary prints them for 6 blocks (1,981,696; 22,144), as counted by hand for the others."""
    depth, decoder_depth, hidden = NAMES[name]
    config = recipes.get(name)
    assert not config.problems() + model_problems(config)
    with torch.device("meta"):
        model = MaskedAutoencoder(config, config.mean or (), config.std or ())
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    patch_encoder = sum(
        sizes[f"encoder.{key}"] for key in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    )
    assert patch_encoder == 22_144
    encoder = sum(size for key, size in sizes.items() if key.startswith("encoder.")) - patch_encoder
    block = 3 * (128 * 512 + 512) + (512 * 128 + 128) + (128 * 256 + 256) + (256 * 128 + 128) + 4 * 128
    assert encoder == depth * block + 256
    assert depth != 6 or encoder == 1_981_696
    narrow = 3 * (64 * 256 + 256) + (256 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64) + 4 * 64
    rest = (128 * 64 + 64) + 128 + (64 * 64 * 6912 + 6912) + 108
    assert sum(size for key, size in sizes.items() if key.startswith("decoder.")) == decoder_depth * narrow + rest
    assert (model.num_patches, model.num_patches - model.num_visible) == (64, hidden)
    assert (config.weight_decay, config.lr, config.batch_size) == (1e-5 if depth == 9 else 1e-4, 5e-3, 256)
    assert "deviations" in recipes.header(name)


def test_first_values_are_keras_own() -> None:
    """Its fans of a kernel [a, b, c] are a b and a c: queries of 4 heads of 128 from 128 wide tokens begin within
    sqrt(6 / (128 x 4 + 128 x 128)); the rest begins as it does without a word.
    """
    config = recipes.get("keras-6x2-m75")
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.0,) * 3, (1.0,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_as_keras(model)
    limits = {"encoder.pos_embed": 0.05}
    for part, dim, heads, width in (("encoder", 128, 4, 128), ("decoder", 64, 4, 64)):
        limits[f"{part}.blocks.1.attn.qkv.weight"] = math.sqrt(6 / (dim * heads + dim * width))
        limits[f"{part}.blocks.1.attn.proj.weight"] = math.sqrt(6 / (heads * width + heads * dim))
    for name, value in model.state_dict().items():
        if name in limits:
            assert 0.99 * limits[name] < float(value.abs().max()) <= limits[name], name
        elif "attn" not in name:
            assert torch.equal(value, before[name]), name
    assert (config.first_values, config.adam_eps) == ("keras", 1e-7)
    assert make_optimizer(model, config, 1.0).defaults["eps"] == 1e-7


def test_the_schedule_is_the_tutorials() -> None:
    """Its two formulas, at 15,600 steps of which 15 % are warm-up."""
    total, warmup, peak = 15_600, 2_340, 5e-3
    for step in (0, 1, 1_000, 2_339, 2_340, 9_000, 15_599, 15_600):
        expected = peak / warmup * step if step < warmup else 0.5 * peak * (
            1 + math.cos(math.pi * (step - warmup) / (total - warmup))
        )  # fmt: skip
        assert learning_rate(step, total, warmup, peak, 0.0) == pytest.approx(expected, abs=1e-12)


def test_flops_are_those_that_torch_counts() -> None:
    config = resolve(tiny_config(img_size=(48,), embed_dim=128, depth=2, num_heads=4, head_dim=128, decoder_dim=64))
    model = MaskedAutoencoder(config, (0.0,) * 3, (1.0,) * 3)
    use_fused_attention(model, False)  # the fused kernel's are not counted on a CPU
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 48, 48))
    assert flops_per_image(config, model.num_visible) / 3 == pytest.approx(counter.get_total_flops(), rel=0.01)


def bilinear(image_HWC: Array, side: int) -> Array:
    """Each output pixel from its four neighbours by hand, edges repeated: TensorFlow's resize, half-pixel centres."""
    height, width, _ = image_HWC.shape
    out = np.zeros((side, side, 3))
    for y in range(side):
        for x in range(side):
            at_y, at_x = (y + 0.5) * height / side - 0.5, (x + 0.5) * width / side - 0.5
            top, left = math.floor(at_y), math.floor(at_x)
            for row, share in ((top, 1 - at_y + top), (top + 1, at_y - top)):
                for column, part in ((left, 1 - at_x + left), (left + 1, at_x - left)):
                    pixel = image_HWC[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                    out[y, x] += share * part * pixel
    return out


def test_images_are_resized_cropped_and_mirrored_as_the_tutorial_does() -> None:
    """32 px -> 52 by a slow bilinear loop, then 48 of them at one of 5 x 5 places; held-out images straight to 48."""
    config = recipes.get("keras-6x2-m75")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    pool = MemoryPool(ArrayPart(pixels, None, None, 3), config, torch.device("cpu"), (32, 32))
    ids = np.arange(6)
    crops = random_crops(config, np.tile([[32, 32]], (6, 1)), ids, epoch=0)
    (batch,) = pool.train_batches([(0, ids)])
    assert len({(*offset, flip) for offset, flip in zip(crops.offset.tolist(), crops.flip.tolist(), strict=True)}) > 3
    for index in range(6):
        y, x = crops.offset[index]
        expected = bilinear(pixels[index] / 255, 52)[y : y + 48, x : x + 48]
        expected = expected[:, ::-1] if crops.flip[index] else expected
        np.testing.assert_allclose(batch.images[index].permute(1, 2, 0), expected, atol=1e-5)
        one = apply_to_image(pixels[index], crops, index, (48, 48)).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(one / 255, expected, atol=1.01 / 255)
    (held,) = pool.eval_batches(ids[:1], 1)
    np.testing.assert_allclose(held.images[0].permute(1, 2, 0), bilinear(pixels[0] / 255, 48), atol=1e-5)
    assert not torch.allclose(
        apply_to_batch(pool.images_NCHW, replace(crops, interpolation="bicubic"), (48, 48)), batch.images
    )


# ---- what is refused ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target": "norm-pixels"}, "--decoder flat ends in a sigmoid, so give --target pixels"),
        ({"mean": None, "std": None}, "it needs --mean 0 0 0 --std 1 1 1"),
        ({"mean": (0.5,) * 3}, "it needs --mean 0 0 0 --std 1 1 1"),
        ({"class_token": True}, "--class-token False"),
        ({"class_token": None}, "--class-token False"),
        ({"reg_tokens": 1}, "--reg-tokens 0"),
        ({"head_dim": 0}, "--head-dim 0: must be above 0"),
        ({"train_images": 0}, "--train-images 0: must be above 0"),
        ({"predict_share": 0.25}, "take --decoder cross"),
        ({"target": "norm-pixels-highpass", "decoder": "self", "target_cut": 11}, "--target-cut 11: a patch of 6 px"),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, Any], words: str) -> None:
    config: PretrainConfig = replace(recipes.get("keras-6x2-m75"), **flags)
    found = config.problems() + model_problems(config)
    assert len(found) == 1, found
    assert words in found[0]


def test_heads_of_their_own_width_need_not_divide_the_encoders() -> None:
    assert not model_problems(tiny_config(num_heads=3))
    assert any("--num-heads 3" in line for line in model_problems(tiny_config(num_heads=3, head_dim=None)))
