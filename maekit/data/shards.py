"""Parquet shards in the hub's image schema, with the place of each image in the footer; and images made ready for them.

Schema: https://huggingface.co/docs/datasets/image_dataset. Legend: H height, W width, C channels.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from maekit.config import UserError
from maekit.data.images import BadImage
from maekit.data.parts import EncodedPart, Part
from maekit.data.pixels import Pixels, Window
from maekit.data.rows import INDEX_KEY, make_index

ROWS_IN_GROUP = 100
"""As the hub writes images: other tools read a whole row group for one row."""
HUB_PARTS = {"train": "train", "val": "validation", "test": "test"}
"""Part -> the hub's name of the split, which begins the file's name."""


# ---- images ----


@dataclass(frozen=True)
class Recipe:
    """How images are made ready."""

    size: int
    """Shorter side in pixels; smaller images keep theirs."""
    format: Literal["jpeg", "png"]
    quality: int


@dataclass
class Packed:
    """One image made ready, or the reason why it cannot be read."""

    index: int
    data: bytes = b""
    bad: str = ""
    bytes_before: int = 0
    resized: bool = False


def pack_chunk(recipe: Recipe, part: Part, chunk: range) -> list[Packed]:
    """A chunk of a part's images, resized and encoded.

    Raises:
        UserError: an image that the format cannot hold.
    """
    return [_pack(recipe, part, index) for index in chunk]


def _pack(recipe: Recipe, part: Part, index: int) -> Packed:
    whole_hw = [0, 0]

    def look(height: int, width: int) -> Window:
        whole_hw[:] = height, width
        # Twice the size is left to the resizing filter, so that the result cannot be told from a full decode.
        factor = next(f for f in (8, 4, 2, 1) if f * 2 * recipe.size <= min(height, width) or f == 1)
        return Window(0, 0, height, width, factor)

    try:
        image_HWC = part.read(index, look)
    except BadImage as error:
        return Packed(index, bad=str(error))
    height, width = whole_hw
    zoom = min(1.0, recipe.size / min(height, width))
    target_wh = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    try:
        data = encode(image_HWC, target_wh, recipe)
    except UserError as error:
        raise UserError(f"{part.name(index)}: {error}") from None
    return Packed(index, data, bytes_before=_stored_bytes(part, index, image_HWC), resized=zoom < 1)


def _stored_bytes(part: Part, index: int, image_HWC: Pixels) -> int:
    return part.stored_bytes(index) if isinstance(part, EncodedPart) else image_HWC.nbytes


def encode(image_HWC: Pixels, size_wh: tuple[int, int], recipe: Recipe) -> bytes:
    """An image with 3 channels, resized (bicubic, antialiased) and encoded; gray where its channels are equal.

    Raises:
        UserError: 16-bit or float data that the format cannot hold.
    """
    gray = all(np.array_equal(image_HWC[..., 0], image_HWC[..., c]) for c in range(1, image_HWC.shape[2]))
    if image_HWC.dtype == np.uint8:
        image = Image.fromarray(image_HWC[..., 0] if gray else image_HWC)
        if image.size != size_wh:
            image = image.resize(size_wh, Image.Resampling.BICUBIC)
    else:
        image = _sixteen_bit(image_HWC, size_wh, gray, recipe.format)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if recipe.format == "jpeg" else "PNG", **_options(recipe))
    return buffer.getvalue()


def _options(recipe: Recipe) -> dict[str, int]:
    return {"quality": recipe.quality} if recipe.format == "jpeg" else {"compress_level": 6}


def _sixteen_bit(image_HWC: Pixels, size_wh: tuple[int, int], gray: bool, form: str) -> Image.Image:
    levels = np.rint(image_HWC * np.float32(65535))
    if image_HWC.min() < 0 or image_HWC.max() > 1 or not np.allclose(levels / 65535, image_HWC, rtol=0, atol=1e-7):
        raise UserError("float data: neither JPEG nor PNG holds them; train on the files as they are")
    if not gray:
        raise UserError("16-bit colour: neither JPEG nor Pillow's PNG holds it; train on the files as they are")
    if form == "jpeg":
        raise UserError("16-bit gray: JPEG has 8 bits; --format png keeps all 16")
    plane = Image.fromarray(np.ascontiguousarray(levels[..., 0], np.float32))
    if plane.size != size_wh:
        plane = plane.resize(size_wh, Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.rint(np.asarray(plane)), 0, 65535).astype(np.uint16))


# ---- shards ----


class ShardWriter:
    """Writes one part's rows into shards of about `shard_bytes`, in the order in which they come."""

    def __init__(self, folder: Path, part: str, class_names: list[str] | None, shard_bytes: int) -> None:
        self.folder, self.part, self.shard_bytes = folder, HUB_PARTS[part], shard_bytes
        self.labelled = class_names is not None
        features: dict[str, object] = {"image": {"_type": "Image"}}
        fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        if class_names is not None:
            features["label"] = {"names": class_names, "_type": "ClassLabel"}
            fields.append(("label", pa.int64()))
        description = json.dumps({"info": {"features": features}})
        self.schema = pa.schema(fields, metadata={b"huggingface": description.encode()})
        self.rows = self.bytes = self.shards = 0
        self._waiting: list[tuple[bytes, str, int]] = []
        self._writer: pq.ParquetWriter | None = None
        self._places: list[tuple[int, int]] = []

    def add(self, data: bytes, path: str, label: int) -> None:
        """One row."""
        self._waiting.append((data, path, label))
        self.rows += 1
        self.bytes += len(data)
        if len(self._waiting) == ROWS_IN_GROUP:
            self._write_group()
            if self._sink.tell() >= self.shard_bytes:
                self._close_shard()

    def finish(self) -> None:
        """Write what waits and give the files their names, which tell the number of shards."""
        self._write_group()
        self._close_shard()
        for number in range(self.shards):
            os.replace(self._path(number), self.folder / f"{self.part}-{number:05d}-of-{self.shards:05d}.parquet")

    def abandon(self) -> None:
        """Let go of an open file."""
        if self._writer is not None:
            self._sink.close()

    def _path(self, number: int) -> Path:
        return self.folder / f".{self.part}-{number:05d}.part"

    def _write_group(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._sink = pa.OSFile(str(self._path(self.shards)), "wb")
            # Uncompressed and plain, so that the bytes of each image lie in the file in one piece; JPEG and PNG are
            # compressed already. No statistics: the smallest and largest image of each group would be in the footer.
            self._writer = pq.ParquetWriter(
                self._sink, self.schema, compression="none", use_dictionary=False, write_statistics=False
            )
        data, paths, labels = zip(*self._waiting, strict=True)
        images = pa.StructArray.from_arrays(
            [pa.array(data, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
        )
        columns = [images, pa.array(labels, pa.int64())] if self.labelled else [images]
        begin = self._sink.tell()
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=ROWS_IN_GROUP)
        self._sink.flush()
        self._places += _find(self._path(self.shards), list(data), begin, self._sink.tell())
        self._waiting = []

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        places = np.array(self._places, np.int64).reshape(-1, 2)
        index = make_index("image", places, self._sink.tell())
        self._writer.add_key_value_metadata({INDEX_KEY.decode(): index.decode()})
        self._writer.close()
        self._sink.close()
        with self._path(self.shards).open("rb") as file:
            os.fsync(file.fileno())
        self._writer, self._places = None, []
        self.shards += 1


def _find(path: Path, data: list[bytes], begin: int, end: int) -> list[tuple[int, int]]:
    """Where the row group that was just written holds each image: (start, length). Each has its length before it."""
    places = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as written:
        at = begin
        for one in data:
            at = written.find(len(one).to_bytes(4, "little") + one, at, end)
            assert at >= 0, "Parquet's plain encoding holds each value in one piece"
            places.append((at + 4, len(one)))
            at += 4 + len(one)
    return places


def shard_bytes(megabytes: float) -> int:
    """Of a shard's size in MB."""
    return math.ceil(megabytes * 1_000_000)
