"""timm's vision transformers as MAE encoders: building, checking, positions and the paper's initialisation.

The encoder stays a plain timm `VisionTransformer`, key names included, so that its weights go anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maekit.config import ModelConfig, UserError, did_you_mean
from maekit.models.blocks import FLAT_MLP_RATIO, TwiceActivatedMlp, attention_of_width
from maekit.models.masking import num_predicted

OFFICIAL_MODELS = {
    "mae_vit_base_patch16": "vit_base_patch16_224",
    "mae_vit_large_patch16": "vit_large_patch16_224",
    "mae_vit_huge_patch14": "vit_huge_patch14_224",
}
"""The paper's sizes (table 3; decoder 512 wide, 8 blocks, 16 heads) and the timm model that each one is."""

EPS = 1e-6
"""LayerNorm's epsilon in encoder and decoder (the paper's code); it is not stored in weight files."""

TOKEN_STD = 0.02
"""Deviation of the class, register and mask tokens at the start (BERT's; the paper's code)."""


@functools.cache
def plain_vit(name: str) -> VisionTransformer:
    """The named model on the meta device (no memory, no weights), checked to be one that MAE can train; for reading.

    Raises:
        UserError: an unknown name (with the nearest ones), or a model that is refused, with the reason.
    """
    timm_name = OFFICIAL_MODELS.get(name, name)
    if not timm.is_model(timm_name):
        known = [*OFFICIAL_MODELS, *timm.list_models("vit_*"), *timm.list_models("deit*")]
        raise UserError(f"--model {name}: no such model; {did_you_mean(name, known)}")
    refuse = f"--model {name}: cannot be pretrained here"
    with torch.device("meta"):
        try:
            model: Any = timm.create_model(timm_name, pretrained=False, num_classes=0)
        except (RuntimeError, NotImplementedError) as error:  # some models compute on tensors while they are built
            raise UserError(f"{refuse}: it cannot be built without data ({error})") from None
    if type(model) is not VisionTransformer:
        raise UserError(f"{refuse}: it is a {type(model).__name__}, and MAE here needs a timm VisionTransformer")
    if type(model.patch_embed) is not PatchEmbed:
        kind = type(model.patch_embed).__name__
        raise UserError(f"{refuse}: its patch embedding is a {kind}; dropping patches needs a plain one")
    if model.pos_embed is None:
        raise UserError(f"{refuse}: it has no absolute position embedding, and hidden patches need a place")
    block = model.blocks[0]
    mlp = getattr(block, "mlp", None)
    if not hasattr(block, "attn") or not hasattr(mlp, "fc1"):
        parts = f"{type(block).__name__} with {type(mlp).__name__}" if mlp is not None else type(block).__name__
        raise UserError(
            f"{refuse}: its blocks are of the kind {parts}; only one attention, then one plain MLP, is known"
        )
    checked: VisionTransformer = model
    return checked


