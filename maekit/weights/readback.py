"""Exported weights read back by the tool they were written for, as fresh objects, and compared with ours.

Every function returns the largest absolute difference of each output that both sides have, by name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maekit.config import UserError
from maekit.models.classifier import Classifier
from maekit.models.encoder import EPS, OFFICIAL_MODELS
from maekit.models.mae import MaskedAutoencoder
from maekit.models.targets import patchify
from maekit.weights.export import hf_class

Differences = dict[str, float]


def fixed_images(model: MaskedAutoencoder | Classifier, count: int = 2) -> Tensor:
    """The input of every comparison [count, C, H, W]: pixels in 0..1, always the same."""
    pixels = torch.rand(count, model.config.in_chans, *model.config.size_hw, generator=torch.Generator().manual_seed(0))
    return pixels.to(model.mean.dtype)


def worst(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or a number is not one."""
    if one.shape != other.shape:
        return float("inf")
    found = float((one.detach() - other.detach()).abs().max())
    return found if found == found else float("inf")


def answer(model: MaskedAutoencoder | Classifier, images: Tensor, pool: Any) -> tuple[str, Tensor]:
    """What a plain call of an exported model must give for normalised images, and its name."""
    if isinstance(model, Classifier):
        return "logits", model(images)
    return f"features ({pool})", model.encode(images, pool=pool)


@torch.no_grad()
def read_timm(folder: Path, model: MaskedAutoencoder | Classifier, pool: Any) -> Differences:
    """By `timm.create_model("local-dir:...", pretrained=True)`: all tokens, and what a plain call gives."""
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = model.normalize(fixed_images(model))
    config = timm.data.resolve_model_data_config(theirs)
    told = torch.tensor([*config["mean"], *config["std"]])
    ours = torch.cat([model.mean.flatten(), model.std.flatten()])
    name, expected = answer(model, images, pool)
    return {
        "tokens": worst(theirs.forward_features(images), model.encode(images, pool="tokens")),
        name: worst(theirs(images), expected),
        "mean and std": worst(told, ours),
    }


@torch.no_grad()
def read_hf(folder: Path, model: MaskedAutoencoder | Classifier, with_decoder: bool) -> Differences:
    """By `from_pretrained`: tokens; for ViTMAE loss and predictions under the same masks; for a classifier logits."""
    import transformers

    kind: Any = getattr(transformers, hf_class(model, with_decoder))
    more = {} if with_decoder or isinstance(model, Classifier) else {"add_pooling_layer": False}
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        theirs, told = kind.from_pretrained(folder, output_loading_info=True, **more)
    finally:
        if shown:
            bars.enable_progress_bar()
    _refuse_gaps(told)
    images = model.normalize(fixed_images(model))
    tokens = model.encode(images, pool="tokens")
    if isinstance(model, Classifier):
        theirs.eval()
        return {
            "tokens": worst(theirs.vit(images).last_hidden_state, tokens),
            "logits": worst(theirs(images).logits, model(images)),
        }
    if not with_decoder:
        return {"tokens": worst(theirs.eval()(images).last_hidden_state, tokens)}
    out = model(images, seed=0)
    # They hide the patches of highest noise.
    order = torch.cat([out.ids_keep_BV, out.ids_masked_BM], dim=1)
    noise = torch.zeros(order.shape).scatter(1, order, torch.arange(order.shape[1]).float().expand(order.shape))
    expected = theirs.eval()(images, noise=noise)
    theirs.config.mask_ratio = 0.0
    in_order = torch.arange(model.num_patches).float().expand(len(images), -1)
    return {
        "tokens": worst(theirs.vit(images, noise=in_order).last_hidden_state, tokens),
        "loss": worst(expected.loss, out.loss),
        "predictions": worst(_gather(expected.logits, out.ids_masked_BM), out.pred_BMP),
    }


