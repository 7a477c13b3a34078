"""Features of whole images after every block of an encoder: one forward pass a view, pooled at once, kept in memory.

After a block: the residual stream as it is; after the last one: with the encoder's final normalisation, which is what
`MaskedAutoencoder.encode` gives. Linear probes standardise each feature, so its scale after earlier blocks is of no
matter to them; k-NN only centres, and large features weigh more there.

Shapes: S images, V views (plain, then mirrored), L blocks, P stored poolings, T prefix tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maekit.config import UserError
from maekit.data.loader import Pool, Progress
from maekit.models.mae import MaskedAutoencoder
from maekit.models.pooling import average_cells
from maekit.training.capacity import RAM_SHARE

Pooling = Literal["cls", "mean", "both"]
"""The class token, the mean of the patch tokens, or one behind the other."""
CPU_BATCH = 64
"""Images per forward pass on a CPU, at most: the activations of 256 small images lie outside its caches, which takes a
quarter longer."""
PIXEL_SIDE = 32
"""Larger images are averaged to this before their pixels are features: a linear layer on more is dear."""
WORKING_COPIES = 6
"""What classifiers need beside what is stored: float32 copies of one block's features (standardised, shuffled ...)."""


@dataclass(frozen=True)
class BlockFeatures:
    """What was kept of every image; blocks count from 1."""

    stored_LPVSD: Tensor
    blocks: tuple[int, ...]
    kinds: tuple[Literal["cls", "mean"], ...]

    @property
    def views(self) -> int:
        return self.stored_LPVSD.shape[2]

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """All that `get` can give: both where both are stored."""
        return (*self.kinds, "both") if len(self.kinds) == 2 else self.kinds

    def get(self, block: int, pooling: Pooling, rows_S: Tensor | None = None, views: int | None = None) -> Tensor:
        """Features [V, S, D] (both: [V, S, 2 D], in the order of `kinds`) of all images or of some, float32.

        views: so many of them; None: all.
        """
        maps_PVSD = self.stored_LPVSD[self.blocks.index(block)][:, :views]
        wanted = self.kinds if pooling == "both" else (pooling,)
        maps = [maps_PVSD[self.kinds.index(kind)] for kind in wanted]
        some = [one if rows_S is None else one[:, rows_S] for one in maps]
        return (some[0] if len(some) == 1 else torch.cat(some, dim=-1)).float()

    def is_finite(self, block: int) -> bool:
        """Whether no feature after the block is NaN or infinite."""
        return bool(self.stored_LPVSD[self.blocks.index(block)].isfinite().all())

    def kept(self, kept_S: npt.NDArray[np.bool_]) -> BlockFeatures:
        """Without the images that are False."""
        if kept_S.all():
            return self
        rows = torch.from_numpy(np.flatnonzero(kept_S)).to(self.stored_LPVSD.device)
        return BlockFeatures(self.stored_LPVSD.index_select(3, rows), self.blocks, self.kinds)


def of_pixels(rows_SD: Tensor) -> BlockFeatures:
    """Features that no block made, in the same form: block 0, one view."""
    return BlockFeatures(rows_SD[None, None, None], (0,), ("mean",))


def raw_pixels(pool: Pool, ids: npt.NDArray[np.int64], batch_size: int) -> Tensor:
    """The pixels themselves as features [S, C*H*W], those of larger images averaged to PIXEL_SIDE."""
    rows = []
    for batch in pool.eval_batches(ids, batch_size):
        pixels = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
        if max(pixels.shape[2:]) > PIXEL_SIDE:
            height, width = (min(side, PIXEL_SIDE) for side in pixels.shape[2:])
            pixels = average_cells(pixels, (height, width))
        rows.append(pixels.flatten(1))
    return torch.cat(rows)