def resolve(config: ModelConfig) -> ModelConfig:
    """The config with every "the model's own" replaced by its value.

    Raises:
        UserError: all that is wrong with model, sizes and heads together, each with the flag to change.
    """
    model: Any = plain_vit(config.model)
    own: dict[str, Any] = {
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "mlp_ratio": model.blocks[0].mlp.fc1.out_features / model.embed_dim,
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
    }
    filled = dataclasses.replace(config, **{k: v for k, v in own.items() if getattr(config, k) is None})
    problems = []
    patch, (height, width) = filled.patch_size, filled.size_hw
    assert patch is not None and filled.embed_dim is not None and filled.num_heads is not None
    if height % patch or width % patch:
        nearest = " ".join(str(max(1, round(side / patch)) * patch) for side in filled.img_size)
        problems.append(
            f"--img-size {' '.join(map(str, filled.img_size))} is not divisible by --patch-size {patch}: "
            f"take --img-size {nearest} or another --patch-size"
        )
    elif height * width // patch**2 < 2:
        problems.append(f"--img-size {height} {width} is a single patch of {patch} px: lower --patch-size")
    if filled.head_dim is None and filled.embed_dim % filled.num_heads:
        problems.append(f"--embed-dim {filled.embed_dim} is not divisible by --num-heads {filled.num_heads}")
    if filled.pos_embed == "sincos" and filled.embed_dim % 4:
        problems.append(f"--embed-dim {filled.embed_dim}: 2-D sine-cosine positions need a multiple of 4")
    if filled.decoder == "flat" and (filled.class_token or filled.reg_tokens):
        problems.append("--decoder flat takes patch tokens only: give --class-token False --reg-tokens 0")
    if filled.target != "pixels" and patch**2 * filled.in_chans < 2:
        problems.append(f"--target {filled.target}: a patch of one value has no deviation; take --target pixels")
    if filled.target == "norm-pixels-whitened" and patch == 1:
        problems.append("--target norm-pixels-whitened: a patch of 1 px has no frequencies; take --target norm-pixels")
    if filled.target == "norm-pixels-highpass" and filled.target_cut > 2 * patch - 2:
        problems.append(f"--target-cut {filled.target_cut}: a patch of {patch} px has none above {2 * patch - 2}")
    if problems:
        raise UserError(*problems)
    return filled


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """The encoder of a resolved config, initialised as in the paper."""
    assert config.patch_size is not None, "resolve the config first"
    special: dict[str, Any] = {}
    if config.head_dim is not None:
        special["attn_layer"] = attention_of_width(config.head_dim)
    if config.mlp_act == "both":
        special["mlp_layer"] = TwiceActivatedMlp
    encoder: Any = timm.create_model(
        OFFICIAL_MODELS.get(config.model, config.model),
        pretrained=False,
        num_classes=0,
        global_pool="",
        img_size=config.size_hw,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=config.class_token,
        reg_tokens=config.reg_tokens,
        drop_path_rate=config.drop_path,
        **special,
    )
    init_encoder(encoder, config.pos_embed)
    built: VisionTransformer = encoder
    return built


def init_encoder(encoder: Any, pos_embed: str) -> None:
    """Initialise as in the paper (appendix A.1): Xavier-uniform linears, the patch embedding as one of them."""
    encoder.blocks.apply(init_linear)
    # A convolution's fan-out counts its kernel; flattened to [D, C*p*p] it is the linear layer that it is.
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    if encoder.patch_embed.proj.bias is not None:
        nn.init.zeros_(encoder.patch_embed.proj.bias)
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=TOKEN_STD)
    if pos_embed == "learned":
        nn.init.trunc_normal_(encoder.pos_embed, std=TOKEN_STD)
        return
    num_prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
    positions = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size, num_prefix)
    encoder.pos_embed.requires_grad_(False)
    if not encoder.pos_embed.is_meta:
        encoder.pos_embed.copy_(positions)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero bias for a linear layer; ones and zeros for a normalisation."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(dim: int, grid_hw: tuple[int, int], num_prefix: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, num_prefix + gh*gw, dim], float32; prefix tokens get zeros.

    The first half of the channels encodes the column, the second the row, each as [sines, cosines] over frequencies
    10000^(-k / (dim/4)): the layout of the released weights.
    """
    assert dim % 4 == 0, dim
    rate = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    row, column = np.divmod(np.arange(grid_hw[0] * grid_hw[1]), grid_hw[1])
    angles = [place[:, None] * rate[None, :] for place in (column, row)]
    patches = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    whole = np.concatenate([np.zeros((num_prefix, dim)), patches])
    return torch.from_numpy(whole).to(torch.float32).unsqueeze(0)


def patch_weight(encoder: Any) -> Tensor:
    """The patch embedding as a linear layer's weight [D, P] for patches flattened (row, column, channel)."""
    weight_DCpp = encoder.patch_embed.proj.weight
    if weight_DCpp.shape[1] > 1:
        weight_DCpp = weight_DCpp.permute(0, 2, 3, 1)
    weight_DP: Tensor = weight_DCpp.flatten(1)  # one channel's gradient would be permuted too, of which DDP warns
    return weight_DP


