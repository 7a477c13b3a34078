"""Changes of single training images by timm's policies (RandAugment and its kin) and by colour jitter.

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
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from torch import Tensor
from torchvision.transforms import ColorJitter

from maekit.rng import Purpose, UInt64s, random_bits


class Augment:
    """What is done to one cropped training image of 8 bits, besides crop and flip. It can be sent to other processes.

    policy: timm's name of a policy, such as rand-m9-mstd0.5-inc1; empty: none.
    jitter: how far brightness, contrast and saturation are changed; 0: not at all.
    mean: of the data, in 0..1 for each channel: the colour of what a rotation or a shift uncovers.
    """

    def __init__(self, policy: str, jitter: float, size_hw: tuple[int, int], mean: Sequence[float], seed: int) -> None:
        fill = tuple(min(255, max(1, round(255 * value))) for value in mean)  # timm takes 0 for "not said"
        self._settings: dict[str, Any] = {
            "translate_const": int(0.45 * min(size_hw)),
            "img_mean": fill if len(fill) == 3 else fill[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.policy, self.jitter, self.seed = policy, jitter, seed
        self._steps: list[Callable[[Any], Any]] | None = None

    def keys(self, sample_ids: npt.ArrayLike, epoch: int) -> UInt64s:
        """The seeds [B, 3] of three generators for each sample."""
        return random_bits(sample_ids, 3, seed=self.seed, purpose=Purpose.AUGMENT, epoch=epoch)

    def __call__(self, image_CHW: Tensor, key_3: UInt64s) -> Tensor:
        """The changed image, uint8 [C, H, W] like the one that is given; to be called inside `own_generators`."""
        if self._steps is None:
            self._steps = self._make()
        python, numpy, torchs = key_3.tolist()
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
        return self.__dict__ | {"_steps": None}  # timm's are made of local functions, which cannot be sent

    def _make(self) -> list[Callable[[Any], Any]]:
        steps: list[Callable[[Any], Any]] = []
        if self.policy:
            make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
            # timm writes into the settings that it is given
            policy: Any = make.get(self.policy.split("-")[0], auto_augment_transform)(self.policy, dict(self._settings))
            for operation in [*getattr(policy, "ops", ()), *chain.from_iterable(getattr(policy, "policy", ()))]:
                if operation.aug_fn is timm_posterize:
                    operation.aug_fn = _posterize
            steps.append(policy)
        if self.jitter:
            steps.append(ColorJitter(self.jitter, self.jitter, self.jitter))
        return steps


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, whose greatest magnitude keeps no bit at all, which Pillow 12 refuses and before made a black image."""
    return timm_posterize(image, max(1, bits))
