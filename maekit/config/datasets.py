"""Looking at and preparing images before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maekit.config.segmentation import PairsConfig


@dataclass(kw_only=True)
class CheckDataConfig(PairsConfig):
    """Read every image without training: counts, sizes, labels, and the files that cannot be read with the reasons.

    Where there are annotations of pixels, masks/ beside images/ and the like, or what the flags for pairs name, these
    are read as maekit segment reads them.
    """

    data: str
    """What to read: a known name, a folder, a Parquet file or folder, a .tar or .zip or a folder of them, a text file
    of paths, a CSV of paths and labels, or a data set of the Hugging Face hub, hub:OWNER/NAME."""
    in_chans: int = 3
    """Channels of the model to come. With 3, grayscale images are replicated."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores. 0: the main process."""
    out: str | None = None
    """JSON file for the report with all that was counted and every bad file. Default: none is written."""


@dataclass(kw_only=True)
class PackConfig:
    """Write images once, resized, into Parquet shards that every later epoch and any other tool reads faster."""

    data: str
    """What to pack: a known name, a folder, a Parquet file or folder, a .tar or .zip or a folder of them, a text file
    of paths, a CSV of paths and labels, or a data set of the Hugging Face hub, hub:OWNER/NAME."""
    out: str
    """Folder for the shards; it must not exist, or be empty. It appears whole, when all is written."""
    size: int = 256
    """Shorter side in pixels. Smaller images are never enlarged. Usual: 8/7 of the training's input size."""
    format: Literal["jpeg", "png"] = "jpeg"
    """jpeg: small and fast; png: lossless, and 16-bit gray keeps its 16 bits."""
    quality: int = 95
    """JPEG's quality, 1 to 100."""
    shard_size: float = 256.0
    """About so many MB in each shard."""
    max_bad_share: float = 0.01
    """Stops where more than this share of a part's images cannot be read; fewer are left out, named in
    quarantine.jsonl. Ten are allowed in any case, up to a quarter of the part; 0: not one."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels."""
    workers: int | None = None
    """Processes that resize images. Default: chosen from the cores. 0: the main process."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, each naming the value, the rule and the flag."""
        found = []
        if self.size < 1:
            found.append(f"--size {self.size}: must be above 0")
        if not 1 <= self.quality <= 100:
            found.append(f"--quality {self.quality}: must lie between 1 and 100")
        if not self.shard_size > 0:
            found.append(f"--shard-size {self.shard_size:g}: must be above 0")
        if not 0 <= self.max_bad_share <= 1:
            found.append(f"--max-bad-share {self.max_bad_share:g}: must lie between 0 and 1")
        if self.workers is not None and self.workers < 0:
            found.append(f"--workers {self.workers}: must not be negative")
        return found
