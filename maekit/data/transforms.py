"""Crops, flips and resizing: decided in integers and float64 on the CPU, applied to one image or a batch on a device.

Shapes: B batch, C channels, H x W pixels in, S x T pixels out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maekit.config import PretrainConfig
from maekit.data.pixels import Window
from maekit.rng import Purpose, uniforms
from maekit.runtime import to_device

_ASPECTS = (3 / 4, 4 / 3)
"""Limits of a random box's width over its height."""
_ATTEMPTS = 10
"""Random boxes tried before the centre is taken, as in torchvision's RandomResizedCrop."""
_MIN_SHRUNKEN = 8
"""Below this output size, in pixels, a JPEG is decoded in full: a shrunken box could have the size of the whole one."""
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MAX_WASTE = 16
"""An image is resized whole and then cut, unless that takes this many times the pixels that are kept."""


@dataclass(frozen=True)
class Crops:
    """Where B images are cut and how they are scaled; all arrays are [B] or [B, 2] (vertical, horizontal).

    Output pixel i of an axis is centred at start + (i + offset + 1/2) x scale in the image, and only the pixels
    start .. start + length take part: `start`, `length` are the box, `offset` a shift in output pixels. Where a shift
    leads out of the scaled box, its edge is a mirror: -1 is 1.
    """

    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    scale: npt.NDArray[np.float64]
    offset: npt.NDArray[np.int64]
    flip: npt.NDArray[np.bool_]
    interpolation: str = "bicubic"
    """Or "bilinear"; both antialiased where the image shrinks."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of B crops, drawn before any image's size is known; [B, attempts] and [B]."""

    share_BA: npt.NDArray[np.float64]
    """Of the image's area."""
    aspect_BA: npt.NDArray[np.float64]
    """Width over height."""
    place_BA2: npt.NDArray[np.float64]
    """Vertical and horizontal, in 0..1 of the slack."""
    flip: npt.NDArray[np.bool_]


def draw_crops(config: PretrainConfig, sample_ids: npt.ArrayLike, *, epoch: int, view: int = 0) -> Draws:
    """What is random in the training crops of B samples, each a function of its own key."""
    ids = np.atleast_1d(np.asarray(sample_ids, np.int64))
    key = {"seed": config.seed, "epoch": epoch, "view": view}
    u = uniforms(ids, 4 * _ATTEMPTS, purpose=Purpose.CROP, **key)
    flip = np.zeros(len(ids), np.bool_)
    if config.flip:
        flip = uniforms(ids, 1, purpose=Purpose.FLIP, **key)[:, 0] < 0.5
    if config.crop != "random-resized":
        none = np.zeros((len(ids), 0))
        return Draws(none, none, u[:, None, :2], flip)
    u_BA4 = u.reshape(len(ids), _ATTEMPTS, 4)
    low, high = config.crop_scale
    log_low, log_high = math.log(_ASPECTS[0]), math.log(_ASPECTS[1])
    aspect_BA = np.exp(log_low + (log_high - log_low) * u_BA4[..., 1])
    return Draws(low + (high - low) * u_BA4[..., 0], aspect_BA, u_BA4[..., 2:], flip)


def place_crops(config: PretrainConfig, sizes_B2: npt.NDArray[np.int64], draws: Draws) -> Crops:
    """The training crops of B images of the given heights and widths."""
    if config.crop == "random-resized":
        crops = _random_resized(config, sizes_B2, draws)
    elif config.crop == "resize-crop":
        short = config.resize_to or math.ceil(max(config.size_hw) * 9 / 8)
        crops = _resized(sizes_B2, config.size_hw, short, draws.place_BA2[:, 0])
    elif config.crop == "pad-crop":
        crops = centre_crops(sizes_B2, config.size_hw)
        crops.offset[:] += np.floor(draws.place_BA2[:, 0] * (2 * config.pad + 1)).astype(np.int64) - config.pad
    else:
        crops = centre_crops(sizes_B2, config.size_hw)
    crops.flip[:] = draws.flip
    return dataclasses.replace(crops, interpolation=config.interpolation)


