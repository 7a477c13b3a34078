"""Write the features of every image to a file.

    maekit embed runs/c10 --data ~/images --out features.parquet --pool mean

One row for each image, in the order of the data: `part`, `id` (the sample id), `name`, `label` and `class` where the
data have labels, `error` (why an image cannot be read, else null), `features` (float32; null for such an image, NaN in
an .npz). Nothing is masked, shuffled or augmented: the centre of each image, at the model's size.

Rows are computed in chunks, each written to OUT.partial as a file of its own; at the end they are put together. So
memory does not grow with the data, an interrupted call continues where it was, and the disk holds the features twice
for a moment. Cost: one forward pass for each image.

Shapes: B batch, C channels, H x W pixels, T tokens, D width, R rows of a chunk, F values of one row ([D] or [T, D]).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from rich.markup import escape
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maekit.config import EmbedConfig, UserError
from maekit.data.centres import Centres, collate_centres
from maekit.data.features import Chunk, is_done, make_schema, merge, read_chunks, write_chunk
from maekit.data.levels import remarks_for
from maekit.data.parts import Part
from maekit.data.sources import Source, choose_parts, open_source
from maekit.data.workers import choose_workers, worker_options
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import choose_attention, choose_device, choose_precision, to_device
from maekit.terminal import counting, make_console, remark
from maekit.weights.store import load_as

SLICE = 16
"""Images that the encoder takes at a time on a CPU, where the last bits of a product depend on the number of its rows.
Rows of a chunk are a multiple of it."""
CHUNK_ROWS = 1024
CHUNK_BYTES = 64 << 20
"""A chunk is what an interruption can cost, and what memory holds."""
SHOWN = 20
"""Unreadable images that are named on the screen; the file names all."""


@dataclass(frozen=True)
class Encoder:
    """What turns images into rows: the model, cut after the wanted block, and how it is run."""

    model: MaskedAutoencoder
    config: EmbedConfig
    device: torch.device
    precision: str
    shape: tuple[int, ...]
    """Of one row's features: [D] or [T, D]."""

    @torch.no_grad()
    def features(self, images_BCHW: Tensor, count: int) -> Tensor:
        """Features [B, F], float32 on the CPU, computed `count` images at a time, the last ones filled up by zeros."""
        rows = []
        for start in range(0, len(images_BCHW), count):
            some = to_device(images_BCHW[start : start + count], self.device)
            filled = torch.cat([some, some.new_zeros(count - len(some), *some.shape[1:])])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                found = self.model.encode(self.model.normalize(filled), pool=self.config.pool)
            rows.append(found[: len(some)].float().flatten(1).cpu())
        return torch.cat(rows)


