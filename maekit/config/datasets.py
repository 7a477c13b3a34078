"""Looking at and preparing images before any training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckDataConfig:
    """Read every image without training: counts, sizes, labels, and the files that cannot be read with the reasons."""

    data: str
    """What to read: a known name, a folder, a Parquet file or folder, or a text file of paths."""
    in_chans: int = 3
    """Channels of the model to come. With 3, grayscale images are replicated."""
    image_column: str | None = None
    """Parquet: the column with the images."""
    label_column: str | None = None
    """Parquet: the column with the labels."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores. 0: the main process."""
    out: str | None = None
    """JSON file for the report with all that was counted and every bad file. Default: none is written."""
