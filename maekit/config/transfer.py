"""Taking features and weights elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maekit.config.weights import SourceConfig


@dataclass(kw_only=True)
class EmbedConfig(SourceConfig):
    """Write the features of every image to a file, in the order of the data. An interrupted call continues."""

    data: str
    """Images: a known name, a folder, a Parquet file or folder, a .tar or .zip or a folder of them, a text file or CSV
    of paths, or hub:OWNER/NAME. Labels are taken along."""
    out: str
    """File to write, .parquet or .npz. It appears when it is complete; until then the work lies in OUT.partial."""
    pool: Literal["cls", "mean", "tokens"] = "mean"
    """cls: the class token; mean: the mean of the patch tokens; tokens: class, registers, then patches row by row."""
    block: int | None = None
    """Features after this block, counted from 1. Default: after the last one. The final normalisation belongs to the
    last block: earlier ones give their output as it is."""
    part: Literal["train", "val", "test", "all"] = "all"
    """Which part of the data. all: every part that is there, one after the other."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels."""
    batch_size: int = 256
    """Images that are decoded and sent to the device at a time. On a CPU it never changes a bit of the features: the
    encoder always takes 16 there. On other devices the last bits can depend on it."""
    workers: int | None = None
    """Processes that decode images. Default: chosen from the cores. 0: the main process."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the encoder; the file holds float32."""


@dataclass(kw_only=True)
class ConvertConfig(SourceConfig):
    """Write weights for another tool, load them back through that tool, and keep them only where outputs agree.

    A classifier of maekit finetune is written whole; --encoder-only leaves its head, or a decoder, out. Of a
    segmentation the encoder is written.
    """

    to: Literal["timm", "hf", "official", "onnx", "torch-export"]
    """timm: a folder for timm.create_model("local-dir:DIR", pretrained=True); hf: a folder for transformers'
    from_pretrained; official: a .pth as the released MAE weights; onnx, torch-export: a graph from pixels in 0..1 to
    features or logits."""
    out: str
    """Folder to write; new or empty."""
    pool: Literal["cls", "mean", "tokens"] = "mean"
    """timm, onnx and torch-export: what a call gives. cls: the class token; mean: the mean of the patch tokens;
    tokens: class, registers, then patches row by row. A classifier pools as it was trained, and gives logits."""


@dataclass(kw_only=True)
class AttendConfig(SourceConfig):
    """Draw attention maps of every head, and the patch features as colours, beside the images."""

    image: tuple[str, ...]
    """One or more image files: a row for each."""
    out: str = "maps.png"
    """PNG to write."""
    block: int | None = None
    """Attention of this block, counted from 1. Default: the last one."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(kw_only=True)
class PushConfig:
    """Upload a run's weights to the Hugging Face hub, with a card that says what they are. No image is uploaded."""

    private: bool = False
    """Make a new repository private. One that exists stays as it is."""
    license: str | None = None
    """Licence of the weights, such as apache-2.0, where they have none yet. It is written into the weights and the
    card; weights that came with a licence keep it."""
    message: str = "Weights from maekit"
    """What the commit says."""
    dry_run: bool = False
    """Print the card and what would be uploaded, and stop."""
