"""Our weights for other tools: state dict and config in, state dict and their config out; no file is touched here.

Ours: `encoder.` + timm's names, and `decoder.{embed,mask_token,pos_embed,blocks,norm,pred}`. What a target has no
place for is told by `obstacles`, before anything is mapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maekit.config import ModelConfig
from maekit.models.classifier import Classifier
from maekit.models.encoder import EPS, OFFICIAL_MODELS
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.layouts import LAYOUTS, State
from maekit.weights.passport import Passport

Target = Literal["timm", "hf", "official", "onnx", "torch-export"]

_BLOCK = r"(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
_PLAIN = re.compile(rf"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|blocks\.\d+\.{_BLOCK}|norm\.(weight|bias)")
"""The encoder of the paper, in timm's names: all that the official code and Hugging Face's models have a place for."""
_MEANING = {"ls1": "layer scale", "ls2": "layer scale", "q_norm": "normalised queries", "k_norm": "normalised keys",
            "norm_pre": "a normalisation before the blocks", "reg_token": "register tokens"}  # fmt: skip


def has_decoder(model: MaskedAutoencoder | Classifier) -> bool:
    """Whether there is a trained decoder to take along: weights of an encoder alone, or of a classifier, have none."""
    return isinstance(model, MaskedAutoencoder) and (model.passport is None or model.passport.kind != "encoder")


def hf_class(model: MaskedAutoencoder | Classifier, with_decoder: bool) -> str:
    """The class of transformers that holds the model."""
    if isinstance(model, Classifier):
        return "ViTForImageClassification"
    return "ViTMAEForPreTraining" if with_decoder else "ViTModel"


def obstacles(model: MaskedAutoencoder | Classifier, to: Target, with_decoder: bool) -> list[str]:
    """Everything in this model that the target cannot express, one reason a line; empty where it can be written."""
    if to in ("onnx", "torch-export"):
        return []
    tool = {
        "timm": "timm's VisionTransformer",
        "hf": f"transformers' {hf_class(model, with_decoder).removesuffix('ForPreTraining')}",
        "official": "the official MAE code" if with_decoder else "the official encoder layout",
    }[to]
    config, pooled_norm = model.config, isinstance(model, Classifier) and model.pool == "mean"
    encoder: Any = model.encoder
    found = []
    if config.head_dim is not None:
        found.append(f"--head-dim {config.head_dim}, and its heads share the width among them")
    if config.mlp_act != "between":
        found.append("GELU after both layers of the MLP, and it has one between them")
    if to == "timm":
        return [f"{tool} cannot hold this model: {reason}" for reason in found]
    if not config.class_token:
        found.append("no class token, and it always has one")
    if config.reg_tokens:
        found.append(f"{config.reg_tokens} register tokens, and it has none")
    if model.grid_hw[0] != model.grid_hw[1]:
        found.append(f"a grid of {model.grid_hw[0]} x {model.grid_hw[1]} patches, and it takes square images only")
    if to == "hf" and pooled_norm:
        found.append("pooling by the mean, and it reads the class token (maekit finetune --pool cls does too)")
    if found:  # the names below would only repeat it
        return [f"{tool} cannot hold this model: {reason}" for reason in found]
    names = encoder.state_dict().keys()
    strange = [name for name in names if not _PLAIN.fullmatch(name)]
    if strange:
        part = next((word for word in strange[0].split(".") if word in _MEANING), strange[0])
        found.append(f"{_MEANING.get(part, strange[0])} (`{strange[0]}`), and it has no such parameter")
    blocks = [f"blocks.{i}.{name}" for i in range(len(encoder.blocks)) for name in
              ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
    outer = ("patch_embed.proj",) if pooled_norm else ("norm", "patch_embed.proj")
    wanted = [f"{name}.{kind}" for name in (*blocks, *outer) for kind in ("weight", "bias")]
    if missing := [name for name in wanted if name not in names]:
        found.append(f"no `{missing[0]}`, and it always has one")
    act = encoder.blocks[0].mlp.act
    if type(act) is not nn.GELU or act.approximate != "none":
        found.append(f"the activation {act}, and it has the exact GELU only")
    eps = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) > 1 or ((with_decoder or to == "official") and eps != {EPS}):
        found.append(f"LayerNorm eps {sorted(eps)}, and it has one everywhere, {EPS:g}")
    if with_decoder:
        found += _decoder_obstacles(config, to)
    return [f"{tool} cannot hold this model: {reason}" for reason in found]


def _decoder_obstacles(config: ModelConfig, to: Target) -> list[str]:
    leave = "(--encoder-only writes the encoder alone)"
    found = []
    if config.pos_embed == "learned":
        found.append(f"learned positions, and its own are fixed sine-cosine {leave}")
    if config.decoder != "self":
        found.append(f"a {config.decoder!r} decoder, and it has self-attention only {leave}")
    if config.target not in ("pixels", "norm-pixels"):
        found.append(f"the target {config.target!r}, and it predicts pixels or normalised pixels {leave}")
    if to == "official" and config.in_chans != 3:
        found.append(f"{config.in_chans} channels, and its patches have three {leave}")
    if to == "official" and config.mlp_ratio != 4:
        found.append(f"--mlp-ratio {config.mlp_ratio:g}, and it has one for encoder and decoder, 4 there {leave}")
    return found


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Encoder and classifier's head in timm's names; everything that timm can build, it can hold."""
    return {name.removeprefix("encoder."): value for name, value in state.items() if not name.startswith("decoder.")}


