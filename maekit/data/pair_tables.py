"""Images with annotations in Parquet of the hub's image schema: two columns of images, parts by file name."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maekit.config import UserError, did_you_mean
from maekit.data.pair_parts import PairPart
from maekit.data.parquet import TablePart, by_part, described, find_files, holds_encoded, image_columns
from maekit.data.parts import printable

PATTERNS_HELP = (
    'give --image-pattern "...{}..." and --annotation-pattern "...{}...", where {} is the name that both share'
)
"""What to do where images and annotations lie in another way."""
_ANNOTATION_COLUMNS = ("annotation", "annotations", "label", "labels", "mask", "masks", "segmentation", "semantic_mask")


def open_tables(root: str, shown: str, columns: tuple[str | None, str | None], in_chans: int) -> dict[str, PairPart]:
    """Parts of Parquet files with a column of images and a column of annotations."""
    files = find_files(root, shown) if os.path.isdir(root) else [root] if root.lower().endswith(".parquet") else []
    if not files:
        raise UserError(
            f"--data {shown}: neither images/ and annotations/ (or masks/, labels/) nor Parquet in it; "
            f"for another layout, {PATTERNS_HELP}"
        )
    parts = {"train": files} if len(files) == 1 else by_part(files, shown)
    try:
        image, annotation = _two_columns(pq.ParquetFile(parts["train"][0]).schema_arrow, columns, shown)
        opened = {
            part: PairPart(
                TablePart(parts[part], image, in_chans, None, None), TablePart(parts[part], annotation, 1, None, None)
            )
            for part in ("train", "val")
            if part in parts
        }
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise UserError(f"--data {shown}: cannot be read as Parquet ({reason})") from None
    if not len(opened["train"]):
        raise UserError(f"--data {shown}: the training part has no rows")
    return {part: pairs for part, pairs in opened.items() if len(pairs)}


def _two_columns(schema: Any, columns: tuple[str | None, str | None], shown: str) -> tuple[str, str]:
    """The columns of images and of annotations: those asked for, or by kind and name."""
    for flag, wanted in zip(("--image-column", "--annotation-column"), columns, strict=True):
        if wanted is not None and wanted not in schema.names:
            raise UserError(f"{flag} {wanted}: not in {shown}; {did_you_mean(wanted, schema.names)}")
        if wanted is not None and not holds_encoded(schema.field(wanted).type):
            raise UserError(f"{flag} {wanted}: not encoded images; the columns of {shown}: {described(schema)}")
    image, annotation = columns
    if image is not None and image == annotation:
        raise UserError(f"--image-column and --annotation-column are both {image}")
    others = [name for name in image_columns(schema) if name not in columns]
    if annotation is None:
        named = [name for name in others if name.lower() in _ANNOTATION_COLUMNS]
        # where no name tells, the images come first
        annotation = next(iter(named or others[0 if image else 1 :]), None)
    if image is None:
        image = next((name for name in others if name != annotation), None)
    if image is None or annotation is None:
        flags = "--image-column and --annotation-column"
        raise UserError(f"--data {shown}: two image columns are needed; name them by {flags}: {described(schema)}")
    return image, annotation
