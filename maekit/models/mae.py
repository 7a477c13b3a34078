"""Masked autoencoders (He et al. 2021, arXiv 2111.06377): the paper in one file.

    images -> patches -> visible patches -> encoder -> + mask tokens -> decoder -> hidden patches -> loss

Only visible patches are embedded; only hidden ones are predicted and scored. The decoder sees [prefix, visible,
mask tokens], each with the position of its patch: attention does not depend on the order of its tokens, so the
sequence need not be put back into image order (the tests check this against one that is). Decoders that are not the
paper's stand in cross.py and flat.py.

Shapes: B batch, C channels, H x W pixels, N patches of P = p*p*C values, V visible, M hidden, T prefix tokens
(class, then registers), D encoder width, E decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maekit.config import ModelConfig, UserError
from maekit.models.cross import CrossDecoder
from maekit.models.encoder import (
    EPS,
    TOKEN_STD,
    build_encoder,
    init_linear,
    patch_weight,
    prefix_and_positions,
    resolve,
    run_block,
    sincos_positions,
)
from maekit.models.flat import FlatDecoder
from maekit.models.inputs import check_draw, check_keep, described, never_compiled, normalized, ready
from maekit.models.masking import Masks, choose_predicted, make_masks, masks_from_keep, num_predicted, num_visible
from maekit.models.targets import make_target, patchify, take_patches, target_spectrum


class MAEOutput(NamedTuple):
    """What a forward pass gives: a float32 scalar, predictions of the hidden patches, and which patches were which."""

    loss: Tensor
    pred_BMP: Tensor
    ids_masked_BM: Tensor
    ids_keep_BV: Tensor


class SelfDecoder(nn.Module):
    """The paper's decoder: blocks of self-attention over visible tokens and mask tokens (section 3, appendix A.1)."""

    grad_checkpointing = False

    def __init__(self, config: ModelConfig, grid_hw: tuple[int, int], num_prefix: int) -> None:
        super().__init__()
        assert config.embed_dim is not None and config.patch_size is not None
        dim = config.decoder_dim
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, grid_hw, num_prefix)
        self.pos_embed = nn.Parameter(positions.to(self.mask_token.device), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        self.blocks = nn.Sequential(
            *[
                Block(dim, config.decoder_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
                for _ in range(config.decoder_depth)
            ]
        )
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, latent_BTVD: Tensor, ids_keep_BV: Tensor, ids_masked_BM: Tensor) -> Tensor:
        """Predictions [B, M, P] from the encoder's output [B, T + V, D]."""
        num_prefix = latent_BTVD.shape[1] - ids_keep_BV.shape[1]
        prefix_position, position_NE = self.pos_embed[:, :num_prefix], self.pos_embed[0, num_prefix:]
        tokens = self.embed(latent_BTVD)
        prefix = tokens[:, :num_prefix] + prefix_position
        visible = tokens[:, num_prefix:] + F.embedding(ids_keep_BV, position_NE)
        hidden = self.mask_token + F.embedding(ids_masked_BM, position_NE)
        sequence = torch.cat([prefix, visible, hidden], dim=1)
        for block in self.blocks:
            sequence = run_block(block, sequence, checkpointed=self.grad_checkpointing)
        last = sequence[:, -ids_masked_BM.shape[1] :]
        prediction: Tensor = self.pred(self.norm(last))
        return prediction


class MaskedAutoencoder(nn.Module):
    """A timm vision transformer with a decoder, trained to predict hidden patches.

    Images are [B, C, H, W]: uint8 pixels (0..255), which are normalised here by `mean` and `std`, or floats that are
    normalised already (`normalize` does it for pixels in 0..1).
    """

    mean: Tensor
    std: Tensor
    spectrum: Tensor | None
    """What the target makes of a normalised patch [P, P]; None where it leaves its frequencies as they are."""
    passport: Any = None
    """Where the weights come from, when they were loaded (`maekit.weights.passport.Passport`)."""
    key_report: Any = None
    """What became of each tensor when they were loaded (`maekit.weights.report.KeyReport`)."""

    def __init__(self, config: ModelConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
        self.config = resolve(ModelConfig(**own))  # a run's config has more fields than the model needs
        assert self.config.patch_size is not None
        self.patch_size = self.config.patch_size
        self.encoder = build_encoder(self.config)
        self.grid_hw: tuple[int, int] = self.encoder.patch_embed.grid_size
        self.num_patches = self.grid_hw[0] * self.grid_hw[1]
        self.num_prefix: int = self.encoder.num_prefix_tokens
        self.num_visible = num_visible(self.num_patches, self.config.mask_ratio)
        hidden = self.num_patches - self.num_visible
        self.num_predicted = num_predicted(self.num_patches, hidden, self.config.predict_share)
        kinds: dict[str, Any] = {"self": SelfDecoder, "cross": CrossDecoder, "flat": FlatDecoder}
        self.decoder = kinds[self.config.decoder](self.config, self.grid_hw, self.num_prefix)
        # Not weights: they come from the data and travel in the passport.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        filter_PP = target_spectrum(self.config.target, self.patch_size, self.config.in_chans, self.config.target_cut)
        self.register_buffer("spectrum", filter_PP, persistent=False)

    def extra_repr(self) -> str:
        """The first line of what a notebook shows of the model; its layers follow."""
        hidden, masks = f"{100 * self.config.mask_ratio:g} % hidden", self.config.mask
        return f"{described(self)}, {hidden} ({masks} masks), target {self.config.target}"

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Pixels, uint8 in 0..255 or floats in 0..1, brought to the mean 0 and deviation 1 that the model expects."""
        return normalized(images_BCHW, self.mean, self.std)

    def forward(
        self,
        images_BCHW: Tensor,
        ids_keep: Tensor | None = None,
        seed: int = 0,
        sample_ids: npt.ArrayLike | None = None,
        *,
        ids_masked: Tensor | None = None,
    ) -> MAEOutput:
        """Loss and predictions for images [B, C, H, W].

        ids_keep: visible patches [B, V]. Without it the masks are drawn from `seed` and `sample_ids` (default
            0..B-1) with the mask kind, ratio and predicted share of the pretraining.
        ids_masked: the hidden patches to predict [B, M], when the caller has them already (it is trusted); else all
            that are not visible.

        Raises:
            UserError: images of another type or size, or ids or a seed that give no valid masks.
        """
        images_BCHW = ready(images_BCHW, self)
        if ids_keep is None:
            samples = range(len(images_BCHW)) if sample_ids is None else sample_ids
            check_draw(len(images_BCHW), seed, samples)
            masks = self.draw_masks(samples, seed=seed).to(images_BCHW.device)
        elif ids_masked is None:
            check_keep(ids_keep, len(images_BCHW))
            masks = masks_from_keep(ids_keep.to(images_BCHW.device), self.num_patches)
        else:
            masks = Masks(ids_keep, ids_masked)
        patches_BNP = patchify(images_BCHW, self.patch_size)
        encode = self.encode_blocks if self.config.decoder == "cross" else self.encode_patches
        latent = encode(take_patches(patches_BNP, masks.ids_keep_BV), masks.ids_keep_BV)
        if self.config.decoder == "flat":
            latent = self.decoder.sequence(self.encoder, latent, masks.ids_keep_BV, masks.ids_masked_BM)
        pred_BMP = self.decoder(latent, masks.ids_keep_BV, masks.ids_masked_BM)
        loss = self.loss(pred_BMP, take_patches(patches_BNP, masks.ids_masked_BM))
        return MAEOutput(loss, pred_BMP, masks.ids_masked_BM, masks.ids_keep_BV)

    @never_compiled
    def draw_masks(self, sample_ids: npt.ArrayLike, *, seed: int, epoch: int = 0, views: int = 1) -> Masks:
        """Masks of the pretraining's kind and ratio for these samples, on the CPU; `views` of each, one after another.

        With a predicted share, their hidden patches are only those that are predicted and scored.
        """
        drawn = [self._draw_view(sample_ids, seed, epoch, view) for view in range(views)]
        if views == 1:
            return drawn[0]
        return Masks(
            torch.stack([masks.ids_keep_BV for masks in drawn], dim=1).flatten(0, 1),
            torch.stack([masks.ids_masked_BM for masks in drawn], dim=1).flatten(0, 1),
        )

    def _draw_view(self, sample_ids: npt.ArrayLike, seed: int, epoch: int, view: int) -> Masks:
        kind, ratio = self.config.mask, self.config.mask_ratio
        masks = make_masks(kind, self.grid_hw, ratio, sample_ids, seed=seed, epoch=epoch, view=view)
        if self.config.predict_share is None:
            return masks
        return choose_predicted(masks, self.num_predicted, sample_ids, seed=seed, epoch=epoch, view=view)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass computes each block's activations again, to save memory; numbers stay the same."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def encode_patches(self, patches_BVP: Tensor, ids_BV: Tensor | None) -> Tensor:
        """The encoder's normalised output [B, T + V, D] for the given patches (all, in order, without ids)."""
        tokens = self._embed(patches_BVP, ids_BV)
        for block in self.encoder.blocks:
            tokens = run_block(block, tokens, checkpointed=self.encoder.grad_checkpointing)
        normed: Tensor = self.encoder.norm(tokens)
        return normed

    def encode_blocks(self, patches_BVP: Tensor, ids_BV: Tensor | None) -> Tensor:
        """All feature maps [L + 1, B, T + V, D]: before the first block and after each, the last one normalised."""
        maps = [self._embed(patches_BVP, ids_BV)]
        for block in self.encoder.blocks:
            maps.append(run_block(block, maps[-1], checkpointed=self.encoder.grad_checkpointing))
        maps[-1] = self.encoder.norm(maps[-1])
        return torch.stack(maps)

    def _embed(self, patches_BVP: Tensor, ids_BV: Tensor | None) -> Tensor:
        """What enters the first block: prefix tokens and embedded patches with their positions [B, T + V, D]."""
        encoder = self.encoder
        prefix, positions_ND = prefix_and_positions(encoder)
        tokens = F.linear(patches_BVP, patch_weight(encoder), encoder.patch_embed.proj.bias)
        tokens = encoder.patch_embed.norm(tokens)
        tokens = tokens + (positions_ND if ids_BV is None else F.embedding(ids_BV, positions_ND))
        if prefix is not None:
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        ready: Tensor = encoder.norm_pre(tokens)
        return ready

    def loss(self, pred_BMP: Tensor, hidden_BMP: Tensor) -> Tensor:
        """Mean squared error over the hidden patches, in float32 at least (section 3, equation of the target)."""
        return self.errors(pred_BMP, hidden_BMP).mean()

    def errors(self, pred_BMP: Tensor, hidden_BMP: Tensor) -> Tensor:
        """The squared errors of the prediction [B, M, P], whose mean is the loss."""
        precise = torch.promote_types(pred_BMP.dtype, torch.float32)
        with torch.autocast(pred_BMP.device.type, enabled=False):
            target = make_target(hidden_BMP.to(precise), self.config.target, self.spectrum)
            return (pred_BMP.to(precise) - target).square()

    def encode(self, images_BCHW: Tensor, pool: Literal["cls", "mean", "tokens"] = "mean") -> Tensor:
        """Features of whole images: never masked, never shuffled.

        cls: the class token [B, D]; mean: the mean of the patch tokens [B, D]; tokens: class, registers, then
        patches in row-major order [B, T + N, D]. All after the final normalisation.

        Raises:
            UserError: "cls" of an encoder without a class token, or images of another type or size.
        """
        if pool == "cls" and not self.encoder.has_class_token:
            raise UserError('pool="cls": this encoder has no class token; take pool="mean" (--pool mean)')
        tokens = self.encode_patches(patchify(ready(images_BCHW, self), self.patch_size), None)
        if pool == "tokens":
            return tokens
        if pool == "cls":
            return tokens[:, 0]
        if pool != "mean":
            raise UserError(f"pool={pool!r}: choose cls, mean or tokens")
        return tokens[:, self.num_prefix :].mean(dim=1)


def model_problems(config: ModelConfig) -> list[str]:
    """Everything that is wrong with model, sizes and heads, as lines that name the flag; nothing is built."""
    try:
        resolve(config)
    except UserError as error:
        return list(error.problems)
    return []