def timm_config(passport: Passport, pool: str) -> dict[str, Any]:
    """What timm's `local-dir:` and `hf-hub:` read from config.json.

    The pooling is timm's: "avg" is the mean of the patch tokens, "token" the class token, "" none. A classifier's mean
    is normalised (`fc_norm`, timm's default), an encoder's is that of normalised tokens. The resizing is that of
    `encode`'s centre crops.
    """
    config, count = passport.model, len(passport.classes)
    return {
        "architecture": OFFICIAL_MODELS.get(config.model, config.model),
        "num_classes": count,
        **({"label_names": list(passport.classes)} if count else {}),
        "num_features": config.embed_dim,
        "global_pool": _TIMM_POOL[pool],
        "model_args": {
            "img_size": list(config.size_hw), "patch_size": config.patch_size, "in_chans": config.in_chans,
            "embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio, "class_token": config.class_token, "reg_tokens": config.reg_tokens,
            "num_classes": count, "global_pool": _TIMM_POOL[pool], "fc_norm": count > 0 and pool == "mean",
        },
        "pretrained_cfg": {
            "tag": "mae", "custom_load": False, "input_size": [config.in_chans, *config.size_hw],
            "fixed_input_size": True, "num_classes": count, "interpolation": passport.interpolation,
            "crop_pct": passport.crop_pct, "crop_mode": "center", "mean": list(passport.mean),
            "std": list(passport.std), "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


_TIMM_POOL = {"mean": "avg", "cls": "token", "tokens": ""}


def to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The names of the released weights: timm's for the encoder, and the decoder's or the classifier's beside them."""
    body, head = _parted(state)
    return {**LAYOUTS["official"].from_maekit(_whole_positions(body, config)), **head}


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """`ViTMAEForPreTraining` in transformers' names; with a head in `state` `ViTForImageClassification`, with the
    encoder alone `ViTModel`.

    The names of transformers 4, which 5 reads as well.
    """
    body, head = _parted(state)
    found = LAYOUTS["hf"].from_maekit(_whole_positions(body, config))
    if head:
        return found | {f"classifier.{name.removeprefix('head.')}": value for name, value in head.items()}
    if any(name.startswith("decoder.") for name in found):
        return found
    return {name.removeprefix("vit."): value for name, value in found.items()}


def hf_config(config: ModelConfig, eps: float, with_decoder: bool) -> dict[str, Any]:
    """The fields of ViTMAEConfig, or of ViTConfig without a decoder; eps is that of the encoder's LayerNorm."""
    assert config.embed_dim is not None and config.mlp_ratio is not None
    found: dict[str, Any] = {
        "hidden_size": config.embed_dim, "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "intermediate_size": round(config.embed_dim * config.mlp_ratio), "hidden_act": "gelu", "qkv_bias": True,
        "layer_norm_eps": eps, "image_size": config.size_hw[0], "patch_size": config.patch_size,
        "num_channels": config.in_chans,
    }  # fmt: skip
    if with_decoder:
        found |= {
            "decoder_hidden_size": config.decoder_dim, "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_heads, "decoder_intermediate_size": 4 * config.decoder_dim,
            "mask_ratio": config.mask_ratio, "norm_pix_loss": config.target == "norm-pixels",
        }  # fmt: skip
    return found


def _parted(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Encoder and decoder, and the head of a classifier: its linear layer and the norm before it."""
    head = {name: value for name, value in state.items() if name.startswith(("head.", "fc_norm."))}
    return {name: value for name, value in state.items() if name not in head}, head


def _whole_positions(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """With a row for the class token, which some timm models do not give a position: there it is zero."""
    positions = state["encoder.pos_embed"]
    assert config.patch_size is not None
    patches = (config.size_hw[0] // config.patch_size) * (config.size_hw[1] // config.patch_size)
    if positions.shape[1] == patches:
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return {**state, "encoder.pos_embed": positions}
