"""A decoder of cross-attention alone (CrossMAE, Fu et al. 2024, arXiv 2401.14391), written from facts of the paper.

    encoder's feature maps -> for each decoder block its own weighted sum -> keys and values
    mask token + position of a hidden patch -> query -> blocks -> that patch

Queries never look at each other: a prediction does not depend on which others are made, so any part of the hidden
patches can be asked for, at a cost in proportion.

From the paper: its overview figure with caption, and the operations that were counted from it (they give the number of
maps and the projections):
- the first block's queries are mask tokens with their positions, a later block's are what the block before gave;
- a block has cross-attention and an MLP, no self-attention;
- keys and values of each block come from its own weighted sum of the encoder's feature maps (inter-block attention),
  one learned number for each: the L block outputs and the tokens before the first block, L + 1 in all;
- they are projected from the encoder's width at once; there is no projection to the decoder's width before it.
Ours, where these leave it open, so that details may differ from the paper's: the sums start as plain means and pass a
LayerNorm each (so only the weights' proportions matter); the last map is the encoder's normalised output, so that its
last norm learns too; keys get no positions but those that the encoder's tokens carry; class and register tokens are
keys like the others.

Shapes: B batch, L encoder blocks, S decoder blocks, K = T + V encoder tokens (prefix, then visible), M patches to
predict, P values a patch, D encoder width, E decoder width, h heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, use_fused_attn
from torch import Tensor, nn

from maekit.config import ModelConfig
from maekit.models.encoder import EPS, TOKEN_STD, init_linear, run_block, sincos_positions


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, M, E] onto a context [B, K, D] of another width."""

    fused_attn: bool

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = bool(use_fused_attn())  # timm's convention: `use_fused_attention` switches it
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries_BME: Tensor, context_BKD: Tensor) -> Tensor:
        """What each query read from the context, [B, M, E]."""
        q_BhMe = self.q(queries_BME).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(context_BKD).unflatten(-1, (2, self.num_heads, -1))
        k_BhKe, v_BhKe = kv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q_BhMe, k_BhKe, v_BhKe)
        else:
            scores_BhMK = (q_BhMe * q_BhMe.shape[-1] ** -0.5) @ k_BhKe.transpose(-2, -1)
            mixed = scores_BhMK.softmax(dim=-1) @ v_BhKe
        read: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return read


class CrossBlock(nn.Module):
    """Pre-norm cross-attention, then an MLP, each added to its input; a query's result depends on no other query."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.norm_context = nn.LayerNorm(context_dim, eps=EPS)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, queries_BME: Tensor, context_BKD: Tensor) -> Tensor:
        """The queries [B, M, E] after reading the context [B, K, D]."""
        queries_BME = queries_BME + self.attn(self.norm1(queries_BME), self.norm_context(context_BKD))
        out: Tensor = queries_BME + self.mlp(self.norm2(queries_BME))
        return out


class CrossDecoder(nn.Module):
    """CrossMAE's decoder: blocks of cross-attention from mask tokens onto the encoder's tokens."""

    grad_checkpointing = False

    def __init__(self, config: ModelConfig, grid_hw: tuple[int, int], num_prefix: int) -> None:
        super().__init__()
        assert config.embed_dim is not None and config.depth is not None and config.patch_size is not None
        dim = config.decoder_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        # The prefix's zeros are never read: both decoders' files have one layout.
        positions = sincos_positions(dim, grid_hw, num_prefix)
        self.pos_embed = nn.Parameter(positions.to(self.mask_token.device), requires_grad=False)
        self.mix = nn.Parameter(torch.full((config.decoder_depth, config.depth + 1), 1 / (config.depth + 1)))
        block: Any = partial(CrossBlock, dim, config.embed_dim, config.decoder_heads)
        self.blocks = nn.ModuleList([block() for _ in range(config.decoder_depth)])
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, latent_LBKD: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """Predictions [B, M, P] from all feature maps of the encoder [L + 1, B, T + V, D]."""
        num_prefix = latent_LBKD.shape[2] - ids_keep_BV.shape[1]
        queries = self.mask_token + F.embedding(ids_masked_BM, self.pos_embed[0, num_prefix:])
        # One product for all sums: the maps are read once, and their gradients are not added up block by block.
        context_SBKD = torch.tensordot(self.mix, latent_LBKD, dims=1)
        for block, context_BKD in zip(self.blocks, context_SBKD, strict=True):
            queries = run_block(block, queries, context_BKD, checkpointed=self.grad_checkpointing)
        prediction: Tensor = self.pred(self.norm(queries))
        return prediction
