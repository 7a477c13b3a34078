"""How sure a share is that was counted on a sample."""

from __future__ import annotations

import math

NORMAL_95 = 1.959964
"""So many standard deviations lie on either side of the mean in 95 % of all cases."""


FEW_TEST = 100
"""Of fewer test images than this, a card says what they cannot tell apart."""
_ALIKE = 0.75
"""Least ratio of the sides of an interval that is written +-, with the larger one."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many images, by Wilson's formula (1927), which holds near 0 and 1 too."""
    z2 = NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def percent(share: float, count: int, gap: str = " ") -> str:
    """A share of so many images in percent with its 95 % interval: 67.9 +- 0.9, or of few images and where the sides
    differ, as they do near 0 and 1, 100.0 (75.8 to 100.0). gap: what stands before the bracket.
    """
    low, high = wilson(share, count)
    below, above = 100 * (share - low), 100 * (high - share)
    if count >= FEW_TEST and min(above, below) >= _ALIKE * max(above, below):
        return f"{100 * share:.1f} +- {max(above, below):.1f}"
    return f"{100 * share:.1f}{gap}({100 * low:.1f} to {100 * high:.1f})"


def in_words(share: float, count: int) -> str:
    """The same in a sentence, with as many digits as so many images can tell."""
    low, high = wilson(share, count)
    digits = 2 if count >= 1000 else 1
    said = f"{100 * share:.{digits}f} % (95 % interval {100 * low:.{digits}f} to {100 * high:.{digits}f}"
    return f"{said}, {count:,} image{'s' if count > 1 else ''})"
