"""The decoder of the Keras tutorial on masked image modelling, so that its experiment can be repeated; not a good one.

    mask token (a patch of pixels) -> the encoder's patch embedding + position -> a hidden patch's token
    encoder's output + position                                                -> a visible patch's token
    all tokens, visible ones first -> narrower -> blocks -> one vector -> one layer -> sigmoid -> the whole image

Facts from the tutorial's text (keras.io, "Masked image modeling with Autoencoders"); no line of it stands here:
- the tokens stay in the order of the mask's random draw, so a place in the sequence is another patch in every image,
  while the last layer has weights of its own for each place and each pixel: it is 28 M of the tutorial's 30 M
  parameters. The paper's decoder predicts each patch from its own token;
- the decoder has no positions of its own: the encoder's are added again to visible tokens, and to mask tokens;
- the blocks have heads as wide as the tokens, an MLP of twice the width, and GELU after both of its layers;
- the mask token starts at a deviation of 1, in units of pixels in 0..1.
The last layer's outputs stand here patch by patch, in the tutorial row by row: the same up to the order of its weights.

Shapes: B batch, V visible, M hidden, N = V + M patches of P values, D encoder width, E decoder width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maekit.config import ModelConfig
from maekit.models.blocks import FLAT_MLP_RATIO, TwiceActivatedMlp, attention_of_width
from maekit.models.encoder import EPS, init_linear, patch_weight, prefix_and_positions, run_block
from maekit.models.targets import take_patches


class FlatDecoder(nn.Module):
    """Blocks over all tokens, then one layer from all of them to all pixels."""

    grad_checkpointing = False

    def __init__(self, config: ModelConfig, grid_hw: tuple[int, int], num_prefix: int) -> None:
        super().__init__()
        assert config.embed_dim is not None and config.patch_size is not None and num_prefix == 0
        dim, size, num = config.decoder_dim, config.patch_size**2 * config.in_chans, grid_hw[0] * grid_hw[1]
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        block: Any = partial(
            Block, dim, config.decoder_heads, mlp_ratio=FLAT_MLP_RATIO, qkv_bias=True, norm_layer=norm,
            mlp_layer=TwiceActivatedMlp, attn_layer=attention_of_width(dim),
        )  # fmt: skip
        self.blocks = nn.Sequential(*[block() for _ in range(config.decoder_depth)])
        self.norm = norm(dim)
        self.pred = nn.Linear(num * dim, num * size)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token)

    def sequence(self, encoder: Any, latent_BVD: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """What enters the decoder [B, V + M, D]: it takes the encoder's patch embedding and positions along."""
        _, positions_ND = prefix_and_positions(encoder)
        hidden_11D = F.linear(self.mask_token, patch_weight(encoder), encoder.patch_embed.proj.bias)
        visible = latent_BVD + F.embedding(ids_keep_BV, positions_ND)
        hidden = hidden_11D + F.embedding(ids_masked_BM, positions_ND)
        return torch.cat([visible, hidden], dim=1)

    def forward(self, sequence_BND: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """Predictions [B, M, P], pixels in 0..1, from what `sequence` gives."""
        assert sequence_BND.shape[1] == ids_keep_BV.shape[1] + ids_masked_BM.shape[1]
        tokens = self.embed(sequence_BND)
        for block in self.blocks:
            tokens = run_block(block, tokens, checkpointed=self.grad_checkpointing)
        pixels = self.pred(self.norm(tokens).flatten(1)).sigmoid()
        return take_patches(pixels.unflatten(1, (sequence_BND.shape[1], -1)), ids_masked_BM)
