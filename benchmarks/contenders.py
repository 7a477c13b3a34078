"""Training steps side by side: ours, Hugging Face's ViTMAE and lightly's MAE, of equal sizes and on equal batches.

What each does in a step, and what favours whom:
- ours: everything the trainer does (`maekit/training/trial.py`): masks drawn from sample ids on the CPU (for a GPU
  those of 2,048 images at once), uint8 images normalised on the device, forward, backward, gradient norm, the guarded
  fused AdamW.
- peers: forward with their own masks, backward, fused AdamW. Their images are float32 and normalised before the clock
  starts, and their gradients are neither clipped nor checked (Hugging Face's Trainer would clip): in their favour.
- bfloat16 is autocast with float32 weights on both sides, as Trainer(bf16=True) does it.
"""

from __future__ import annotations

import gc
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import device_clock
from maekit.config import ModelConfig, PretrainConfig, UserError
from maekit.models.encoder import flops_per_image, resolve
from maekit.models.masking import num_visible
from maekit.runtime import choose_attention
from maekit.training.step import masks_ahead
from maekit.training.trial import Trial


class Contender(Protocol):
    """Something that can do one training step on a batch."""

    name: str
    setting: str
    flops: float
    """Operations of a step on one image, as this code does it: all patches embedded and predicted where it does so."""

    def step(self) -> None:
        """One step on the next batch; returns before the device is done."""
        ...


class Ours:
    """maekit's step, by the trainer's own pieces."""

    def __init__(self, config: PretrainConfig, device: torch.device, precision: str, compiled: str) -> None:
        fused = choose_attention(device, precision).value
        self.trial = Trial(config, device, precision=precision, fused_attention=fused)
        self.trial.compile(compiled, print)
        self.name = f"maekit {config.decoder}"
        self.setting = f"{precision}, {'fused' if fused else 'plain'} attention"
        self.setting += "" if compiled == "off" else f", compiled ({compiled})"
        self.flops = needed_flops(config)
        self.setting += f", in {config.accum} parts" if config.accum > 1 else ""
        self.images, self.ids = self.trial.images(config.batch_size)
        shares = ((0, self.ids + count * config.batch_size) for count in itertools.count())  # others, so other masks
        self.masks = masks_ahead(self.trial.model, config, shares, device)

    def step(self) -> None:
        parts = self.trial.config.accum
        if parts == 1:
            self.trial.step(self.images, self.ids, next(self.masks))
            return
        for images, ids in zip(self.images.chunk(parts), np.split(self.ids, parts), strict=True):
            self.trial.gradients(images, ids)
        self.trial.update()


class Peer:
    """A peer's model with the optimiser that it is trained by here."""

    flops: float

    def __init__(
        self, name: str, model: nn.Module, config: PretrainConfig, device: torch.device, precision: str, compiled: bool
    ) -> None:
        self.name, self.device, self.bf16 = name, device, precision == "bf16"
        self.setting = precision + (", compiled" if compiled else "")
        self.flops = whole_flops(config)
        self.model = model.to(device).train()
        self.forward: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-6, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.images = torch.randn(config.batch_size, config.in_chans, *config.size_hw, device=device)

    def loss(self, images: Tensor) -> Tensor:
        loss: Tensor = self.forward(images)
        return loss

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class HuggingFace(Peer):
    """transformers' ViTMAEForPreTraining. Its default attention is torch's fused kernel ("sdpa")."""

    def __init__(
        self, config: PretrainConfig, device: torch.device, precision: str, compiled: bool, attention: str = "default"
    ) -> None:
        model = hugging_face(config, attention)
        super().__init__("Hugging Face", model, config, device, precision, compiled)
        self.setting += {"default": ", its default attention", "eager": ", plain attention"}.get(
            attention, f", {attention}"
        )

    def loss(self, images: Tensor) -> Tensor:
        loss: Tensor = self.forward(pixel_values=images).loss
        return loss


def hugging_face(config: PretrainConfig, attention: str) -> nn.Module:
    """A ViTMAE of the config's sizes.

    Raises:
        UserError: transformers is not installed, or it cannot build these sizes.
    """
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        raise UserError("--peer hf: needs transformers; pip install 'maekit[bench]'") from None
    own: Any = sizes(config, "--peer hf")
    settings: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=own.embed_dim,
            num_hidden_layers=own.depth,
            num_attention_heads=own.num_heads,
            intermediate_size=round(own.embed_dim * own.mlp_ratio),
            image_size=own.size_hw[0],
            patch_size=own.patch_size,
            num_channels=own.in_chans,
            decoder_hidden_size=own.decoder_dim,
            decoder_num_hidden_layers=own.decoder_depth,
            decoder_num_attention_heads=own.decoder_heads,
            decoder_intermediate_size=4 * own.decoder_dim,
            mask_ratio=own.mask_ratio,
            norm_pix_loss=own.target == "norm-pixels",
            layer_norm_eps=1e-6,
            **settings,
        )
    )


