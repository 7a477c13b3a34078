"""Annotations beside images, told by their names: folders, and masks that lie in one folder with their images.

Whoever reads images leaves these out (folders.py), and whoever reads pairs looks there for annotations
(pair_layouts.py), so that no command takes for an image what another takes for an annotation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from maekit.data.parts import part_of

IMAGE_FOLDERS = (
    "images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit", "imagestr", "701_stillsraw_full",
)  # fmt: skip
ANNOTATION_FOLDERS = (
    "annotations", "annotation", "masks", "mask", "labels", "label", "ann_dir", "gt", "gts", "groundtruth",
    "ground_truth", "segmentations", "segmentationclass", "segmentationobject", "segmentationclassaug", "gtfine",
    "gtcoarse", "labelstr", "labelsts", "labeledapproved_full",
)  # fmt: skip
"""Names of folders in any case; those of annotations count beside one of images only. ADE20K, Pascal VOC, Cityscapes,
CamVid, nnU-Net and MMSegmentation have theirs here."""
_NO_CLASSES = ("annotations", "masks", "segmentations", "gt", "gts", "groundtruth", "ground_truth")
"""No class is called so: beside one single other folder, whatever its name, these hold that folder's annotations."""
_OF_PART = re.compile(r"(.+?)[_-]?(?:annot|annotations?|masks?|labels?|gt|segmentations?)")
"""train_masks/ beside train/ (Carvana), trainannot/ (CamVid as SegNet has it), train_labels/."""
_MASK = re.compile(rb"(.+)[._-](?:masks?|labels?|seg|segmentation|gt|annotations?)(?:_\d+)?\.\w+", re.IGNORECASE)
"""a_mask.png beside a.jpg, or beside a_sat.jpg; a.seg.png, as WebDataset's samples have it."""
_WORD = re.compile(rb"[._-](?:mask|label|seg|gt|annot)", re.IGNORECASE)
"""What every such name holds: tells most names of millions apart in half the time."""
_IMAGE = re.compile(rb"(.+)[_-](?:sat|images?|img|rgb)", re.IGNORECASE)


class Beside(NamedTuple):
    """Which of some folders hold annotations."""

    images: str | None
    """The folder of images beside those of annotations; None where no two folders are named so."""
    annotations: list[str]


def annotations_among(folders: Iterable[str]) -> Beside:
    """The folders of annotations among those of one place, in the order of ANNOTATION_FOLDERS, then by name."""
    known = {folder.lower(): folder for folder in sorted(folders)}
    images = next((known[name] for name in IMAGE_FOLDERS if name in known), None)
    if images is None and any(name in known for name in _NO_CLASSES):
        rest = [folder for name, folder in known.items() if name not in ANNOTATION_FOLDERS]
        images = rest[0] if len(rest) == 1 else None
    found = [known[name] for name in ANNOTATION_FOLDERS if name in known] if images is not None else []
    others = [folder for folder in known.values() if annotated_part(folder, known) is not None]
    return Beside(images if found else None, found + others)


def annotated_part(folder: str, others: Iterable[str]) -> str | None:
    """The folder of a part that a folder of annotations is named after: train for train_masks; None for any other."""
    match = _OF_PART.fullmatch(folder.lower())
    return next((other for other in others if match and other.lower() == match[1] and part_of(other)), None)


def masks_beside(names: Iterable[bytes]) -> dict[bytes, bytes]:
    """The files that are masks of others in their folder, as a_mask.png of a.jpg: each with its image."""
    names = list(names)
    masks = {name: match[1] for name in names if _WORD.search(name) and (match := _MASK.fullmatch(name)) is not None}
    if not masks:
        return {}
    images = {os.path.splitext(name)[0]: name for name in names if name not in masks}
    images |= {match[1]: name for stem, name in images.items() if (match := _IMAGE.fullmatch(stem)) is not None}
    return {mask: images[stem] for mask, stem in masks.items() if stem in images}
