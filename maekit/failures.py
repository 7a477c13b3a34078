"""Failures of libraries that a user can do something about, told by their words, as a sentence without a traceback."""

from __future__ import annotations

_NO_MEMORY = ("ALLOC_FAILED", "MPS backend out of memory", "can't allocate memory", "CUDA error: out of memory")
_NO_PEER = ("closed by peer", "reset by peer", "ncclRemoteError")
"""Of gloo, and of NCCL; both come as plain errors of torch's."""
_NETWORK = ("DistNetworkError", "DistStoreError")
"""Of the store where processes meet."""


def in_words(error: Exception) -> str | None:
    """What to tell the user of a failure, or None for one that is ours, whose traceback says more."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if out_of_memory(error):
        return f"out of memory: lower --batch-size, or keep it with --accum or --grad-checkpoint ({reason})"
    if lost_peer(error):
        return (
            "another process of this run has ended or cannot be reached, and this one cannot go on without it; what it "
            f"printed says why. Start all of them again with --or-resume ({reason})"
        )
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has no memory left: CUDA, its libraries, MPS, torch on a CPU and NumPy each have
    words of their own for it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def lost_peer(error: Exception) -> bool:
    """Whether another process of the same run is gone, as gloo, NCCL and torch's store say it."""
    if type(error).__name__ in _NETWORK:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_PEER)
