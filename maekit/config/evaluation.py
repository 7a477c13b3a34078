"""Measuring and looking at pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maekit.config.base import spaced
from maekit.config.pretraining import MAX_MASK_RATIO
from maekit.config.weights import SourceConfig


@dataclass(kw_only=True)
class ProbeConfig(SourceConfig):
    """Measure frozen features by linear probes, k-NN and few labels, beside random weights and raw pixels.

    Blocks, poolings and settings are chosen on a held-out tenth of the training split; the test split is scored once.
    """

    data: str
    """Labelled images: a known name, a folder with one folder per class, a .tar or .zip of such a folder, WebDataset's
    shards with .cls files, a Parquet file or folder, or hub:OWNER/NAME."""
    out: str | None = None
    """Folder for card.json and card.png. Default: probe-NAME, in the run's folder if the only source is a run; the
    protocols paper and keras have one of their own, such as probe-NAME-paper. An earlier card in it that says something
    else is kept as card-1.json, card-2.json, ..."""
    pool: Literal["cls", "mean"] | None = None
    """Which tokens are the features. Default: the class token, the mean of the patches and both together are tried, the
    held-out part decides."""
    blocks: tuple[int, ...] | None = None
    """After which blocks of the encoder features are taken, from 1; -1 is the last. Default: after every block; where
    memory is short, fewer, which is said."""
    probes: tuple[Literal["lars", "few-labels", "attentive"], ...] | None = None
    """What is measured beside an L-BFGS probe and k-NN. lars: the paper's linear probe, seven learning rates side by
    side; few-labels: with 1 % and 10 % of the labels, three draws; attentive: learned queries over the last block's
    tokens, which are read again (5 minutes an encoder for CIFAR-10 on 2 cores). Default: all three, attentive only
    where its tokens take up to 256 MiB. Without a name after it, none."""
    protocol: Literal["cached", "paper", "keras"] = "cached"
    """paper: one more probe, the paper's own way: crops and mirroring anew in each of --lars-epochs epochs, on the
    last block. keras: one more probe, that of the Keras tutorial on masked image modelling, for its keras-* recipes: 50
    epochs of augmented images through a frozen encoder whose dropout is on. The encoder runs over the data so many
    times: both are meant for an accelerator."""
    lars_epochs: int = 90
    """Epochs of the paper's probe, on cached features and on augmented images."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """--protocol paper and --scratch: smallest and largest share of the image's area in a random crop."""
    flip: Literal["auto", "yes", "no"] = "auto"
    """Take features of mirrored training images too, which doubles the encoder's work; the held-out part decides
    whether linear probes use them. auto: yes, but on a CPU only where that costs under 5 TFLOP. no: nothing is
    mirrored in --protocol paper and --scratch either."""
    few_labels: tuple[float, ...] | None = None
    """Shares of the labels for the probe with few labels: drawn in proportion to the classes, one of each at least.
    Default: 0.01 and 0.1, as far as they give every class a label."""
    attentive_epochs: int = 10
    """Epochs of the attentive probe, in batches of 256, or down to 32 where there would be less than 500 steps."""
    scratch: bool = False
    """Also train the first source's encoder with the labels, from random weights, and probe it in the same way. As dear
    as a training run; maekit finetune --from-scratch has the knobs, this is a plain baseline."""
    scratch_epochs: int = 30
    """Epochs of --scratch."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels."""
    group_by: str | None = None
    """Never part the images of one patient, slide or scene: held-out and test images are whole groups. The column with
    the group's name (Parquet, tables), or a regular expression that is found in each image's path, such as
    'patient[0-9]+', or '^([^/]+)/', where the brackets name the group."""
    baselines: bool = True
    """Also measure the same encoder with random weights, and raw pixels."""
    batch_size: int = 256
    """Images per forward pass; changes speed and memory, never the features."""
    seed: int = 0
    """Seed of the random-weights encoder, and of the order in which probes see images."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the feature extraction."""

    def problems(self) -> list[str]:
        """What is wrong with the values by themselves, a line each that names the flag."""
        counts = {"lars-epochs": self.lars_epochs, "attentive-epochs": self.attentive_epochs}
        counts |= {"scratch-epochs": self.scratch_epochs, "batch-size": self.batch_size}
        found = [f"--{name} {value}: must be at least 1" for name, value in counts.items() if value < 1]
        found += [
            f"--few-labels {share:g}: must be above 0 and below 1 (0.01 is 1 %)"
            for share in self.few_labels or ()
            if not 0 < share < 1
        ]
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            found.append(f"--crop-scale {spaced(self.crop_scale)}: must be two shares in 0..1, the smaller first")
        if self.seed < 0:
            found.append(f"--seed {self.seed}: must not be negative")
        return found