@torch.no_grad()
def extract_blocks(
    model: MaskedAutoencoder,
    pool: Pool,
    ids: npt.NDArray[np.int64],
    batch_size: int,
    plan: Plan,
    mirrored: bool = False,
    on_progress: Progress | None = None,
) -> BlockFeatures:
    """Pooled tokens of centre crops after the plan's blocks, and with `mirrored` of the same crops mirrored."""
    batch_size = min(batch_size, CPU_BATCH) if model.mean.device.type == "cpu" else batch_size
    views = 1 + int(mirrored)
    shape = (len(plan.blocks), len(plan.kinds), views, len(ids), model.encoder.embed_dim)
    stored_LPVSD = torch.empty(shape, dtype=plan.dtype, device=model.mean.device)
    done = 0
    for batch in pool.eval_batches(ids, batch_size):
        images = model.normalize(batch.images)
        rows = slice(done, done + len(images))
        for view in range(views):
            write = _writer(stored_LPVSD[:, :, view, rows], plan, model.num_prefix)
            encode_blocks(model, images if view == 0 else images.flip(-1), plan.blocks, write)
        done = rows.stop
        if on_progress is not None:
            on_progress(done, len(ids))
    return BlockFeatures(stored_LPVSD, plan.blocks, plan.kinds)


def _writer(place_LPBD: Tensor, plan: Plan, num_prefix: int) -> Callable[[int, Tensor], None]:
    def write(block: int, tokens_BND: Tensor) -> None:
        for row, kind in enumerate(plan.kinds):
            pooled = tokens_BND[:, 0] if kind == "cls" else tokens_BND[:, num_prefix:].mean(dim=1)
            place_LPBD[plan.blocks.index(block), row] = pooled

    return write


def encode_blocks(
    model: MaskedAutoencoder, images_BCHW: Tensor, blocks: Sequence[int], use: Callable[[int, Tensor], None]
) -> None:
    """Hand on the tokens [B, T + N, D] after each of the blocks while the encoder runs: they are never all in memory.

    The last block's come with the final normalisation.
    """
    depth = len(model.encoder.blocks)

    def hook(block: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _inputs, tokens_BND: use(block, tokens_BND)

    handles = [model.encoder.blocks[block - 1].register_forward_hook(hook(block)) for block in blocks if block < depth]
    try:
        tokens_BND = model.encode(images_BCHW, pool="tokens")
    finally:
        for handle in handles:
            handle.remove()
    if depth in blocks:
        use(depth, tokens_BND)


@dataclass(frozen=True)
class Plan:
    """What is kept of each image and how; `reason` says what it takes, and what was left out for want of memory."""

    blocks: tuple[int, ...]
    kinds: tuple[Literal["cls", "mean"], ...]
    dtype: torch.dtype
    reason: str


def plan_features(
    images: int, width: int, depth: int, kinds: tuple[Literal["cls", "mean"], ...], blocks: Sequence[int] | None,
    free: int, classes: int = 0,
) -> Plan:  # fmt: skip
    """All blocks in float32 where they fit, else in float16, else fewer of them, evenly spaced up to the last.

    images: views of all images together. blocks: those asked for, else all. free: bytes of memory. classes: L-BFGS
    keeps three numbers for each of them and each view.

    Raises:
        UserError: not even one block fits.
    """
    wanted = tuple(range(1, depth + 1)) if blocks is None else tuple(sorted(set(blocks)))
    working = WORKING_COPIES * images * width * len(kinds) * 4 + 3 * images * classes * 4
    room = RAM_SHARE * free - working
    per_block = images * width * len(kinds)
    for dtype, size in ((torch.float32, 4), (torch.float16, 2)):
        if len(wanted) * per_block * size <= room:
            return Plan(wanted, kinds, dtype, _told(wanted, depth, len(wanted) * per_block * size, dtype))
    fits = int(room // (2 * per_block)) if room > 0 else 0
    if fits < 1:
        needed = 2 * per_block + working
        raise UserError(
            f"--data: one block's features of {images:,} views take {needed / 1e9:.1f} GB with what classifiers need, "
            f"and {free / 1e9:.1f} GB are free: give --flip no, --pool mean, or fewer images"
        )
    some = tuple(wanted[len(wanted) - 1 - place * len(wanted) // fits] for place in reversed(range(fits)))
    told = _told(some, depth, len(some) * per_block * 2, torch.float16)
    return Plan(some, kinds, torch.float16, f"{told}: more do not fit into memory; --blocks chooses others")


def _told(blocks: Sequence[int], depth: int, size: int, dtype: torch.dtype) -> str:
    which = f"all {depth} blocks" if len(blocks) == depth else f"blocks {' '.join(map(str, blocks))} of {depth}"
    return f"{which}, {size / 2**20:,.0f} MiB in {str(dtype).removeprefix('torch.')}"