class Lightly(Peer):
    """lightly's modules, put together as its documentation says (MaskedVisionTransformerTIMM, MAEDecoderTIMM)."""

    def __init__(self, config: PretrainConfig, device: torch.device, precision: str, compiled: bool) -> None:
        super().__init__("lightly", LightlyMAE(config), config, device, precision, compiled)


class LightlyMAE(nn.Module):
    """Encoder, decoder and loss. Only visible patches are encoded, and only hidden ones predicted."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        try:
            from lightly.models import utils
            from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        except ImportError:
            raise UserError("--peer lightly: needs lightly (before 1.7); pip install 'maekit[bench]'") from None
        from timm.models.vision_transformer import VisionTransformer

        own: Any = sizes(config, "--peer lightly")
        vit = VisionTransformer(
            img_size=own.size_hw[0], patch_size=own.patch_size, in_chans=own.in_chans, num_classes=0,
            embed_dim=own.embed_dim, depth=own.depth, num_heads=own.num_heads, mlp_ratio=own.mlp_ratio,
        )  # fmt: skip
        self.utils, self.config = utils, own
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is on its way out of lightly, and its successor does the same work
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=own.patch_size, in_chans=own.in_chans,
                embed_dim=own.embed_dim, decoder_embed_dim=own.decoder_dim, decoder_depth=own.decoder_depth,
                decoder_num_heads=own.decoder_heads,
            )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The loss of a batch under masks of its own."""
        utils, length = self.utils, self.backbone.sequence_length
        keep, hidden = utils.random_token_mask(
            size=(len(images), length), mask_ratio=self.config.mask_ratio, device=images.device
        )
        narrow = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        everywhere = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        decoded = self.decoder.decode(utils.set_at_index(everywhere, keep, narrow.type_as(everywhere)))
        pred = self.decoder.predict(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(
            utils.patchify(images, self.config.patch_size), hidden - 1
        )  # without the class token
        if self.config.target == "norm-pixels":
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(pred.float(), target)


def sizes(config: PretrainConfig, who: str) -> ModelConfig:
    """The config with every size filled in, checked to be one that the peers can build."""
    own = resolve(config)
    if own.size_hw[0] != own.size_hw[1] or not own.class_token or own.reg_tokens or own.mask != "random":
        raise UserError(f"{who}: it knows square images, one class token and random masks only")
    return own


def needed_flops(config: PretrainConfig) -> float:
    """Operations of a step on one image by the work that is needed, as maekit counts them."""
    own = resolve(config)
    return flops_per_image(own, num_visible(num_patches(own), own.mask_ratio))


def whole_flops(config: PretrainConfig) -> float:
    """The same with every patch embedded and predicted, as the peers do it: the paper's decoder on all patches."""
    own = resolve(config)
    assert own.patch_size and own.embed_dim and own.depth and own.mlp_ratio
    patches = num_patches(own)
    seen, size = num_visible(patches, own.mask_ratio) + 1, own.patch_size**2 * own.in_chans
    wide, narrow = own.embed_dim, own.decoder_dim

    def block(tokens: int, dim: int, ratio: float) -> float:
        return tokens * ((8 + 4 * ratio) * dim**2 + 4 * tokens * dim)

    forward = 2 * patches * size * wide + own.depth * block(seen, wide, own.mlp_ratio) + 2 * seen * wide * narrow
    return 3 * (forward + own.decoder_depth * block(patches + 1, narrow, 4) + 2 * patches * narrow * size)


def num_patches(own: ModelConfig) -> int:
    """Patches of an image."""
    assert own.patch_size
    return math.prod(own.size_hw) // own.patch_size**2


def quicker_hugging_face(config: PretrainConfig, device: torch.device, precision: str, compiled: bool) -> HuggingFace:
    """Theirs with the faster of its two attention kernels here: the second of two steps decides."""
    clock, seconds = device_clock(device), {}
    for attention in ("sdpa", "eager"):
        trial = HuggingFace(config, device, precision, compiled, attention)
        trial.step()
        seconds[attention] = clock(trial.step)
        del trial
        gc.collect()
    best = min(seconds, key=seconds.__getitem__)
    found = HuggingFace(config, device, precision, compiled, best)
    found.setting += " (the quicker here)"
    return found
