"""How fast the loader is, measured before a run, and what to do where it cannot keep up with the model."""

from __future__ import annotations

import math
import time

from maekit.config import PretrainConfig
from maekit.data.order import sides
from maekit.data.parquet import TablePart
from maekit.data.parts import Part, evenly_spaced
from maekit.data.rows import PlacedRows
from maekit.data.stream import Decoder, collate
from maekit.runtime import Choice

_WARM_UP = 4
_SPARE = 1.1
"""The loader is taken to keep up where it is this much faster than the model: its speed varies along the data."""


def worker_images_per_second(part: Part, config: PretrainConfig, *, images: int = 48, seconds: float = 2.0) -> float:
    """What one process reads, decodes, crops and collates of the training images in a second.

    It takes so many evenly spaced images or so many seconds, whichever ends first. Crops are functions of their keys,
    so nothing that a run draws later changes. Files that the system still holds in memory are read faster than later
    on; 0 where none can be read.
    """
    read = Decoder(part, config, sides(part, config))
    ids = evenly_spaced(len(part), images + _WARM_UP).tolist()
    if len(ids) > 2 * _WARM_UP:
        read.__getitems__([(0, index) for index in ids[:_WARM_UP]])
        ids = ids[_WARM_UP:]
    began, done = time.perf_counter(), 0
    for start in range(0, len(ids), 8):
        samples = read.__getitems__([(0, index) for index in ids[start : start + 8]])
        images_BSTC, _, _ = collate(samples)
        done += 0 if images_BSTC is None else len(images_BSTC)
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def keeps_up(
    part: Part,
    *,
    per_worker: float,
    model: float,
    workers: int,
    cores: int,
    masks_per_image: int = 1,
) -> Choice[bool]:
    """Whether the loader feeds the model, and where it does not, which flags help.

    Args:
        per_worker: images/s of one loader process.
        model: images/s that one training process could take, each image once whatever its masks.
        workers: loader processes of each training process; 0 decodes in the main process, between the steps.
        cores: CPU cores for each training process.
    """
    loader = per_worker * max(1, min(workers, cores))
    said = f"loader about {loader:,.0f} images/s, {per_worker:,.0f} in each process; model about {model:,.0f}"
    if workers and loader >= _SPARE * model:
        return Choice(True, said)
    if not per_worker > 0:
        return Choice(False, "none of the sampled images can be read: maekit check-data tells why")
    helps = []
    needed = math.ceil(_SPARE * model / per_worker)
    if workers < cores and needed > workers:
        helps.append(f"--workers {min(needed, cores)}")
    if needed > cores:
        if not (isinstance(part, TablePart) and isinstance(part.rows, PlacedRows)):
            helps.append("maekit pack resizes the images once")
        if masks_per_image == 1:
            helps.append(f"--masks-per-image {min(4, max(2, math.ceil(needed / cores)))} uses each decoded image again")
    return Choice(False, f"{said}: the model will wait" + (f"; what helps: {', '.join(helps)}" if helps else ""))
