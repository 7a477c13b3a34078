"""An image classifier: an MAE's encoder, its tokens pooled, and one linear layer (He et al. 2021, appendix A.1).

    images -> encoder -> mean of the patch tokens -> normalisation -> linear layer -> logits

Pooling "mean" normalises once, after the mean, and drops the encoder's own final normalisation, as the paper's
fine-tuning does and as timm does with `global_pool="avg"`; "cls" takes the class token behind the final
normalisation. Names of parameters: timm's below `encoder.`, then `fc_norm.` and `head.`, as in the official files.

Shapes: B batch, C channels, H x W pixels, T prefix tokens, N patches, D width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maekit.config import ModelConfig, UserError
from maekit.models.encoder import EPS, build_encoder, resolve
from maekit.models.inputs import check_type, described, normalized, ready

HEAD_STD = 2e-5
"""Deviation of the linear layer at the start: next to no opinion, so that the first gradients do not undo the encoder
(the paper's code)."""
Pool = Literal["mean", "cls"]


class Prediction(NamedTuple):
    """Of B images: the probability of every class [B, K], and id and name of the likeliest one."""

    probabilities: Tensor
    class_ids: Tensor
    names: list[str]


class Classifier(nn.Module):
    """A timm vision transformer with a linear layer on its pooled tokens.

    Images are [B, C, H, W]: uint8 pixels (0..255), which are normalised here by `mean` and `std`, or floats that are
    normalised already (`normalize` does it for pixels in 0..1).
    """

    mean: Tensor
    std: Tensor
    passport: Any = None
    """Where the weights come from (`maekit.weights.passport.Passport`)."""
    key_report: Any = None
    """What became of each tensor when they were loaded (`maekit.weights.report.KeyReport`)."""

    def __init__(
        self,
        config: ModelConfig,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        pool: Pool = "mean",
    ) -> None:
        """config: the encoder's architecture and its stochastic depth; classes: their names, in the order of ids.

        Positions become trainable, as in the paper's code: `config.pos_embed` is "learned" from here on, and a
        sine-cosine table only its first value.

        Raises:
            UserError: pooling by a class token that the encoder has not.
        """
        super().__init__()
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
        resolved = resolve(ModelConfig(**own))
        if pool == "cls" and not resolved.class_token:
            raise UserError("--pool cls: this encoder has no class token; take --pool mean")
        assert resolved.patch_size is not None and resolved.embed_dim is not None
        self.encoder: Any = build_encoder(resolved)
        positions: Any = self.encoder.pos_embed
        positions.requires_grad_(True)
        self.config = dataclasses.replace(resolved, pos_embed="learned")
        self.classes = tuple(classes)
        self.pool: Pool = pool
        self.patch_size = resolved.patch_size
        self.grid_hw: tuple[int, int] = self.encoder.patch_embed.grid_size
        self.num_prefix: int = self.encoder.num_prefix_tokens
        norm: Any = partial(nn.LayerNorm, eps=EPS)
        if pool == "mean":
            self.encoder.norm = nn.Identity()
            self.fc_norm: nn.Module = norm(resolved.embed_dim)
        else:
            self.fc_norm = nn.Identity()
        self.head = nn.Linear(resolved.embed_dim, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        # Not weights: they come from the data and travel in the passport.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """The first line of what a notebook shows of the model; its layers follow."""
        return f"{described(self)}, {len(self.classes)} classes from pool {self.pool}"

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Pixels, uint8 in 0..255 or floats in 0..1, brought to the mean 0 and deviation 1 that the model expects."""
        return normalized(images_BCHW, self.mean, self.std)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, K]; the linear layer computes in float32 even where the encoder does not.

        Raises:
            UserError: images of another type or size.
        """
        pooled = self.pooled(images_BCHW)
        with torch.autocast(pooled.device.type, enabled=False):  # of 8 bits, two classes are soon equal
            logits: Tensor = self.head(pooled.to(self.head.weight.dtype))
        return logits

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """What the linear layer sees [B, D]: the pooled, normalised tokens."""
        tokens_BTD = self.encoder.forward_features(ready(images_BCHW, self))
        if self.pool == "cls":
            first: Tensor = tokens_BTD[:, 0]
            return first  # the class token stands first, before any registers
        pooled: Tensor = self.fc_norm(tokens_BTD[:, self.num_prefix :].mean(dim=1))
        return pooled

    def encode(self, images_BCHW: Tensor, pool: Literal["cls", "mean", "tokens"] = "mean") -> Tensor:
        """Features without the linear layer: class token or mean [B, D], or all tokens [B, T + N, D].

        "mean" of a classifier that pools by it is what its linear layer sees; its tokens are not normalised.

        Raises:
            UserError: "cls" of an encoder without a class token, or images of another type or size.
        """
        if pool == "mean" and self.pool == "mean":
            return self.pooled(images_BCHW)
        if pool == "cls" and not self.config.class_token:
            raise UserError('pool="cls": this encoder has no class token; take pool="mean" (--pool mean)')
        tokens_BTD: Tensor = self.encoder.forward_features(ready(images_BCHW, self))
        if pool == "tokens":
            return tokens_BTD
        return tokens_BTD[:, 0] if pool == "cls" else tokens_BTD[:, self.num_prefix :].mean(dim=1)

    @torch.no_grad()
    def predict(self, images_BCHW: Tensor) -> Prediction:
        """The classes of images, without any randomness of training; probabilities are float32 at least.

        Raises:
            UserError: images of another type or size.
        """
        check_type(images_BCHW)
        was_training = self.training
        self.eval()
        try:
            logits = self(images_BCHW.to(self.mean.device))
        finally:
            self.train(was_training)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
        ids = probabilities.argmax(dim=1)
        return Prediction(probabilities, ids, [self.classes[index] for index in ids.tolist()])

    def take_encoder(self, state: Mapping[str, Tensor]) -> list[str]:
        """Copy an encoder's weights, by timm's names; returns the names that have no place here.

        Pooling "mean" leaves the final normalisation behind: it normalised tokens, and what stands here normalises
        their mean, whose statistics are others; it starts anew, as in the paper.
        """
        unused = [name for name in state if self.pool == "mean" and name.startswith("norm.")]
        self.encoder.load_state_dict({name: value for name, value in state.items() if name not in unused})
        return unused

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass computes each block's activations again, to save memory; numbers stay the same."""
        self.encoder.set_grad_checkpointing(enable)