def main(source: str, config: EmbedConfig) -> int:
    """Compute the rows that are missing, then put all of them into one file.

    Returns: 0, also where some images cannot be read; 130 where Ctrl-C ended it, and the same call continues.

    Raises:
        UserError: flags, weights or data that cannot be used, or none of the images can be read.
    """
    console = make_console()
    check(config)
    device = choose_device(config.device).value
    precision = choose_precision(config.precision, device).value
    model = load_as(source, config, device)
    remark(console, model.key_report.remarks())
    model = cut(model, config)
    use_fused_attention(model, choose_attention(device, precision).value)
    width = model.encoder.embed_dim
    tokens = model.num_prefix + model.num_patches
    encoder = Encoder(model, config, device, precision, (tokens, width) if config.pool == "tokens" else (width,))

    data = open_source(
        config.data,
        in_chans=model.config.in_chans,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    remark(console, remarks_for(data, model.passport.mean, model.passport.std))
    parts = choose_parts(data, config.part, config.data)
    chunks = cut_chunks(parts, math.prod(encoder.shape))
    description = describe(source, data, parts, encoder)
    schema = make_schema(parts, description)
    folder = Path(f"{config.out}.partial")
    open_partial(folder, description)
    missing = [chunk for chunk in chunks if not is_done(folder / chunk.file, chunk, schema)]
    if missing != chunks:
        console.print(f"continues {escape(str(folder))}: {len(chunks) - len(missing)} of {len(chunks)} chunks are done")
    try:
        for name, part in parts.items():
            mine = [chunk for chunk in missing if chunk.part == name]
            if mine:
                with counting(console, f"features of {name}") as progress:
                    write_chunks(folder, part, mine, encoder, schema, progress)
        with counting(console, "writing one file") as progress:
            finish(folder, chunks, config, schema, parts, progress)
    except KeyboardInterrupt:
        console.print(f"stopped; the same call continues from {escape(str(folder))}", soft_wrap=True)
        return 130
    shape = " x ".join(str(side) for side in encoder.shape)
    rows = sum(len(part) for part in parts.values())
    console.print(f"features: {escape(config.out)} ({rows:,} rows of {shape} float32)", soft_wrap=True)
    report_unreadable(console.print, folder, chunks)
    shutil.rmtree(folder)
    return 0


def check(config: EmbedConfig) -> None:
    """Refuse what can be known to be wrong before weights and data are opened."""
    problems = []
    out = Path(config.out)
    if out.suffix.lower() not in (".parquet", ".npz"):
        problems.append(f"--out {config.out}: name a file that ends in .parquet or .npz")
    elif out.exists():
        problems.append(f"--out {config.out}: is there already; delete it or name another file")
    if config.batch_size < 1:
        problems.append(f"--batch-size {config.batch_size}: must be above 0")
    if config.workers is not None and config.workers < 0:
        problems.append(f"--workers {config.workers}: must not be negative")
    if problems:
        raise UserError(*problems)


def cut(model: MaskedAutoencoder, config: EmbedConfig) -> MaskedAutoencoder:
    """The model, ending with the wanted block: later ones are not computed, and neither is the final normalisation."""
    if config.pool == "cls" and not model.encoder.has_class_token:
        raise UserError("--pool cls: this encoder has no class token; take --pool mean")
    depth = len(model.encoder.blocks)
    if config.block is not None and not 1 <= config.block <= depth:
        raise UserError(f"--block {config.block}: this encoder has blocks 1 to {depth}")
    if config.block not in (None, depth):
        model.encoder.blocks = model.encoder.blocks[: config.block]
        model.encoder.norm = nn.Identity()
    return model


def cut_chunks(parts: dict[str, Part], values: int) -> list[Chunk]:
    """All rows in order, in chunks of one part each; `values` of float32 make a row."""
    rows = min(CHUNK_ROWS, max(SLICE, CHUNK_BYTES // (4 * values) // SLICE * SLICE))
    return [
        Chunk(name, start, min(start + rows, len(part)))
        for name, part in parts.items()
        for start in range(0, len(part), rows)
    ]


def describe(source: str, data: Source, parts: dict[str, Part], encoder: Encoder) -> dict[str, Any]:
    """What the features are, as the file says it: two calls with the same description give the same rows."""
    digest = hashlib.sha256()
    for name, tensor in encoder.model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    passport, config = encoder.model.passport, encoder.config
    return {
        "source": source,
        "weights_sha256": digest.hexdigest(),
        "weights_license": passport.weights_license,
        "model": dataclasses.asdict(encoder.model.config),
        "mean": list(passport.mean),
        "std": list(passport.std),
        "epochs": passport.epochs,
        "pool": config.pool,
        "block": config.block or len(encoder.model.encoder.blocks),
        "final_norm": not isinstance(encoder.model.encoder.norm, nn.Identity),
        "shape": list(encoder.shape),
        "data": data.name,
        "parts": {name: {"rows": len(part), "fingerprint": part.fingerprint} for name, part in parts.items()},
        "device": encoder.device.type,
        "precision": encoder.precision,
        "batch": SLICE if encoder.device.type == "cpu" else encoder.config.batch_size,
    }


def open_partial(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder of chunks, or go on with one.

    Raises:
        UserError: it cannot be written, or holds the work of a call that gives other features.
    """
    told = folder / "job.json"
    text = json.dumps(description, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not told.exists():
            temporary = folder / f".job.{os.getpid()}.tmp"
            temporary.write_text(text)
            os.replace(temporary, told)
        before = json.loads(told.read_text())
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror})") from None
    except ValueError:
        before = {}
    differing = [key for key, value in json.loads(text).items() if before.get(key) != value and key != "source"]
    if differing:
        raise UserError(
            f"--out: {folder} holds the unfinished work of another call (it differs in {', '.join(differing)}): "
            "delete that folder, or name another file"
        )


def write_chunks(
    folder: Path, part: Part, chunks: list[Chunk], encoder: Encoder, schema: Any, progress: Callable[[int, int], None]
) -> None:
    """Compute the rows of chunks of one part; each file appears whole or not at all."""
    on_cpu = encoder.device.type == "cpu"
    size = math.ceil(encoder.config.batch_size / SLICE) * SLICE if on_cpu else encoder.config.batch_size
    batches = [
        list(range(start, min(start + size, chunk.stop)))
        for chunk in chunks
        for start in range(chunk.start, chunk.stop, size)
    ]
    workers, passport = choose_workers(encoder.config.workers, 1).value, encoder.model.passport
    loader: DataLoader[Any] = DataLoader(
        Centres(part, encoder.model.config.size_hw, passport.interpolation, passport.crop_pct),
        batch_sampler=batches,
        collate_fn=collate_centres,
        **worker_options(workers),
        pin_memory=encoder.device.type == "cuda",
    )
    arrivals = iter(loader)
    for chunk in chunks:
        rows_RF = np.zeros((chunk.stop - chunk.start, math.prod(encoder.shape)), np.float32)
        reasons: list[str] = []
        while len(reasons) < len(rows_RF):
            images, found = next(arrivals)
            if images is not None:
                features = encoder.features(images, SLICE if on_cpu else size)
                rows_RF[len(reasons) : len(reasons) + len(found)] = features.numpy()
            reasons += found
            progress(chunk.start + len(reasons), len(part))
        try:
            write_chunk(folder, part, chunk, rows_RF, reasons, schema)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"--out: {folder} cannot be written ({why}); the same call continues from there") from None


def finish(
    folder: Path,
    chunks: list[Chunk],
    config: EmbedConfig,
    schema: Any,
    parts: dict[str, Part],
    progress: Callable[[int, int], None],
) -> None:
    """Put the chunks into one file, which appears whole or not at all.

    Raises:
        UserError: none of the images can be read, or the file cannot be written.
    """
    readable = sum(table["error"].null_count for table in read_chunks(folder, chunks, ["error"]))
    if not readable:
        first = next(read_chunks(folder, chunks, ["name", "error"])).to_pylist()[0]
        shutil.rmtree(folder)
        raise UserError(f"--data: none of the images can be read; the first: {first['name']}: {first['error']}")
    out = Path(config.out)
    names = next((part.class_names for part in parts.values() if part.class_names), [])
    try:
        merge(folder, chunks, out, schema, names, progress)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({why}); {folder} keeps the work") from None


def report_unreadable(say: Callable[..., None], folder: Path, chunks: list[Chunk]) -> None:
    """Name the images that cannot be read, whose rows have no features."""
    count = 0
    for table in read_chunks(folder, chunks, ["name", "error"]):
        for row in table.filter(pc.is_valid(table["error"])).to_pylist():
            count += 1
            if count <= SHOWN:
                say(f"[yellow]cannot be read:[/yellow] {escape(row['name'])}: {escape(row['error'])}", soft_wrap=True)
    if count:
        say(f"{count:,} images cannot be read: their rows are there, without features, and with the reason in `error`")
