"""Pairs of image and annotation in the layouts that folders usually have; told by names (beside.py), not by pixels.

- images/ and masks/ in one folder, both with training/ and validation/ (or train/, val/) or without: ADE20K, and
  Pascal VOC, whose parts are lists of names.
- the same below train/ and val/: train/images/ and train/masks/.
- train/ and train_masks/: Carvana, CamVid.
- in one folder, or below train/ and val/: a.jpg and a_mask.png. Roboflow's export of masks.
- Cityscapes.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from maekit.config import UserError
from maekit.data.annotations import SUFFIXES
from maekit.data.beside import annotated_part, annotations_among, masks_beside
from maekit.data.folders import walk
from maekit.data.pair_files import Listing, list_side, match_pairs, named_alike, pair_part
from maekit.data.pair_parts import PairPart
from maekit.data.pair_patterns import by_pattern
from maekit.data.parts import is_folder, part_of, printable

_CITYSCAPES = "gtFine/{}_gtFine_labelTrainIds.png"
_LISTS = os.path.join("ImageSets", "Segmentation")
"""Where Pascal VOC names the images of its parts."""


class Sides(NamedTuple):
    """Folders relative to the data's: that of the images and that of the annotations, which may be the same."""

    images: str
    annotations: str


def find_sides(root: str, shown: str) -> dict[str, Sides]:
    """Part -> where its images and annotations lie; "" for a pair of folders that may have the parts below them.

    Empty where the names of folders and files tell of no annotations.
    """
    folders = _folders(root, "", shown)
    images, annotations = annotations_among(folders)
    if images is not None:
        return {"": Sides(images, _first_with_files(root, annotations))}
    parts = _parts(folders, "", shown)
    found: dict[str, Sides] = {}
    for part, folder in parts.items():
        inside, annotations = annotations_among(_folders(root, folder, shown))
        beside = [other for other in folders if annotated_part(other, [folder]) is not None]
        if inside is not None:
            below = _first_with_files(root, [f"{folder}/{name}" for name in annotations])
            found[part] = Sides(f"{folder}/{inside}", below)
        elif beside:
            found[part] = Sides(folder, beside[0])
        elif _masks(root, folder):
            found[part] = Sides(folder, folder)
    if not parts and _masks(root, ""):
        found["train"] = Sides("", "")
    return found


def open_layout(root: str, shown: str, sides: dict[str, Sides], in_chans: int, notes: list[str]) -> dict[str, PairPart]:
    """The training part and, where there is one with annotations, the validation part.

    Raises:
        UserError: no training part, no common names, an image without an annotation, or files of one name.
    """
    if "" in sides:
        return _kinds_above(root, shown, sides[""], in_chans, notes)
    if "train" not in sides:
        has = ", ".join(f"{printable(one.images)}/" for one in sides.values())
        raise UserError(f"--data {shown}: annotations beside the images of {has}, but none of a train part")
    return {
        part: _together(root, sides[part].images, shown, in_chans, notes)
        if sides[part].images == sides[part].annotations
        else _two_folders(root, shown, sides[part], in_chans, notes)
        for part in ("train", "val")
        if part in sides
    }


def _two_folders(root: str, shown: str, sides: Sides, in_chans: int, notes: list[str]) -> PairPart:
    images = list_side(root, sides.images, shown, annotations=False)
    annotations = list_side(root, sides.annotations, shown, annotations=True)
    return match_pairs(root, shown, *named_alike(images, annotations, notes), in_chans, notes)


def _kinds_above(root: str, shown: str, kinds: Sides, in_chans: int, notes: list[str]) -> dict[str, PairPart]:
    """Parts of a folder with one folder of images and one of annotations, which have the parts below them."""
    if kinds.images.lower() == "leftimg8bit":
        return _cityscapes(root, shown, kinds, in_chans, notes)
    if os.path.isfile(os.path.join(root, _LISTS, "train.txt")):
        return _by_lists(root, shown, kinds, in_chans)
    below = {kind: _parts(_folders(root, kind, shown), kind, shown) for kind in kinds}
    of_images, of_annotations = below[kinds.images], below[kinds.annotations]
    _note_others(root, shown, kinds.images, of_images, notes)
    wanted: list[str] = [part for part in ("train", "val") if part in of_images]
    if of_images and "train" not in wanted:
        raise UserError(f"--data {shown}: {kinds.images}/ has {_listed(of_images)} but no training/")
    if not wanted and of_annotations:
        raise UserError(
            f"--data {shown}: {kinds.annotations}/ has {_listed(of_annotations)}, but {kinds.images}/ has no parts"
        )
    found: dict[str, PairPart] = {}
    for part in wanted:
        folder = f"{kinds.images}/{of_images[part]}"
        if part not in of_annotations:
            has = _listed(of_annotations) or "no folders of parts"
            raise UserError(f"--data {shown}: no annotations for {folder}: {kinds.annotations}/ has {has}")
        sides = Sides(folder, f"{kinds.annotations}/{of_annotations[part]}")
        found[part] = _two_folders(root, shown, sides, in_chans, notes)
    return found or {"train": _two_folders(root, shown, kinds, in_chans, notes)}


