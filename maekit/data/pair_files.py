"""Files of images and files of annotations: listing them by name, and finding which belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from maekit.config import UserError
from maekit.data.annotations import SUFFIXES
from maekit.data.folders import walk
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.pair_parts import PairPart
from maekit.data.parts import FilePart, printable

PATTERNS_HELP = (
    'give --image-pattern "...{}..." and --annotation-pattern "...{}...", where {} is the name that both share (and '
    "{part} a folder train, val or test), or --data FILE.csv with the columns image, mask and split"
)
"""What to do where images and annotations lie in another way."""
LOSSY_HELP = (
    "these formats do not keep numbers as they are; write PNG instead, where masks have two values by "
    "Image.fromarray(numpy.where(numpy.asarray(Image.open(file).convert('L')) > 127, 255, 0).astype('uint8'))"
    ".save(new_file)"
)
_IMAGES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
_ANNOTATIONS = frozenset(suffix.encode() for suffix in SUFFIXES)
_PLAIN = re.compile(rb"[^A-Za-z0-9]")


@dataclass
class Listing:
    """Files by the name that image and annotation share; `where` speaks of them in messages."""

    where: str
    files: dict[bytes, bytes]

    def example(self) -> str:
        """A file's path."""
        return printable(min(self.files.values(), default=b"no file"))

    def add(self, name: bytes, path: bytes, shown: str) -> None:
        """One more file; raises UserError where another has its name."""
        if name in self.files:
            both = f"{printable(self.files[name])} and {printable(path)}"
            raise UserError(f"--data {shown}: {both} have one name; keep one there")
        self.files[name] = path


def list_side(root: str, folder: str, shown: str, *, annotations: bool) -> Listing:
    """The images or the annotations in a folder below `root`, by their paths there without suffix.

    Raises:
        UserError: none, or two of one name.
    """
    suffixes, what = (_ANNOTATIONS, "annotation") if annotations else (_IMAGES, "image")
    found = Listing(folder, {})
    seen, lossy = 0, 0
    for path, is_image in walk(os.fsencode(os.path.join(root, folder))):
        seen += 1
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in suffixes:
            found.add(stem, os.fsencode(folder) + b"/" + path, shown)
        lossy += is_image
    if not found.files:
        read = " ".join(sorted(suffix.decode() for suffix in suffixes))
        more = f"; {LOSSY_HELP}" if lossy else ""
        raise UserError(
            f"--data {shown}: no {what} among {seen} files in {folder}; these suffixes are read: {read}{more}"
        )
    return found


def match_pairs(
    root: str, shown: str, images: Listing, annotations: Listing, in_chans: int, notes: list[str]
) -> PairPart:
    """The pairs by their common name, in the byte order of the images' paths.

    Raises:
        UserError: nothing in common, or an image without an annotation.
    """
    missing = sorted(path for name, path in images.files.items() if name not in annotations.files)
    if len(missing) == len(images.files):
        raise UserError(
            f"--data {shown}: no common names: {images.where} has {images.example()}, {annotations.where} has "
            f"{annotations.example()}; if names differ by more than the suffix, {PATTERNS_HELP}"
        )
    if missing:
        such = ", ".join(printable(path) for path in missing[:4])
        raise UserError(
            f"--data {shown}: {len(missing):,} of {len(images.files):,} images have no annotation in "
            f"{annotations.where}, such as {such}; add the annotations, or move these images away"
        )
    extra = sorted(path for name, path in annotations.files.items() if name not in images.files)
    if extra:
        notes.append(f"{len(extra):,} annotations have no image and are left out, such as {printable(extra[0])}")
    pairs = ((path, annotations.files[name]) for name, path in images.files.items())
    return pair_part(root, pairs, in_chans)


def pair_part(root: str | bytes, pairs: Iterable[tuple[bytes, bytes]], in_chans: int) -> PairPart:
    """A part of these paths of images and annotations below `root`."""
    images, annotations = zip(*sorted(pairs), strict=True)
    folder = os.fsencode(root)
    return PairPart(FilePart(folder, images, in_chans), FilePart(folder, annotations, 1))


def named_alike(images: Listing, annotations: Listing, notes: list[str]) -> tuple[Listing, Listing]:
    """Both by the names that they have in common: as they are, or else without their common beginning and end.

    Where no name is in both, but those of all images begin in the same way and end in the same way, and so do those
    of the annotations (images/a, masks/a_mask), what lies between is the name if it is the same for most images. A
    note says so.
    """
    if images.files.keys() & annotations.files.keys():
        return images, annotations
    (named, shape), (numbered, other) = _cut(images), _cut(annotations)
    common = named.files.keys() & numbered.files.keys()
    if 2 * len(common) <= len(images.files):
        return images, annotations
    pair = (printable(one.files[min(common)]) for one in (numbered, named))
    notes.append(f"paired by what {{}} stands for in {shape} and {other}, such as {' with '.join(pair)}")
    return named, numbered


def _cut(listing: Listing) -> tuple[Listing, str]:
    """Files by the names without what begins and ends all of them alike, and this with {} for the name.

    Letters and digits at the border belong to the name, since numbers often begin or end alike; but all that the names
    have behind their last border is an end (of a_mask: _mask).
    """
    names = list(listing.files)
    begin = _common(names)
    begin = begin[: max((match.end() for match in _PLAIN.finditer(begin)), default=0)]
    end = _common([name[::-1] for name in names])[::-1]
    border = _PLAIN.search(end)
    end = end[border.start() :] if border else b""
    if any(len(name) <= len(begin) + len(end) for name in names):
        begin = end = b""
    cut = {name[len(begin) : len(name) - len(end)]: path for name, path in listing.files.items()}
    return Listing(listing.where, cut), f"{listing.where}/{printable(begin)}{{}}{printable(end)}"


def _common(names: list[bytes]) -> bytes:
    """What all names begin with."""
    first, last = min(names), max(names)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[:same]