def prefix_and_positions(encoder: Any) -> tuple[Tensor | None, Tensor]:
    """Class and register tokens with their positions [1, T, D] (None without any), and patch positions [N, D]."""
    tokens = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    num_prefix = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
    positions = encoder.pos_embed[0, num_prefix:]
    if not tokens:
        return None, positions
    prefix = torch.cat(tokens, dim=1)
    return (prefix + encoder.pos_embed[:, :num_prefix] if num_prefix else prefix), positions


def set_eps(module: nn.Module, eps: float) -> None:
    """The epsilon of every LayerNorm inside, which no weights file carries; left alone where it is the usual one."""
    if eps == EPS:  # some of timm's models have a norm with another one, which is meant
        return
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps


def use_fused_attention(module: nn.Module, fused: bool) -> None:
    """Switch every attention layer between scaled_dot_product_attention and plain products with a softmax."""
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused  # type: ignore[assignment]  # timm's own switch, read in every forward pass


def run_block(block: nn.Module, *inputs: Tensor, checkpointed: bool) -> Tensor:
    """A block's output; checkpointed: only its inputs are kept, and the backward pass runs it again (1604.06174)."""
    if checkpointed and torch.is_grad_enabled():
        again: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return again
    out: Tensor = block(*inputs)
    return out


def flops_per_image(config: ModelConfig, num_visible: int) -> float:
    """Floating-point operations of one training step on one image: 3 x the forward pass, 2 per multiply-add.

    A block on n tokens of width d costs n (24 d^2 + 4 n d) at MLP ratio 4; with attention of width a,
    n (8 d a + 16 d^2 + 4 n a). Embedding, projection to the decoder and prediction are added. A cross-attention block
    of width e with Q queries onto K tokens of width d costs Q (20 e^2 + 4 K e) + 4 K d e, and its weighted sum of the
    L + 1 feature maps 2 (L + 1) K d. The flat decoder predicts with one layer from all tokens to all pixels. The prefix
    tokens count as tokens; what gradient checkpointing computes again does not count.
    """
    assert config.embed_dim and config.depth and config.mlp_ratio and config.patch_size and config.num_heads
    size = config.patch_size**2 * config.in_chans
    patches = math.prod(config.size_hw) // config.patch_size**2
    prefix = int(bool(config.class_token)) + (config.reg_tokens or 0)
    seen, width, narrow = num_visible + prefix, config.embed_dim, config.decoder_dim

    def block(tokens: int, dim: int, attention: int, ratio: float) -> float:
        return tokens * (8 * dim * attention + 4 * ratio * dim**2 + 4 * tokens * attention)

    attention = width if config.head_dim is None else config.num_heads * config.head_dim
    forward = 2 * num_visible * size * width + config.depth * block(seen, width, attention, config.mlp_ratio)
    queries = num_predicted(patches, patches - num_visible, config.predict_share)
    if config.decoder == "cross":
        cross = queries * (20 * narrow**2 + 4 * seen * narrow) + 4 * seen * width * narrow
        forward += config.decoder_depth * (cross + 2 * (config.depth + 1) * seen * width)
    elif config.decoder == "flat":
        wide = narrow * config.decoder_heads
        forward += 2 * patches * width * narrow + config.decoder_depth * block(patches, narrow, wide, FLAT_MLP_RATIO)
        queries = patches * patches  # every token has its own weights for every patch
    else:
        forward += 2 * seen * width * narrow + config.decoder_depth * block(patches + prefix, narrow, narrow, 4.0)
    forward += 2 * queries * narrow * size
    return 3 * forward
