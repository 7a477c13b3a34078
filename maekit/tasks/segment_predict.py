"""Predict the class of each pixel of images of any size, with the weights of a segmentation run.

    maekit segment RUN --predict photos/ --out masks/

For each image NAME.png, whose pixels are class numbers (1 is the first class, as in ADE20K; 0 is never predicted) under
a palette, and NAME-overlay.png for the eye. A run whose classes have values of their own, as masks of 0 and 255, gives
masks of these. Cost: one forward pass for each image and view.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import torch
from rich.markup import escape

from maekit.config import UserError
from maekit.config.segmentation import SegmentConfig, SegmentPredictConfig
from maekit.configfile import read
from maekit.data.annotations import listed
from maekit.data.folders import annotations_note, list_images
from maekit.data.images import BadImage, decode
from maekit.data.levels import remarks_for
from maekit.data.parts import loose_files, printable
from maekit.models.encoder import use_fused_attention
from maekit.terminal import make_console, make_progress, print_settings, remark
from maekit.training.segmentation_inference import describe_view, predict_classes
from maekit.training.segmentation_prepare import machine_for_pairs, view_of
from maekit.training.supervised import BEST_FILE
from maekit.viz.overlays import OverlayRow, draw_overlays, save_index_png, save_mask_png
from maekit.weights.segmenters import load_segmenter
from maekit.weights.store import WEIGHTS_FILE


def main(source: str, config: SegmentPredictConfig) -> int:
    """Write class maps and overlays of every image that can be read.

    Returns: 0, or 1 where some image could not be read.

    Raises:
        UserError: flags, a run or images that cannot be used; none of the images can be read.
    """
    console = make_console()
    if problems := config.problems():
        raise UserError(*problems)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an empty folder; name another one")
    images, notes = find_images(config.predict)
    choices = machine_for_pairs(config)
    file = Path(source)
    if not file.is_file():
        file /= BEST_FILE if config.score == "best" else WEIGHTS_FILE
    model, passport = load_segmenter(file, choices["device"].value)
    use_fused_attention(model, choices["attention"].value)
    given = loose_files(images.values(), passport.model.in_chans)
    remark(console, [*notes, *remarks_for(given, passport.mean, passport.std)])
    run = run_of(file, is_run=not Path(source).is_file())
    view = view_of(config, passport.model.size_hw, run)
    own = run.class_values if run is not None and len(run.class_values or ()) == len(passport.classes) else None
    device = model.mean.device
    names = list(passport.classes)
    unreadable = 0
    with make_progress(console) as progress:
        bar = progress.add_task("images", total=len(images))
        for name, path in images.items():
            try:
                image_HWC = decode(path, passport.model.in_chans)
            except BadImage as error:
                console.print(f"[yellow]unreadable:[/yellow] {escape(printable(str(path)))}: {escape(str(error))}")
                unreadable += 1
                continue
            image = torch.from_numpy(image_HWC).to(device).permute(2, 0, 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=choices["precision"].value == "bf16"):
                predicted_HW = predict_classes(model, image, view).cpu().numpy()
            target = out / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            if own is not None:
                save_mask_png(predicted_HW, target, own)
            else:
                save_index_png(predicted_HW, target, num_classes=len(names))
            if config.overlays:
                row = OverlayRow(image_HWC, None, predicted_HW, "")
                draw_overlays([row], out / f"{name}-overlay.png", names, printable(Path(path).name))
            progress.advance(bar)
    if unreadable == len(images):
        raise UserError(f"--predict {' '.join(config.predict)}: none of {len(images)} images can be read")
    print_settings(console, "done", {
        "seen": describe_view(view),
        "class maps": f"{len(images) - unreadable} in {out}: pixel values are "
        + (f"1 to {len(names)}" if own is None else f"{listed(own)}, as in the run's annotations"),
        "classes": ", ".join(f"{value} {name}" for value, name in zip(own or count(1), names, strict=False)),
        **({"unreadable": str(unreadable)} if unreadable else {}),
    })  # fmt: skip
    return 1 if unreadable else 0


def run_of(file: Path, is_run: bool) -> SegmentConfig | None:
    """The settings of the run in whose folder a file of weights lies; None where it lies anywhere else."""
    settings = file.parent / "config.json"
    if is_run:
        return read(SegmentConfig, settings) if settings.is_file() else None
    try:
        found = read(SegmentConfig, settings)
    except UserError:  # another task's, or none
        return None
    return found if found.task == "segment" else None


def find_images(places: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Image files by the name under which their class map is written: relative to the folder given, without suffix.

    Also notes of what is left out of the folders: annotations.

    Raises:
        UserError: no such file, no images in a folder, or two images of one name.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    for place in places:
        path = os.path.expanduser(place)
        if os.path.isdir(path):
            names, _, left = list_images(os.fsencode(path))
            below = list(map(os.fsdecode, names))
            notes += annotations_note(left)
            if not below:
                raise UserError(f"--predict {printable(place)}: no images in this folder")
            files = {os.path.splitext(name)[0]: os.path.join(path, name) for name in below}
            if len(files) < len(below):
                raise UserError(f"--predict {printable(place)}: two images differ in their suffix only; move one away")
        elif os.path.isfile(path):
            files = {os.path.splitext(os.path.basename(path))[0]: path}
        else:
            raise UserError(f"--predict {printable(place)}: no such file or folder")
        for name, file in files.items():
            if name in found:
                both = f"{printable(found[name])} and {printable(file)}"
                raise UserError(f"--predict: {both} have one name; predict them into two folders")
            found[name] = file
    return found, notes