def place_crop(config: PretrainConfig, height: int, width: int, draws: Draws, row: int) -> Crops:
    """One of the crops that `place_crops` places, without its cost: for one image, 40 calls of NumPy are most of it.

    Products, quotients, square roots and their rounding are exact rules of IEEE 754, so both ways agree to the bit.
    """
    one = slice(row, row + 1)
    if config.crop == "random-resized":
        for attempt, (share, aspect) in enumerate(
            zip(draws.share_BA[row].tolist(), draws.aspect_BA[row].tolist(), strict=True)
        ):
            area = height * width * share
            wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 1 <= wide <= width and 1 <= tall <= height:
                y, x = draws.place_BA2[row, attempt].tolist()
                start = np.array([[math.floor(y * (height - tall + 1)), math.floor(x * (width - wide + 1))]])
                length = np.array([[tall, wide]])
                scale = length / np.array(config.size_hw, np.float64)
                return Crops(start, length, scale, np.zeros_like(start), draws.flip[one], config.interpolation)
    drawn = Draws(draws.share_BA[one], draws.aspect_BA[one], draws.place_BA2[one], draws.flip[one])
    return place_crops(config, np.array([[height, width]]), drawn)


def random_crops(
    config: PretrainConfig, sizes_B2: npt.NDArray[np.int64], sample_ids: npt.ArrayLike, *, epoch: int, view: int = 0
) -> Crops:
    """The training crops of B images of the given heights and widths, each a function of its own key."""
    return place_crops(config, sizes_B2, draw_crops(config, sample_ids, epoch=epoch, view=view))


def centre_crops(
    sizes_B2: npt.NDArray[np.int64], size_hw: tuple[int, int], interpolation: str = "bicubic", crop_pct: float = 1.0
) -> Crops:
    """The whole image, resized to cover the output and cut at the centre: what evaluation sees.

    crop_pct: it covers the output's size divided by this, rounded down to pixels (timm's word and rule).
    """
    crops = _resized(sizes_B2, size_hw, None, np.full((len(sizes_B2), 2), 0.5), crop_pct)
    return dataclasses.replace(crops, interpolation=interpolation)


