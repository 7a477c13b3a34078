"""What a caller hands to a model, images and visible patches: checked, with words for what is mostly meant by it.

Nothing here waits for a device while gradients are being made: values are looked at once a model, on the CPU or where a
model is only asked.

Shapes: B batch, C channels, H x W pixels, V visible patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import ModelConfig, UserError

Function = TypeVar("Function", bound=Callable[..., Any])

LOOKED_AT = 8
"""Images of a batch whose values are looked at: pixels that nobody has normalised show in the first few."""
DARK = 0.1
"""Mean of pixels in 0..1 below which whole images without a black one are common."""


def never_compiled(function: Function) -> Function:
    """A function that a compiled model calls as it is: `torch.compile` cannot follow NumPy's 64-bit integers."""
    return cast(Function, torch.compiler.disable(function))


def described(model: Any) -> str:
    """A model in a line: its name, the images that it takes, its size."""
    config, (height, width) = model.config, model.config.size_hw
    return (
        f"{config.model}: images [B, {config.in_chans}, {height}, {width}], patches of {config.patch_size} px, "
        f"{config.depth} blocks of width {config.embed_dim}"
    )


def ready(images_BCHW: Tensor, model: Any) -> Tensor:
    """Images as a model's first layer takes them: pixels normalised, floats in the precision of its weights.

    Raises:
        UserError: what `check_images` refuses.
    """
    check_images(images_BCHW, model.config)
    if images_BCHW.dtype == torch.uint8:
        normal: Tensor = model.normalize(images_BCHW)
        return normal
    _warn_of_pixels(images_BCHW, model)
    return images_BCHW.to(model.mean.dtype)


def normalized(images_BCHW: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels, uint8 in 0..255 or floats in 0..1, less the mean, over the deviation.

    Raises:
        UserError: pixels of another type.
    """
    check_type(images_BCHW)
    if images_BCHW.dtype == torch.uint8:
        images_BCHW = images_BCHW.to(mean.dtype) / 255
    return (images_BCHW - mean) / std


def check_images(images_BCHW: Tensor, config: ModelConfig) -> None:
    """Whether images are of the type and shape that a model takes.

    Raises:
        UserError: they are not; says what they are, what the model takes, and what would make one of the other.
    """
    check_type(images_BCHW)
    channels, (height, width) = config.in_chans, config.size_hw
    shape, expected = list(images_BCHW.shape), [channels, height, width]
    if len(shape) == 4 and shape[1:] == expected:
        if not shape[0]:
            raise UserError("images: a batch of none; give at least one")
        return
    if shape == expected:
        hint = "an axis for the batch is missing: images[None]"
    elif len(shape) == 4 and shape[1:] == [height, width, channels]:
        hint = "channels stand last here: images.permute(0, 3, 1, 2)"
    elif len(shape) == 4 and shape[1] == channels:
        hint = "resize them, or take the model at their size: load(..., img_size=(height, width)), --img-size"
    else:
        hint = "load(..., in_chans=C) takes a model for other channels, img_size=(height, width) at another size"
    raise UserError(f"images of shape {shape}: this model takes [batch, {channels}, {height}, {width}]; {hint}")


def check_type(images_BCHW: Tensor) -> None:
    """Whether images are a tensor of pixels or floats.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(images_BCHW, Tensor):
        kind = type(images_BCHW)
        if isinstance(images_BCHW, np.ndarray):
            hint = "torch.from_numpy(images)"
        elif isinstance(images_BCHW, (list, tuple)) and {type(one) for one in images_BCHW} == {Tensor}:
            hint = "torch.stack(images)"
        else:
            hint = "maekit.read_images(paths, model) reads files"
        name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}".removeprefix("builtins.")
        raise UserError(f"images are a {name}, not a torch tensor: {hint}")
    if images_BCHW.dtype != torch.uint8 and not images_BCHW.is_floating_point():
        word = str(images_BCHW.dtype).removeprefix("torch.")
        hint = "images.to(torch.uint8), if they are pixels of 0 to 255"
        if images_BCHW.dtype == torch.uint16:
            hint = "model.normalize(images.float() / 65535), if they are pixels of 16 bits"
        raise UserError(f"images of {word}: a model takes uint8 pixels, or floats that are normalised: {hint}")


def _warn_of_pixels(images_BCHW: Tensor, model: Any) -> None:
    """Warn of floats that look like pixels which nobody has normalised: features of them mean little.

    The first floats that a model is given are looked at, and no later ones: a look waits for the device.
    Normalised images have values below zero, as no image lies above the mean everywhere, and none beyond what white
    becomes. Nothing can be told where the mean is of no pixels in 0..1 (float data in units of their own), or so near
    to 0 that normalised images have nothing below it either (the tutorial's, which are pixels in 0..1).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or images_BCHW.is_meta:
        return
    if torch.is_grad_enabled() and images_BCHW.device.type != "cpu":
        return
    if getattr(model, "_looked_at_images", False):
        return
    model._looked_at_images = True
    with torch.no_grad():
        low, high = (float(value) for value in images_BCHW[:LOOKED_AT].aminmax())
        if not (low >= 0 and 0.5 < high - low <= 255):  # a blank image may lie above the mean, but spreads little
            return
        mean, std = model.mean.float(), model.std.float()
        white = float(((1 - mean) / std).amax())
        if not (mean > DARK).logical_and(mean <= 1).all() or 1 < high <= white:
            return
    meant, mend = ("1", "model.normalize(images)") if high <= 1 else ("255", "model.normalize(images / 255)")
    warnings.warn(
        f"images are floats from 0 to {meant}, as pixels are, but floats are taken to be normalised already: give "
        f"uint8 pixels, or {mend}",
        stacklevel=4,
    )


def check_draw(batch: int, seed: int, sample_ids: npt.ArrayLike) -> None:
    """Whether masks can be drawn for a batch: a seed from 0 on, and an integer for each image.

    Raises:
        UserError: they cannot.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed!r}: must be a whole number from 0 to 2^63 - 1")
    ids = np.asarray(sample_ids)
    if ids.shape != (batch,) or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} of shape {list(ids.shape)}"
        raise UserError(f"sample_ids: {batch} images need as many whole numbers [{batch}], not {what}")


def check_keep(ids_keep_BV: Tensor, batch: int) -> None:
    """Whether visible patches are named for each image of a batch; `masks_from_keep` looks at the numbers.

    Raises:
        UserError: they are not.
    """
    if not isinstance(ids_keep_BV, Tensor):
        raise UserError(f"ids_keep is a {type(ids_keep_BV).__name__}, not a torch tensor: torch.tensor(ids_keep)")
    if ids_keep_BV.dtype == torch.bool:
        hint = "keep.nonzero()[:, 1].reshape(len(keep), -1)"
        raise UserError(f"ids_keep are the numbers of visible patches [batch, visible], not booleans: {hint}")
    if ids_keep_BV.ndim == 2 and len(ids_keep_BV) != batch:
        raise UserError(
            f"ids_keep has {len(ids_keep_BV)} rows for {batch} images: one for each; ids_keep.expand({batch}, -1) "
            "gives all images the same"
        )
