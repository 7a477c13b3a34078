"""Changes of single training images by timm's policies (RandAugment and its kin) and by colour jitter.

Changes of colour are defined for 8-bit images of one or three channels. Of 16-bit, float and n-channel images only the
geometric ones are made (shears, shifts, rotations), of every channel alike; where a policy draws a change of colour,
such an image stays as it is, so it is sheared, shifted and turned as often and as far as a photograph.

Each image's randomness is its own, keyed by (seed, epoch, sample id): the libraries draw from Python's, NumPy's and
torch's global generators, which are set anew before every image and afterwards put back. So neither the number of
loader processes nor an interruption changes what is drawn.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
    rotate,
    shear_x,
    shear_y,
    translate_x_abs,
    translate_x_rel,
    translate_y_abs,
    translate_y_rel,
)
from timm.data.auto_augment import posterize as timm_posterize
from torch import Tensor
from torchvision.transforms import ColorJitter

from maekit.rng import Purpose, UInt64s, random_bits

GEOMETRIC = (shear_x, shear_y, translate_x_abs, translate_x_rel, translate_y_abs, translate_y_rel, rotate)
"""timm's operations that move pixels and leave their values alone."""


COLOURED = (1, 3)
"""Channels of the images whose colours can be changed."""


class Augment:
    """What is done to one cropped training image, besides crop and flip. It can be sent to other processes.

    policy: timm's name of a policy, such as rand-m9-mstd0.5-inc1; empty: none.
    jitter: how far brightness, contrast and saturation are changed; 0: not at all.
    mean: of the data, in 0..1 (of floats in their own unit) for each channel: what a rotation or a shift uncovers.
    geometric: move pixels only, whatever the image is; nothing is left of AugMix then, whose blends are of colours.
    """

    def __init__(
        self, policy: str, jitter: float, size_hw: tuple[int, int], mean: Sequence[float], seed: int,
        geometric: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.jitter, self.seed, self.geometric = policy, jitter, seed, geometric
        self._size_hw, self._mean = size_hw, tuple(mean)
        self._steps: list[Callable[[Any], Any]] | None = None
        self._movers: dict[tuple[int, bool], Callable[[Any], Any]] = {}

    def keys(self, sample_ids: npt.ArrayLike, epoch: int) -> UInt64s:
        """The seeds [B, 3] of three generators for each sample."""
        return random_bits(sample_ids, 3, seed=self.seed, purpose=Purpose.AUGMENT, epoch=epoch)

    def __call__(self, image_CHW: Tensor, key_3: UInt64s) -> Tensor:
        """The changed image [C, H, W] of the given one's type; to be called inside `own_generators`."""
        python, numpy, torchs = key_3.tolist()
        if self.geometric or image_CHW.dtype != torch.uint8 or len(image_CHW) not in COLOURED:
            return self._moved(image_CHW, python, numpy)
        if self._steps is None:
            self._steps = self._make()
        random.seed(python)
        np.random.seed(numpy >> 32)  # noqa: NPY002  # timm draws from it
        if self.jitter:
            torch.default_generator.manual_seed(torchs >> 1)  # manual_seed asks every device, for half a millisecond
        pixels = image_CHW.permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
        for step in self._steps:
            image = step(image)
        changed = np.array(image)
        return torch.from_numpy(changed if changed.ndim == 3 else changed[..., None]).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_steps": None, "_movers": {}}  # timm's are made of local functions: never sent

    def _moved(self, image_CHW: Tensor, python: int, numpy: int) -> Tensor:
        """The image with the policy's geometric changes: each channel as a gray image, under the same draws."""
        if not self.policy or self.policy.startswith("augmix"):
            return image_CHW
        channels = []
        for number, channel_HW in enumerate(image_CHW.numpy()):
            random.seed(python)
            np.random.seed(numpy >> 32)  # noqa: NPY002
            image = Image.fromarray(np.ascontiguousarray(channel_HW))
            channels.append(np.array(self._mover(number, channel_HW.dtype == np.uint8)(image)))
        return torch.from_numpy(np.stack(channels))

    def _mover(self, channel: int, eight_bit: bool) -> Callable[[Any], Any]:
        """The policy of one channel, with the channel's own mean where pixels are uncovered."""
        key = (channel, eight_bit)
        if key not in self._movers:
            policy = self._make_policy(_level(self._mean[channel]) if eight_bit else self._mean[channel])
            for operation in _operations(policy):
                if operation.aug_fn not in GEOMETRIC:
                    operation.aug_fn = _unchanged
            self._movers[key] = policy
        return self._movers[key]

    def _make(self) -> list[Callable[[Any], Any]]:
        steps: list[Callable[[Any], Any]] = []
        if self.policy:
            fill = tuple(map(_level, self._mean))
            policy = self._make_policy(fill if len(fill) == 3 else fill[0])
            for operation in _operations(policy):
                if operation.aug_fn is timm_posterize:
                    operation.aug_fn = _posterize
            steps.append(policy)
        if self.jitter:
            steps.append(ColorJitter(self.jitter, self.jitter, self.jitter))
        return steps

    def _make_policy(self, fill: Any) -> Any:
        """timm's policy, with the value of what a rotation or a shift uncovers."""
        settings = {
            "translate_const": int(0.45 * min(self._size_hw)),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        return make.get(self.policy.split("-")[0], auto_augment_transform)(self.policy, settings)


def _operations(policy: Any) -> list[Any]:
    """All of timm's operations that a policy draws from."""
    return [*getattr(policy, "ops", ()), *chain.from_iterable(getattr(policy, "policy", ()))]


def _level(mean: float) -> int:
    """A mean in 0..1 as 8 bits; timm takes 0 for "not said"."""
    return min(255, max(1, round(255 * mean)))


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, whose greatest magnitude keeps no bit at all, which Pillow 12 refuses and before made a black image."""
    return timm_posterize(image, max(1, bits))


def _unchanged(image: Any, *_: Any, **__: Any) -> Any:
    """In place of a change of colour."""
    return image
