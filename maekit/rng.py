"""A counter-based random generator: each number is a function of its key alone, never of a process's state.

A sample's randomness is keyed by (seed, epoch, sample id, purpose, view), so 1, 2 or 4 processes, any number of
loader workers, a run interrupted anywhere and a run left alone all draw the same numbers. The generator is
SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195), whose n-th output is a hash of (key + n x gamma).
All arithmetic is in 64-bit integers on the CPU, so every machine draws the same.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a random number is for; two purposes never share a stream. Values are part of the format: never reuse."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    HELDOUT_SPLIT = 5
    HELDOUT_MASK = 6
    SUBSET = 7
    TEST_SPLIT = 8
    PREDICT = 9
    AUGMENT = 10
    STEP = 11


def _mix(values: UInt64s) -> UInt64s:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which each input bit flips half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_bits(
    sample_ids: npt.ArrayLike, count: int, *, seed: int, purpose: Purpose, epoch: int = 0, view: int = 0
) -> UInt64s:
    """Uniform 64-bit integers [S, count] for S sample ids.

    Raises:
        AssertionError: a negative seed, epoch or view.
    """
    assert min(seed, epoch, view) >= 0, (seed, epoch, view)
    key = np.zeros(1, np.uint64)
    for part in (seed, int(purpose), epoch, view):
        key = _mix(key + _GAMMA + np.uint64(part))
    keys_S = _mix(key + _GAMMA + np.atleast_1d(np.asarray(sample_ids)).astype(np.uint64))
    steps_C = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return _mix(keys_S[:, None] + steps_C[None, :])


def uniforms(
    sample_ids: npt.ArrayLike, count: int, *, seed: int, purpose: Purpose, epoch: int = 0, view: int = 0
) -> npt.NDArray[np.float64]:
    """Uniform float64 numbers [S, count] in [0, 1), from the top 53 bits of `random_bits`."""
    bits = random_bits(sample_ids, count, seed=seed, purpose=purpose, epoch=epoch, view=view)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(
    sample_ids: npt.NDArray[np.int64], *, seed: int, purpose: Purpose, epoch: int = 0
) -> npt.NDArray[np.int64]:
    """The sample ids in a random order: sorted by their own random key, ties by id."""
    keys = random_bits(sample_ids, 1, seed=seed, purpose=purpose, epoch=epoch)[:, 0]
    return sample_ids[np.lexsort((sample_ids, keys))]
