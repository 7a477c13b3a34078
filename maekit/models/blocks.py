"""Parts of timm's blocks that differ from ViT's, for the encoder and for the decoder of the Keras tutorial.

Parameters keep timm's names, so a block made of them is read and written like any other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

FLAT_MLP_RATIO = 2.0
"""Width of the MLP over its own width in the blocks of the flat decoder, as in the tutorial (64, 128, 64)."""


@functools.cache
def attention_of_width(head_dim: int) -> type[Attention]:
    """timm's attention with heads of this width, so that all heads together may be wider than the tokens.

    A class, since a block of timm's takes no instance and passes no width on.
    """

    class WideAttention(Attention):
        def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
            super().__init__(dim, num_heads, attn_head_dim=head_dim, **options)

    return WideAttention


@torch.no_grad()
def start_as_keras(model: nn.Module) -> None:
    """Draw anew what Keras begins otherwise than the paper: weights of attention, and learned positions.

    Its Glorot-uniform limit is sqrt(6 / (fan in + fan out)), whose fans of a kernel [a, b, c] are a x b and a x c. It
    holds queries, keys and values of H heads of K as [D, H, K], and the output as [H, K, D]; positions are an
    embedding, uniform within 0.05 (keras.initializers). Other linear layers begin alike.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            dim, heads, width = module.qkv.in_features, module.num_heads, module.head_dim
            for weight, limit in (
                (module.qkv.weight, math.sqrt(6 / (dim * (heads + width)))),
                (module.proj.weight, math.sqrt(6 / (heads * (width + dim)))),
            ):
                nn.init.uniform_(weight, -limit, limit)
    for name, positions in model.named_parameters():
        if name.endswith("pos_embed") and positions.requires_grad:
            nn.init.uniform_(positions, -0.05, 0.05)


class TwiceActivatedMlp(Mlp):
    """timm's MLP with its activation after the second layer too; each is followed by dropout, as in the tutorial."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] to [B, N, D]."""
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))
        out: Tensor = self.drop2(self.act(self.fc2(hidden)))
        return out