def _cityscapes(root: str, shown: str, kinds: Sides, in_chans: int, notes: list[str]) -> dict[str, PairPart]:
    """Cityscapes, by the 19 numbers that are trained on: its labelIds hold others, which no score counts."""
    if not any(path.endswith(b"_labelTrainIds.png") for path, _ in walk(os.fsencode(os.path.join(root, "gtFine")))):
        raise UserError(
            f"--data {shown}: {kinds.annotations}/ has no *_gtFine_labelTrainIds.png, the 19 classes of Cityscapes "
            "with 255 for void: csCreateTrainIdLabelImgs of the package cityscapesscripts writes them; for all 34 "
            "labels, of which 15 count in nobody's score, give --image-pattern leftImg8bit/{}_leftImg8bit.png "
            "--annotation-pattern gtFine/{}_gtFine_labelIds.png"
        )
    notes.append(f"annotations: {_CITYSCAPES.format('*')}")
    return by_pattern(root, shown, (kinds.images + "/{}_leftImg8bit.png", _CITYSCAPES), in_chans, notes)


def _by_lists(root: str, shown: str, kinds: Sides, in_chans: int) -> dict[str, PairPart]:
    """Parts by lists of names: not every image has an annotation, nor is every annotation of the training part."""
    images = list_side(root, kinds.images, shown, annotations=False)
    annotations = list_side(root, kinds.annotations, shown, annotations=True)
    found: dict[str, PairPart] = {}
    for part in ("train", "val"):
        file = os.path.join(root, _LISTS, f"{part}.txt")
        if not os.path.isfile(file):
            continue
        with open(file, "rb") as lines:
            names = [line.split()[0] for line in lines if line.strip()]
        for name in names:
            for side in (images, annotations):
                if name not in side.files:
                    which = f"{os.path.join(_LISTS, part)}.txt names {printable(name)}"
                    raise UserError(f"--data {shown}: {which}, and {side.where}/ has no such file")
        if names:
            found[part] = pair_part(
                root, ((images.files[name], annotations.files[name]) for name in {*names}), in_chans
            )
    if "train" not in found:
        raise UserError(f"--data {shown}: {_LISTS}/train.txt names no images")
    return found


def _together(root: str, folder: str, shown: str, in_chans: int, notes: list[str]) -> PairPart:
    """Pairs of files in the same folders: a.jpg and a_mask.png."""
    masks = _masks(root, folder)
    where = folder or "the folder"
    prefix = os.fsencode(folder) + b"/" if folder else b""
    images, annotations = Listing(where, {}), Listing(where, {})
    for path, is_image in walk(os.fsencode(os.path.join(root, folder))):
        if is_image and path not in masks:
            images.add(path, prefix + path, shown)
    for mask in sorted(masks, reverse=True):  # of a_mask and a_mask_1 the first one counts
        annotations.files[masks[mask]] = prefix + mask
    if len(masks) > len(annotations.files):
        more = sorted(prefix + mask for mask in masks if prefix + mask not in annotations.files.values())
        notes.append(f"{len(more):,} masks beside the first of an image are left out, such as {printable(more[0])}")
    return match_pairs(root, shown, images, annotations, in_chans, notes)


def _masks(root: str, folder: str) -> dict[bytes, bytes]:
    """The masks that lie beside their images below a folder, each with its image."""
    files = (path for path, is_image in walk(os.fsencode(os.path.join(root, folder))) if is_image)
    return masks_beside(files)


# ---- names of folders ----


def _first_with_files(root: str, folders: list[str]) -> str:
    """The first folder with a file that an annotation can be, else the first: others may hold XML or text."""
    for folder in folders:
        files = walk(os.fsencode(os.path.join(root, folder)))
        if any(os.path.splitext(os.fsdecode(path))[1].lower() in SUFFIXES for path, _ in files):
            return folder
    return folders[0]


def _folders(root: str, below: str, shown: str) -> list[str]:
    try:
        with os.scandir(os.path.join(root, below)) as entries:
            return sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"--data {shown}: cannot read the folder {below or '.'} ({error.strerror})") from None


def _parts(folders: list[str], below: str, shown: str) -> dict[str, str]:
    """Part -> its folder; raises UserError where a part has two."""
    found: dict[str, str] = {}
    for folder in folders:
        part = part_of(folder)
        if part in found:
            where = f"{below}/ has " if below else ""
            raise UserError(f"--data {shown}: {where}{found[part]}/ and {folder}/, both the {part} part")
        if part is not None:
            found[part] = folder
    return found


def _note_others(root: str, shown: str, kind: str, parts: dict[str, str], notes: list[str]) -> None:
    others = [printable(folder) for folder in _folders(root, kind, shown) if folder not in parts.values()]
    if others:
        what = "left out, since no part is called so" if parts else "no part is called so, so all is trained on"
        notes.append(f"{kind}/ has {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}: {what}")


def _listed(folders: dict[str, str]) -> str:
    return ", ".join(f"{printable(folder)}/" for folder in sorted(folders.values()))
