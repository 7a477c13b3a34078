"""Draw what the model makes of any image: original | masked | reconstruction | pasted; or score a part of data.

    maekit reconstruct runs/c10 --image photo.png --out panel.png --mask-ratio 0.75 --seed 3
    maekit reconstruct runs/c10 --image photo.png --hide region.png
    maekit reconstruct runs/c10 --data cifar10
    maekit reconstruct runs/c10 --data photos/ --scores scores.csv --masks-per-image 8

A file of scores has a row for each image, the worst first: `part`, `path`, `label` where the data have labels, `loss`,
`trivial` (the loss of the better predictor that learns nothing, on this image), `excess` = loss - trivial, by which the
rows are in order, `skill` = 1 - loss / trivial, and `error` (why an image cannot be read; such rows come last and have
no numbers). Blank images have no skill, as there is nothing to predict. A .parquet file also says in its metadata,
under "maekit", whose numbers these are.
Why the excess: loss alone finds noise and passes over what is blurred or flat, as both are easy to fill in; skill
divides by next to nothing on flat images, which then come first, whatever is in them (LOG.md has the trial).
Cost: one forward pass for each image and mask; memory grows with the number of images by a few numbers each.

Shapes: N images, B batch, C channels, H x W pixels, V visible patches, M hidden ones.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.console import Console
from rich.markup import escape

from maekit.config import ReconstructConfig, UserError
from maekit.data.centres import read_centres, read_hidden
from maekit.data.levels import remarks_for
from maekit.data.loader import Pool, lowest_hash, open_pool
from maekit.data.parts import Part, loose_files
from maekit.data.row_files import Writer, row_file
from maekit.data.sources import choose_parts, open_source
from maekit.data.workers import choose_workers
from maekit.keeping import keeping
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks, make_masks
from maekit.rng import Purpose
from maekit.runtime import choose_attention, choose_device
from maekit.terminal import counting, make_console, make_table, print_settings, remark
from maekit.training.monitor import (
    PANEL_IMAGES,
    ROUNDING,
    Heldout,
    Reconstruction,
    heldout_losses,
    heldout_masks,
    reconstruct,
    statistics_note,
)
from maekit.viz.panels import compose, draw
from maekit.weights.store import load_as, require_decoder

SCORE_BATCH = 64
"""Images in a forward pass of a score; it has no say in the numbers."""
ROWS_AT_ONCE = 4096
NAMED = 5
"""Worst reconstructed images that are named."""
QUANTILES = (5, 25, 50, 75, 95)
"""Of the skill of single images, in per cent."""


@dataclass(frozen=True)
class Drawn:
    """Images to draw [B, C, H, W], what stands beside each, their masks, and what the panel says of them."""

    images_BCHW: torch.Tensor
    labels: list[str]
    masks: list[Masks]
    note: str = ""


@dataclass(frozen=True)
class Scores:
    """What each image of a part is reconstructed like; NaN where there is no number."""

    loss_N: npt.NDArray[np.float64]
    trivial_N: npt.NDArray[np.float64]
    """The better trivial predictor's loss on that image."""
    excess_N: npt.NDArray[np.float64]
    skill_N: npt.NDArray[np.float64]
    worst_first_N: npt.NDArray[np.int64]
    """All sample ids, those of unreadable images last."""
    unreadable: dict[int, str]

    @classmethod
    def of(cls, losses_3N: npt.NDArray[np.float64], unreadable: dict[int, str]) -> Scores:
        """From the losses of the model and of both trivial predictors; those of stand-ins are not the image's own."""
        own_3N, bad_N = losses_3N.copy(), np.isin(np.arange(losses_3N.shape[1]), list(unreadable))
        own_3N[:, bad_N] = np.nan
        loss_N, trivial_N = own_3N[0], own_3N[1:].min(axis=0)
        excess_N, skill_N = loss_N - trivial_N, np.full(len(loss_N), np.nan)
        np.divide(-excess_N, trivial_N, out=skill_N, where=trivial_N > ROUNDING)
        return cls(loss_N, trivial_N, excess_N, skill_N, np.lexsort((-excess_N, bad_N)), unreadable)

    @property
    def worst(self) -> npt.NDArray[np.int64]:
        """Sample ids of the readable images, the worst first."""
        return self.worst_first_N[: len(self.loss_N) - len(self.unreadable)]