def _random_resized(config: PretrainConfig, sizes_B2: npt.NDArray[np.int64], draws: Draws) -> Crops:
    """A box of a random share of the area and a random aspect (3/4 to 4/3), scaled to the output size.

    The first of ten random boxes that fits is taken; where none fits, the largest centred box of allowed aspect.
    """
    height_B1, width_B1 = sizes_B2[:, :1].astype(np.float64), sizes_B2[:, 1:].astype(np.float64)
    area_BA = height_B1 * width_B1 * draws.share_BA
    wide_BA = np.rint(np.sqrt(area_BA * draws.aspect_BA))
    tall_BA = np.rint(np.sqrt(area_BA / draws.aspect_BA))
    fits_BA = (wide_BA >= 1) & (tall_BA >= 1) & (wide_BA <= width_B1) & (tall_BA <= height_B1)
    first_B = fits_BA.argmax(axis=1)
    rows = np.arange(len(sizes_B2))
    length = np.stack([tall_BA[rows, first_B], wide_BA[rows, first_B]], axis=1).astype(np.int64)
    start = np.floor(draws.place_BA2[rows, first_B] * (sizes_B2 - length + 1)).astype(np.int64)
    none_B = ~fits_BA.any(axis=1)
    if none_B.any():
        ratio_B = sizes_B2[:, 1] / sizes_B2[:, 0]
        tall = np.where(ratio_B < _ASPECTS[0], np.rint(sizes_B2[:, 1] / _ASPECTS[0]), sizes_B2[:, 0])
        wide = np.where(ratio_B > _ASPECTS[1], np.rint(sizes_B2[:, 0] * _ASPECTS[1]), sizes_B2[:, 1])
        centred = np.minimum(np.stack([tall, wide], axis=1), sizes_B2).astype(np.int64)
        length[none_B] = np.maximum(centred, 1)[none_B]
        start[none_B] = ((sizes_B2 - length) // 2)[none_B]
    scale = length / np.array(config.size_hw, np.float64)
    return Crops(start, length, scale, np.zeros_like(start), np.zeros(len(start), np.bool_))


def _resized(
    sizes_B2: npt.NDArray[np.int64], size_hw: tuple[int, int], short: int | None, place_B2: npt.NDArray[np.float64],
    crop_pct: float = 1.0,
) -> Crops:  # fmt: skip
    """The whole image, its aspect kept, resized to a shorter side of `short` (None: to just cover the output's size /
    crop_pct), then cut to the output size at the given place (0..1 of the slack).
    """
    size = np.array(size_hw, np.float64)
    zoom_B = (np.floor(size / crop_pct) / sizes_B2).max(axis=1)
    if short is not None:
        zoom_B = np.maximum(zoom_B, short / sizes_B2.min(axis=1))
    resized_B2 = sizes_B2 * zoom_B[:, None]
    # Evaluation is torchvision's Resize and CenterCrop to the pixel; a product may just fall short of a whole number.
    resized_B2 = np.floor(resized_B2 + 1e-9) if short is None else np.rint(resized_B2)
    resized_B2 = np.maximum(resized_B2, size).astype(np.int64)
    slack = resized_B2 - size.astype(np.int64)
    offset = np.minimum(np.floor(place_B2 * (slack + 1)).astype(np.int64), slack)
    if short is None:
        offset = np.rint(slack / 2).astype(np.int64)
    return Crops(np.zeros_like(offset), sizes_B2.copy(), sizes_B2 / resized_B2, offset, np.zeros(len(offset), np.bool_))


def apply_to_batch(images_BCHW: Tensor, crops: Crops, size_hw: tuple[int, int]) -> Tensor:
    """B images of one size cropped, scaled and flipped on their device: [B, C, S, T], floats in 0..1.

    Bicubic or bilinear with antialiasing, as Pillow's (a = -1/2, the support grows with the scale, edges renormalised),
    written as two products with small dense matrices: no loop over samples, and no rounding to 8 bits in between.
    """
    batch, _, height, width = images_BCHW.shape
    whole = bool((crops.length == (height, width)).all() and (crops.scale == 1).all() and (crops.offset == 0).all())
    pixels = images_BCHW.to(torch.float32)
    if images_BCHW.dtype == torch.uint8:
        pixels = pixels / 255
    if whole and not crops.flip.any() and (height, width) == size_hw:
        return pixels
    device = images_BCHW.device
    rows_BSH = _weights(crops, 0, height, size_hw[0], device)
    columns_BTW = _weights(crops, 1, width, size_hw[1], device)
    flipped = to_device(torch.from_numpy(crops.flip), device)
    columns_BTW = torch.where(flipped[:, None, None], columns_BTW.flip(1), columns_BTW)
    with torch.autocast(device.type, enabled=False):  # only a model's arithmetic may be coarse, never its images
        wide = torch.matmul(pixels, columns_BTW.transpose(1, 2).unsqueeze(1))
        scaled = torch.matmul(rows_BSH.unsqueeze(1), wide)
    # Bicubic overshoots at edges; 8-bit pipelines clip there, and so do we. Float data (any range) are left alone.
    return scaled.clamp_(0, 1) if images_BCHW.dtype == torch.uint8 else scaled


def _weights(crops: Crops, axis: int, size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Resampling weights [B, out, in] along one axis, float32, rows summing to 1."""

    def column(values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(torch.from_numpy(values[:, axis].astype(np.float32)), device)[:, None, None]

    start, length, scale, offset = (column(v) for v in (crops.start, crops.length, crops.scale, crops.offset))
    out = torch.arange(size_out, device=device, dtype=torch.float32)[None, :, None]
    source = torch.arange(size_in, device=device, dtype=torch.float32)[None, None, :] - start
    place = _mirrored(out + offset, (length / scale).round())
    distance = ((source + 0.5 - (place + 0.5) * scale) / scale.clamp_min(1.0)).abs()
    if crops.interpolation == "bilinear":
        weights = (1 - distance).clamp_min(0)
    else:
        weights = torch.where(
            distance < 1,
            (1.5 * distance - 2.5) * distance.square() + 1,
            ((-0.5 * distance + 2.5) * distance - 4) * distance + 2,
        )
    inside = (source >= 0) & (source < length) & (distance < 2)
    weights = torch.where(inside, weights, torch.zeros((), device=device))
    return weights / weights.sum(dim=2, keepdim=True)


def _cut(image_CHW: Tensor, y: int, x: int, size_hw: tuple[int, int]) -> Tensor:
    """The output's pixels [C, S, T] of a scaled image, from row y and column x on, which may lie outside of it."""
    height, width = image_CHW.shape[1:]
    if y >= 0 and x >= 0 and y + size_hw[0] <= height and x + size_hw[1] <= width:
        return image_CHW[:, y : y + size_hw[0], x : x + size_hw[1]]
    rows = _mirrored(torch.arange(y, y + size_hw[0]), height)
    columns = _mirrored(torch.arange(x, x + size_hw[1]), width)
    return image_CHW[:, rows][:, :, columns]


def _mirrored(place: Tensor, size: Tensor | int) -> Tensor:
    """Pixel numbers, of which some may lie beyond 0 .. size - 1, as those that a mirror at the edge pixel shows."""
    last = size - 1
    inside = last - (last - place.abs()).abs()
    return inside.clamp_min(0)  # a box of one pixel has nothing to show but it


def wanted(crops: Crops, index: int, size_hw: tuple[int, int], *, shrink: bool) -> Window:
    """What must be decoded for a crop: its box, or of a long thin image what the output needs.

    With `shrink`, a JPEG may be decoded by 2, 4 or 8 smaller: as far as the box keeps at least one pixel for each pixel
    that it is resized to.
    """
    start, length, scale = crops.start[index], crops.length[index], crops.scale[index]
    if math.prod(_resized_hw(crops, index)) > _MAX_WASTE * math.prod(size_hw):
        # Resized whole to cover 224 px, an image of 1 x 20,000 px would take 3 GB.
        size = np.array(size_hw)
        reach = np.ceil(2 * np.maximum(scale, 1)) + 1  # the filter's, in pixels of the image
        end = start + length
        first = np.clip(np.floor(start + crops.offset[index] * scale - reach), start, end - 1).astype(np.int64)
        last = np.clip(np.ceil(start + (crops.offset[index] + size) * scale + reach), first + 1, end).astype(np.int64)
        return _window(first, last - first, 1)
    factor = next(f for f in (8, 4, 2, 1) if f <= scale.min() or f == 1)
    if not shrink or min(size_hw) < _MIN_SHRUNKEN:
        factor = 1
    return _window(start, length, factor)


def _window(start: npt.NDArray[np.int64], length: npt.NDArray[np.int64], shrink: int) -> Window:
    return Window(int(start[0]), int(start[1]), int(length[0]), int(length[1]), shrink)


def apply_to_image(image_HWC: npt.NDArray[np.generic], crops: Crops, index: int, size_hw: tuple[int, int]) -> Tensor:
    """One whole image cropped, scaled and flipped: [C, S, T], uint8 for 8-bit images, else float32."""
    window = wanted(crops, index, size_hw, shrink=False)
    return apply_to_window(np.ascontiguousarray(window.cut(image_HWC)), window, crops, index, size_hw)


def apply_to_window(
    box_HWC: npt.NDArray[np.generic], window: Window, crops: Crops, index: int, size_hw: tuple[int, int]
) -> Tensor:
    """The `wanted` window of one image, decoded, scaled and flipped: [C, S, T], uint8 for 8-bit images, else float32.

    The same filters as `apply_to_batch`, by torch's antialiased ones, which skip the zeros: large photographs.
    """
    if box_HWC.shape[:2] != (window.height, window.width):
        return _scale_shrunken(box_HWC, window, crops, index, size_hw)
    resized_hw = _resized_hw(crops, index)
    if math.prod(resized_hw) > _MAX_WASTE * math.prod(size_hw):
        here, first = slice(index, index + 1), np.array([window.top, window.left])
        start = crops.start[here] - first
        shape = (crops.length[here], crops.scale[here], crops.offset[here], crops.flip[here])
        one = Crops(start, *shape, crops.interpolation)
        box_1CHW = torch.from_numpy(box_HWC).permute(2, 0, 1).unsqueeze(0)
        scaled_CST = apply_to_batch(box_1CHW, one, size_hw)[0]
        return (scaled_CST * 255).round().to(torch.uint8) if box_HWC.dtype == np.uint8 else scaled_CST
    scaled_CHW = _scale(torch.from_numpy(box_HWC), resized_hw, crops.interpolation)
    y, x = crops.offset[index]
    cut = _cut(scaled_CHW, int(y), int(x), size_hw)
    return cut.flip(2) if crops.flip[index] else cut


def _scale(box_HWC: Tensor, size_hw: list[int], interpolation: str) -> Tensor:
    """The box as [C, *size_hw]; its channels lie last in memory where pixels have 8 bits and at most four channels."""
    if size_hw == list(box_HWC.shape[:2]):
        return box_HWC.permute(2, 0, 1)
    if box_HWC.dtype == torch.uint8:
        # torch's fast path for 8 bits takes up to four channels that lie last, which it sees only where the axis of the
        # one image was added in front of the others.
        fours = (box_HWC[:, :, first : first + 4].contiguous() for first in range(0, box_HWC.shape[2], 4))
        groups = [four.unsqueeze(0).permute(0, 3, 1, 2) for four in fours]
    else:
        groups = [box_HWC.permute(2, 0, 1).unsqueeze(0)]
    scaled = [
        F.interpolate(g, size=size_hw, mode=interpolation, align_corners=False, antialias=True)[0] for g in groups
    ]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _scale_shrunken(
    box_HWC: npt.NDArray[np.generic], window: Window, crops: Crops, index: int, size_hw: tuple[int, int]
) -> Tensor:
    """As `apply_to_window`, of a JPEG that was decoded smaller: the box may begin and end within one of its pixels.

    Pillow's resize takes such boxes, torch's does not.
    """
    top, left = window.top / window.shrink % 1, window.left / window.shrink % 1
    bottom = min(top + window.height / window.shrink, box_HWC.shape[0])
    right = min(left + window.width / window.shrink, box_HWC.shape[1])
    (tall, wide), (y, x) = _resized_hw(crops, index), crops.offset[index]
    channels = box_HWC.shape[2]  # other than three: a gray JPEG's, all equal, which Pillow would take for alpha
    image = Image.fromarray(box_HWC if channels == 3 else box_HWC[..., 0])
    scaled = np.array(image.resize((wide, tall), _PILLOW[crops.interpolation], (left, top, right, bottom)))
    whole = torch.from_numpy(scaled)
    whole = whole.permute(2, 0, 1) if channels == 3 else whole.expand(channels, -1, -1)
    cut = _cut(whole, int(y), int(x), size_hw)
    return cut.flip(2) if crops.flip[index] else cut


def _resized_hw(crops: Crops, index: int) -> list[int]:
    """The size that a crop's box is scaled to, before the output is cut out of it."""
    return [int(side) for side in np.rint(crops.length[index] / crops.scale[index])]