def _refuse_gaps(told: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers, and only warns."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(what):
            raise UserError(
                f"transformers finds {what.replace('_', ' ')} in what was written: {sorted(told[what])[:4]}"
            )


def _gather(tokens_BND: Tensor, ids_BM: Tensor) -> Tensor:
    return torch.take_along_dim(tokens_BND, ids_BM.unsqueeze(-1), dim=1)


class _OfficialDecoder(nn.Module):
    """A decoder with the official parameter names, as the paper tells it: mask tokens are put in, and all tokens are
    brought back into image order, before the blocks. Ours does neither.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        config, dim = model.config, model.config.decoder_dim
        assert config.embed_dim is not None and config.patch_size is not None
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        self.decoder_embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + model.num_patches, dim))
        blocks = [Block(dim, config.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = norm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)

    def forward(self, latent_BTD: Tensor, ids_keep_BV: Tensor) -> Tensor:
        """Predictions of all patches [B, N, P] from the class token and visible patches."""
        tokens = self.decoder_embed(latent_BTD)
        count = self.decoder_pos_embed.shape[1] - 1
        whole = self.mask_token.repeat(len(tokens), count, 1)
        places = ids_keep_BV.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
        whole = torch.cat([tokens[:, :1], whole.scatter(1, places, tokens[:, 1:])], dim=1) + self.decoder_pos_embed
        predictions: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(whole)))
        return predictions[:, 1:]


@torch.no_grad()
def read_official(file: Path, model: MaskedAutoencoder | Classifier) -> Differences:
    """As the official code reads it (`torch.load`, entry `model`, strict names), into timm's encoder, on which that
    code is built, and a decoder that is written anew: the official one cannot be shipped, its licence is CC-BY-NC.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)["model"]
    config, images = model.config, model.normalize(fixed_images(model))
    inner = {name: value for name, value in state.items() if not name.startswith("decoder_") and name != "mask_token"}
    head: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
    if isinstance(model, Classifier):
        head = {"num_classes": len(model.classes), "global_pool": {"mean": "avg", "cls": "token"}[model.pool]}
    theirs: Any = timm.create_model(
        OFFICIAL_MODELS.get(config.model, config.model), **head, img_size=config.size_hw,
        patch_size=config.patch_size, in_chans=config.in_chans, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, class_token=True, reg_tokens=0, no_embed_class=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(inner, strict=True)
    found = {"tokens": worst(theirs.forward_features(images), model.encode(images, pool="tokens"))}
    if isinstance(model, Classifier):
        return {**found, "logits": worst(theirs(images), model(images))}
    outer = {name: value for name, value in state.items() if name not in inner}
    if not outer:
        return found
    decoder = _OfficialDecoder(model).eval()
    decoder.load_state_dict(outer, strict=True)
    out = model(images, seed=0)
    embedded = theirs.patch_embed(images) + theirs.pos_embed[:, 1:]
    first = (theirs.cls_token + theirs.pos_embed[:, :1]).expand(len(images), -1, -1)
    latent = theirs.norm(theirs.blocks(torch.cat([first, _gather(embedded, out.ids_keep_BV)], dim=1)))
    pred_BMP = _gather(decoder(latent, out.ids_keep_BV), out.ids_masked_BM)
    target = _gather(patchify(images, model.patch_size), out.ids_masked_BM)
    if config.target == "norm-pixels":
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
    return {
        **found,
        "loss": worst(F.mse_loss(pred_BMP, target), out.loss),
        "predictions": worst(pred_BMP, out.pred_BMP),
    }


def read_onnx(file: Path, model: MaskedAutoencoder | Classifier, pool: Any) -> Differences:
    """By onnxruntime on the CPU, for batches of 1 and 3."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        found = session.run(None, {"images": np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(np.asarray(found))

    return _batches(run, model, pool)


def read_torch_export(file: Path, model: MaskedAutoencoder | Classifier, pool: Any) -> Differences:
    """By `torch.export.load`, for batches of 1 and 3."""
    return _batches(torch.export.load(file).module(), model, pool)


@torch.no_grad()
def _batches(run: Any, model: MaskedAutoencoder | Classifier, pool: Any) -> Differences:
    found = {}
    for count in (1, 3):
        images = fixed_images(model, count)
        name, expected = answer(model, model.normalize(images), pool)
        found[f"{name}, batch of {count}"] = worst(run(images), expected)
    return found