def main(source: str, config: ReconstructConfig) -> int:
    """One panel with a row for each image, image k under the k-th mask of the seed; with --data its loss and skill.

    Raises:
        UserError: weights, an image or data that cannot be read, or a mask ratio out of range.
    """
    console = make_console()
    if problems := config.problems():
        raise UserError(*problems)
    device = choose_device(config.device).value
    model = load_as(source, config, device)
    require_decoder(model, source)
    remark(console, model.key_report.remarks())
    if config.data:
        drawn = score_data(console, source, config, model)
    else:
        passport = model.passport
        remark(console, remarks_for(loose_files(config.image, model.config.in_chans), passport.mean, passport.std))
        images_BCHW = read_centres(config.image, model.config, passport.interpolation, passport.crop_pct).to(device)
        drawn = Drawn(images_BCHW, [Path(name).name for name in config.image], masks_of(config, model))
    shown: list[Reconstruction] = []
    sizes = [len(one.ids_keep_BV) for one in drawn.masks]
    for some_BCHW, hidden in zip(drawn.images_BCHW.split(sizes), drawn.masks, strict=True):
        ids = hidden.to(device)
        shown += reconstruct(model, some_BCHW, ids.ids_keep_BV, ids.ids_masked_BM, config.statistics)
    try:
        with keeping(Path(config.out), console):
            draw(
                [compose(one.image_HWC, one.ids_masked_M, one.pred_MP, model.patch_size) for one in shown],
                Path(config.out),
                title=f"{source}: {model.passport.epochs:.4g} epochs on {model.passport.data or 'no data'}",
                note="\n".join(filter(None, [drawn.note, statistics_note(model, config.statistics)])),
                row_labels=drawn.labels,
            )
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror or error})") from None
    console.print(f"panel: {config.out}")
    return 0


def masks_of(config: ReconstructConfig, model: MaskedAutoencoder) -> list[Masks]:
    """The masks of the images, in order: those of the seed together, drawn ones of an image each."""
    if config.hide:
        return read_hidden(config.hide, config.image, model.config, model.passport.crop_pct)
    ratio = model.config.mask_ratio if config.mask_ratio is None else config.mask_ratio
    kind = config.mask or model.config.mask
    return [make_masks(kind, model.grid_hw, ratio, range(len(config.image)), seed=config.seed)]


def score_data(console: Console, source: str, config: ReconstructConfig, model: MaskedAutoencoder) -> Drawn:
    """Print loss and skill on centre crops of a part, and write those of each image; return a few to draw."""
    device = model.mean.device
    use_fused_attention(model, choose_attention(device, "fp32").value)
    data = open_source(
        config.data, in_chans=model.config.in_chans, image_column=config.image_column, label_column=config.label_column
    )
    remark(console, remarks_for(data, model.passport.mean, model.passport.std))
    word = config.part or ("test" if data.test is not None else "val" if data.val is not None else "train")
    part = choose_parts(data, word, config.data)[word]
    facts = {
        "weights": source, "steps": model.passport.steps, "data": config.data, "target": model.config.target,
        "mask": model.config.mask, "mask_ratio": model.config.mask_ratio, "masks_per_image": config.masks_per_image,
    }  # fmt: skip
    schema = columns(part.labels is not None, facts)
    file = row_file(Path(config.scores), schema, console, flag="--scores") if config.scores else nullcontext()
    with file as write:
        with counting(console, "reading images") as progress:
            reading = model.passport.reading(config.data)
            pool, _ = open_pool(part, reading, device, choose_workers(None, 1), progress)
        losses_3N = np.empty((3, len(part)))
        done = 0
        with counting(console, f"scoring {word} images") as progress:
            ids = np.arange(len(part), dtype=np.int64)
            for some_3B in heldout_losses(
                model, pool, ids, SCORE_BATCH, with_trivial=True, views=config.masks_per_image
            ):
                losses_3N[:, done : done + some_3B.shape[1]] = some_3B.numpy()
                done += some_3B.shape[1]
                progress(done, len(part))
        scores = Scores.of(losses_3N, pool.unreadable)
        if write is not None:
            write_scores(write, word, part, scores)
    say_scores(console, f"{data.name}, {word} part", config, model, losses_3N.mean(axis=1), part, scores)
    if config.scores:
        console.print(f"scores: {escape(config.scores)} ({len(part):,} rows)", soft_wrap=True)
    return to_draw(config, model, pool, part, scores)