@dataclass(kw_only=True)
class ReconstructConfig(SourceConfig):
    """Draw original, masked image, reconstruction and both pasted together, for any image; or score a part of data."""

    image: tuple[str, ...] = ()
    """One or more image files."""
    data: str = ""
    """Instead of --image: print loss and skill on these data, with masks that are the same in every call, the spread of
    the skill over the images, and which are reconstructed worst; and draw a few of them."""
    scores: str = ""
    """With --data: a .csv or .parquet file to write, a row for each image, worst reconstructed first; the panel then
    shows these. Their order is by excess: how far the loss lies above that of the better predictor that learns nothing
    on the same image. So noise, stripes and scrambled images come first, which nothing learned helps with; what is
    easier than the rest, such as images half of which are empty, stands at the end."""
    masks_per_image: int = 1
    """With --data: mean over so many masks of each image, for steadier scores. 1: the mask of every score."""
    part: Literal["train", "val", "test"] | None = None
    """Which part of --data. Default: test where there is one, else val, else train."""
    image_column: str | None = None
    """Parquet and tables: the column with the images or their paths."""
    label_column: str | None = None
    """Parquet and tables: the column with the labels, which --scores writes."""
    out: str = "panel.png"
    """PNG to write."""
    mask: Literal["random", "block", "grid"] | None = None
    """Which patches are hidden. Default: as in the pretraining."""
    hide: tuple[str, ...] = ()
    """Instead of --mask: black and white pictures of the images' proportions, one for all or one for each. Patches that
    white touches are hidden: what does the model put there?"""
    mask_ratio: float | None = None
    """Share of hidden patches. Default: the one of the pretraining."""
    seed: int = 0
    """Seed of the masks."""
    statistics: Literal["true-patch", "visible", "none"] = "true-patch"
    """Normalised targets only: whose mean and deviation bring the prediction back to pixels. true-patch: those of
    the hidden patch itself (the panel says so); visible: of the nearest visible patches; none: shown as predicted."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def problems(self) -> list[str]:
        """What is wrong with the values by themselves, a line each that names the flag."""
        found = []
        drawn = (self.mask, self.mask_ratio, self.seed) != (None, None, 0)
        if self.scores and not self.data:
            found.append(f"--scores {self.scores}: give --data D, the images to score")
        elif bool(self.image) == bool(self.data):
            found.append("give either --image FILE ..., to draw, or --data D, to score and draw a few")
        if self.scores and not self.scores.lower().endswith((".parquet", ".csv")):
            found.append(f"--scores {self.scores}: name a file that ends in .parquet or .csv")
        if self.masks_per_image < 1:
            found.append(f"--masks-per-image {self.masks_per_image}: must be at least 1")
        elif self.masks_per_image > 1 and not self.data:
            found.append(f"--masks-per-image {self.masks_per_image}: goes with --data D; each --image has one mask")
        if self.data and (drawn or self.hide):
            found.append("--mask, --mask-ratio, --seed, --hide: with --data the masks are those of every score")
        elif drawn and self.hide:
            found.append("--hide says which patches are hidden: leave out --mask, --mask-ratio and --seed")
        if self.mask_ratio is not None and not 0 <= self.mask_ratio <= MAX_MASK_RATIO:
            found.append(f"--mask-ratio {self.mask_ratio:g}: must lie between 0 and {MAX_MASK_RATIO}")
        if self.seed < 0:
            found.append(f"--seed {self.seed}: must not be negative")
        if not self.out.lower().endswith(".png"):
            found.append(f"--out {self.out}: panels are PNG files; name one that ends in .png")
        return found
