"""How sure a share is that was counted on a sample."""

from __future__ import annotations

import math

NORMAL_95 = 1.959964
"""So many standard deviations lie on either side of the mean in 95 % of all cases."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many images, by Wilson's formula (1927), which holds near 0 and 1 too."""
    z2 = NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)