def columns(labelled: bool, facts: dict[str, Any]) -> pa.Schema:
    """The columns of a file of scores, and what it says of itself."""
    words = [("part", pa.string()), ("path", pa.string()), *[("label", pa.string())] * labelled]
    numbers = [(name, pa.float64()) for name in ("loss", "trivial", "excess", "skill")]
    return pa.schema([*words, *numbers, ("error", pa.string())], {"maekit": json.dumps(facts)})


def write_scores(write: Writer, word: str, part: Part, scores: Scores) -> None:
    """The rows of all images, the worst first."""
    names, labels = part.class_names or [], part.labels
    numbers = {"loss": scores.loss_N, "trivial": scores.trivial_N, "excess": scores.excess_N, "skill": scores.skill_N}

    def row(index: int) -> dict[str, Any]:
        label = -1 if labels is None else int(labels[index])
        own = {name: float(values[index]) if np.isfinite(values[index]) else None for name, values in numbers.items()}
        words = {"part": word, "path": part.name(index), "label": names[label] if label >= 0 else None}
        return {**words, **own, "error": scores.unreadable.get(index)}

    for start in range(0, len(part), ROWS_AT_ONCE):
        write.rows([row(index) for index in scores.worst_first_N[start : start + ROWS_AT_ONCE].tolist()])


def say_scores(
    console: Console,
    title: str,
    config: ReconstructConfig,
    model: MaskedAutoencoder,
    means_3: npt.NDArray[np.float64],
    part: Part,
    scores: Scores,
) -> None:
    """Print loss and skill over the part, the spread of the skill over its images, and the worst of these."""
    loss, constant, bilinear = means_3.tolist()
    found = Heldout(loss, (constant, bilinear))
    with_skill = scores.skill_N[np.isfinite(scores.skill_N)]
    counts = {
        "unreadable": len(scores.unreadable),
        "blank (nothing to predict, no skill)": int((scores.trivial_N <= ROUNDING).sum()),
    }
    several = f", {config.masks_per_image} of each image" if config.masks_per_image > 1 else ""
    settings = {
        "images": ", ".join(
            [f"{len(part):,}", *(f"{count:,} of them {what}" for what, count in counts.items() if count)]
        ),
        "loss": f"{found.loss:.4f} on hidden patches ({model.config.target}; {model.config.mask} masks of "
        f"{100 * model.config.mask_ratio:g} %{several})",
        "learning nothing": f"{found.trivial[0]:.4f} by a constant, {found.trivial[1]:.4f} by a bilinear fill",
    }
    if len(with_skill):
        settings["skill"] = f"{found.skill:.3f} (0: no better than the better of these, 1: perfect)"
        spread = "  ".join(f"{value:.3f}" for value in np.percentile(with_skill, QUANTILES))
        shares = f"{', '.join(map(str, QUANTILES[:-1]))} and {QUANTILES[-1]} %"
        settings["of each image"] = f"{spread} ({shares} lie below; against the better of these on that image)"
    print_settings(console, title, settings)
    shown = (scores.excess_N, scores.loss_N, scores.trivial_N, scores.skill_N)
    rows = [
        [escape(part.name(i)), *(f"{column[i]:.3f}" if np.isfinite(column[i]) else "" for column in shown)]
        for i in scores.worst[:NAMED].tolist()
    ]
    console.print(make_table("worst reconstructed", ["image", "excess", "loss", "learning nothing", "skill"], rows))


def to_draw(config: ReconstructConfig, model: MaskedAutoencoder, pool: Pool, part: Part, scores: Scores) -> Drawn:
    """A few images under their first mask: the worst ones where scores are written, else some that stay the same."""
    if config.scores:
        some = scores.worst[:PANEL_IMAGES]
        skills = [f"{skill:.2f}" if np.isfinite(skill) else "-" for skill in scores.skill_N[some]]
        labels = [
            f"{skill} {part.name(i)}" for skill, i in zip(skills, some.tolist(), strict=True)
        ]  # cut in the middle
        note = f"of {len(scores.worst):,} images those whose loss is the most above what learning nothing gives; "
        note += "beside each its skill"
    else:
        some = lowest_hash(np.sort(scores.worst), min(PANEL_IMAGES, len(scores.worst)), Purpose.SUBSET)
        labels, note = [part.name(i) for i in some.tolist()], ""
    batch = next(iter(pool.eval_batches(some, len(some))))
    return Drawn(batch.images, labels, [Masks(*heldout_masks(model, some))], note)
