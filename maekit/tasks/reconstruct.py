"""Draw what the model makes of any image: original | masked | reconstruction | pasted; or score a part of data.

    maekit reconstruct runs/c10 --image photo.png --out panel.png --mask-ratio 0.75 --seed 3
    maekit reconstruct runs/c10 --image photo.png --hide region.png
    maekit reconstruct runs/c10 --data cifar10

Cost: one forward pass for each image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from maekit.config import MAX_MASK_RATIO, ReconstructConfig, UserError
from maekit.data.centres import read_centres, read_hidden
from maekit.data.levels import remarks_for
from maekit.data.loader import lowest_hash, open_pool
from maekit.data.parts import loose_files
from maekit.data.sources import choose_parts, open_source
from maekit.data.workers import choose_workers
from maekit.keeping import keeping
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks, make_masks
from maekit.rng import Purpose
from maekit.runtime import choose_attention, choose_device
from maekit.terminal import counting, make_console, print_settings, remark
from maekit.training.monitor import (
    PANEL_IMAGES,
    Heldout,
    Reconstruction,
    heldout_masks,
    heldout_sums,
    reconstruct,
    statistics_note,
)
from maekit.viz.panels import compose, draw
from maekit.weights.store import load_as, require_decoder

SCORE_BATCH = 64
"""Images in a forward pass of a score; it has no say in the numbers."""


def main(source: str, config: ReconstructConfig) -> int:
    """One panel with a row for each image, image k under the k-th mask of the seed; with --data its loss and skill.

    Raises:
        UserError: weights, an image or data that cannot be read, or a mask ratio out of range.
    """
    console = make_console()
    problems = []
    if bool(config.image) == bool(config.data):
        problems.append("give either --image FILE ..., to draw, or --data D, to score and draw a few")
    drawn = (config.mask, config.mask_ratio, config.seed) != (None, None, 0)
    if config.data and (drawn or config.hide):
        problems.append("--mask, --mask-ratio, --seed, --hide: with --data the masks are those of every score")
    elif drawn and config.hide:
        problems.append("--hide says which patches are hidden: leave out --mask, --mask-ratio and --seed")
    if config.mask_ratio is not None and not 0 <= config.mask_ratio <= MAX_MASK_RATIO:
        problems.append(f"--mask-ratio {config.mask_ratio:g}: must lie between 0 and {MAX_MASK_RATIO}")
    if config.seed < 0:
        problems.append(f"--seed {config.seed}: must not be negative")
    if Path(config.out).suffix.lower() != ".png":
        problems.append(f"--out {config.out}: panels are PNG files; name one that ends in .png")
    if problems:
        raise UserError(*problems)
    device = choose_device(config.device).value
    model = load_as(source, config, device)
    require_decoder(model, source)
    remark(console, model.key_report.remarks())
    if config.data:
        images_BCHW, names, masks = score_data(console, config, model)
    else:
        passport = model.passport
        remark(console, remarks_for(loose_files(config.image, model.config.in_chans), passport.mean, passport.std))
        images_BCHW = read_centres(config.image, model.config, passport.interpolation, passport.crop_pct).to(device)
        names = [Path(name).name for name in config.image]
        masks = masks_of(config, model)
    shown: list[Reconstruction] = []
    for some_BCHW, hidden in zip(images_BCHW.split([len(one.ids_keep_BV) for one in masks]), masks, strict=True):
        ids = hidden.to(device)
        shown += reconstruct(model, some_BCHW, ids.ids_keep_BV, ids.ids_masked_BM, config.statistics)
    try:
        with keeping(Path(config.out), console):
            draw(
                [compose(one.image_HWC, one.ids_masked_M, one.pred_MP, model.patch_size) for one in shown],
                Path(config.out),
                title=f"{source}: {model.passport.epochs:.4g} epochs on {model.passport.data or 'no data'}",
                note=statistics_note(model, config.statistics),
                row_labels=names,
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


def score_data(
    console: Console, config: ReconstructConfig, model: MaskedAutoencoder
) -> tuple[torch.Tensor, list[str], list[Masks]]:
    """Print loss and skill on centre crops of a part; return a few images, their names and their masks, to draw."""
    device = model.mean.device
    use_fused_attention(model, choose_attention(device, "fp32").value)
    source = open_source(config.data, in_chans=model.config.in_chans, image_column=config.image_column)
    remark(console, remarks_for(source, model.passport.mean, model.passport.std))
    word = config.part or ("test" if source.test is not None else "val" if source.val is not None else "train")
    part = choose_parts(source, word, config.data)[word]
    reading = model.passport.reading(config.data)
    ids = np.arange(len(part), dtype=np.int64)
    with counting(console, "reading images") as progress:
        pool, _ = open_pool(part, reading, device, choose_workers(None, 1), progress)
    with counting(console, f"scoring {word} images") as progress:
        loss, constant, bilinear, count = heldout_sums(
            model, pool, ids, SCORE_BATCH, with_trivial=True, on_progress=progress
        ).tolist()
    found = Heldout(loss / count, (constant / count, bilinear / count))
    print_settings(console, f"{source.name}, {word} part", {
        "images": f"{len(ids):,}" + (f", {len(pool.unreadable):,} of them unreadable" if pool.unreadable else ""),
        "loss": f"{found.loss:.4f} on hidden patches ({model.config.target}; {model.config.mask} masks of "
        f"{100 * model.config.mask_ratio:g} %)",
        "learning nothing": f"{found.trivial[0]:.4f} by a constant, {found.trivial[1]:.4f} by a bilinear fill",
        "skill": f"{found.skill:.3f} (0: no better than the better of these, 1: perfect)",
    })  # fmt: skip
    some = lowest_hash(ids, min(PANEL_IMAGES, len(ids)), Purpose.SUBSET)
    batch = next(iter(pool.eval_batches(some, len(some))))
    return batch.images, [part.name(int(i)) for i in some], [Masks(*heldout_masks(model, some))]
