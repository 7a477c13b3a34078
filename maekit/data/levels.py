"""Whether images have the levels that weights know: 8 bits where 16 were trained on look alike to people, not to them.

Legend: C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from maekit.data.images import BadImage
from maekit.data.parts import Part, Source, glance, left_out_remark

LOOKED_AT = 8
"""Images of a part that are read for it."""
PIXELS = 1 << 18
"""About so many of a large image are looked at: all of a scan, as float64, would take eight times its memory."""
FAR = 5.0
"""So many of the weights' deviations away, no channel's mean is one of images as they had them."""
FLAT = 0.1
"""Below this share of the weights' deviation, every image is about one gray to them."""


def remarks_for(data: Source | Part, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """What is told of data at the start of a command whose weights normalise pixels by these values."""
    if not isinstance(data, Source):
        return [*left_out_remark([data]), *levels_remark([data], mean, std)]
    return [*data.remarks(), *levels_remark(data.parts, mean, std)]


def levels_remark(parts: Iterable[Part], mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """A line where a few evenly spaced images are far from the mean and deviation that weights normalise them by.

    Every channel must be. Damaged files are told by whoever reads.
    """
    known_C, spread_C = np.array(mean, np.float64), np.array(std, np.float64)
    sums_2C, pixels = np.zeros((2, len(mean))), 0
    for part, index in glance(parts, LOOKED_AT):
        with contextlib.suppress(BadImage):
            image_HWC = part.read(index)
            step = max(1, math.isqrt(image_HWC.shape[0] * image_HWC.shape[1] // PIXELS))
            some_HWC = image_HWC[::step, ::step].astype(np.float64) / (255 if image_HWC.dtype == np.uint8 else 1)
            sums_2C += np.stack([some_HWC.sum(axis=(0, 1)), np.square(some_HWC).sum(axis=(0, 1))])
            pixels += some_HWC.shape[0] * some_HWC.shape[1]
    if not pixels:
        return []
    mean_C, square_C = sums_2C / pixels
    here_C = np.sqrt(np.maximum(square_C - np.square(mean_C), 0))
    far = bool((np.abs(mean_C - known_C) > FAR * spread_C).all())
    flat_ones = bool(((here_C > 0) & (here_C < FLAT * spread_C)).all())
    if not far and not flat_ones:
        return []
    seen = "far outside of what the weights know" if far else "about one gray to the weights"
    return [
        f"these images are {seen}: pixels of mean {mean_C.mean():.2g} and deviation {here_C.mean():.2g}, not of "
        f"{known_C.mean():.2g} and {spread_C.mean():.2g} (8 bits are divided by 255, 16 by 65535, floats by nothing). "
        "Bring both to one scale, or features mean little; maekit pretrain --init takes --mean and --std of yours"
    ]
