"""Draw what the model makes of any image: original | masked | reconstruction | pasted.

    maekit reconstruct runs/c10 --image photo.png --out panel.png --mask-ratio 0.75 --seed 3

Cost: one forward pass for each image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from maekit.config import MAX_MASK_RATIO, ReconstructConfig, UserError
from maekit.data.images import BadImage, decode
from maekit.data.transforms import apply_to_image, centre_crops
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks
from maekit.runtime import choose_device
from maekit.terminal import make_console
from maekit.training.monitor import reconstruct, statistics_note
from maekit.viz.panels import compose, draw
from maekit.weights.store import load_as, require_decoder


def main(source: str, config: ReconstructConfig) -> int:
    """One panel with a row for each image; image k gets the k-th mask of the seed.

    Raises:
        UserError: weights or an image that cannot be read, or a mask ratio out of range.
    """
    console = make_console()
    problems = []
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
    for line in model.key_report.remarks():
        console.print(line, style="dim", markup=False)
    images_BCHW = read_images(config, model).to(device)
    ratio = model.config.mask_ratio if config.mask_ratio is None else config.mask_ratio
    kind = config.mask or model.config.mask
    masks = make_masks(kind, model.grid_hw, ratio, range(len(images_BCHW)), seed=config.seed).to(device)
    shown = reconstruct(model, images_BCHW, masks.ids_keep_BV, masks.ids_masked_BM, config.statistics)
    draw(
        [compose(one.image_HWC, one.ids_masked_M, one.pred_MP, model.patch_size) for one in shown],
        Path(config.out),
        title=f"{source}: {model.passport.epochs:.4g} epochs on {model.passport.data or 'no data'}",
        note=statistics_note(model, config.statistics),
        row_labels=[Path(name).name for name in config.image],
    )
    console.print(f"panel: {config.out}")
    return 0


def read_images(config: ReconstructConfig, model: MaskedAutoencoder) -> torch.Tensor:
    """The images' centres at the model's size, floats in 0..1 [B, C, H, W]."""
    found = []
    for name in config.image:
        try:
            image = decode(Path(name).expanduser(), model.config.in_chans)
        except BadImage as error:
            raise UserError(f"--image {name}: {error}") from None
        crops = centre_crops(np.array([image.shape[:2]], np.int64), model.config.size_hw)
        pixels = apply_to_image(image, crops, 0, model.config.size_hw)
        found.append(pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels)
    return torch.stack(found)
