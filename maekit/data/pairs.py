"""Every form of data for segmentation: images with annotations in ADE20K's layout, in Parquet, or paired by pattern.

- A folder with images/ and annotations/ (or masks/, or labels/), whose names differ in the suffix only; both may hold
  training/ and validation/ (or train/, val/), with any folders below.
- Parquet in the hub's image schema with two columns of images; parts by file name.
- Two patterns with one {} each, which stands for the name that both share, slashes included:
  "leftImg8bit/{}_leftImg8bit.png" and "gtFine/{}_gtFine_labelIds.png". Parts by the name's first folder (train, val).

Numbers on disk and class ids in memory (annotations.py): with `void` 0, the value 1 is class 0 and the first line of
the class file; with another void, such as 255, or none, the value 0 is class 0 and the first line. Annotations that are
black and white have two classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from maekit.config import UserError
from maekit.config.segmentation import PairsConfig
from maekit.data.annotations import SUFFIXES, VOID, Numbering
from maekit.data.folders import annotation_folder, walk
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.pair_classes import Asked, name_classes
from maekit.data.pair_parts import PairPart, PartCheck, Progress, check_parts, complain, count_values
from maekit.data.pair_tables import PATTERNS_HELP, open_tables
from maekit.data.parts import PART_WORDS, FilePart, is_folder, printable
from maekit.data.pixels import BadImage
from maekit.data.sources import short_name

__all__ = [
    "VOID",
    "BadImage",
    "Numbering",
    "PairPart",
    "Pairs",
    "PartCheck",
    "check_pairs",
    "open_checked",
    "open_pairs",
    "refuse_one_class",
]

_IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
_ANNOTATION_SUFFIXES = frozenset(suffix.encode() for suffix in SUFFIXES)


@dataclass
class Pairs:
    """What `--data` stands for. `name` is short and fit for folder names."""

    name: str
    train: PairPart
    val: PairPart | None
    class_names: list[str]
    """K names; a class's id in memory is its place here."""
    numbering: Numbering
    """How the values on disk stand for the classes, and which is void."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: where the names come from, annotations that belong to no image."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def parts(self) -> dict[str, PairPart]:
        """'train', and 'val' where there is one."""
        return {"train": self.train, **({} if self.val is None else {"val": self.val})}


def open_pairs(
    spec: str,
    *,
    in_chans: int = 3,
    classes: str | None = None,
    void: int | None = 0,
    void_is_asked: bool = False,
    class_values: tuple[int, ...] | None = None,
    image_pattern: str | None = None,
    annotation_pattern: str | None = None,
    image_column: str | None = None,
    annotation_column: str | None = None,
    workers: int = 0,
    on_progress: Progress = lambda _done, _total: None,
) -> Pairs:
    """Images and annotations, listed; no image is decoded, and annotations only where classes must be counted.

    The class names come from the text file `classes`, or classes.txt in the folder; where there is none, all
    annotations are read (by `workers` processes) and the classes are called 'class 1', 'class 2', ...
    class_values: the values on disk of the classes, in their order; all others but void are mistakes. Without them,
    annotations that are black and white (0 and 1, 255 or 65535) have two classes, unless one is void by `void`: 0 is
    so where it `void_is_asked`, not by default.

    Raises:
        UserError: nothing of that name, no pairs in it, an image without an annotation, a bad class file or void, or
            one class only.
    """
    shown = printable(spec)
    root = os.path.expanduser(spec)
    if not spec or not os.path.exists(root):
        raise UserError(f"--data {shown}: no such file or folder")
    notes: list[str] = []
    patterns = (image_pattern, annotation_pattern)
    columns = (image_column, annotation_column)
    if any(pattern is not None for pattern in patterns):
        found = _by_pattern(root, shown, patterns, in_chans, notes)
        _refuse_columns(columns, shown)
    elif (annotated := annotation_folder(root)) is not None:
        found = _in_layout(root, shown, annotated, in_chans, notes)
        _refuse_columns(columns, shown)
    else:
        found = open_tables(root, shown, columns, in_chans)
    if class_values is not None and not void_is_asked:
        void = None
    asked = Asked(void, void_is_asked or void != 0 or class_values is not None, class_values)
    count = partial(count_values, list(found.values()), workers, on_progress)
    names, numbering = name_classes(root, shown, classes, asked, count, notes)
    for part in found.values():
        part.numbering = numbering
    return Pairs(short_name(root), found["train"], found.get("val"), names, numbering, notes)


def open_checked(
    data: str, config: PairsConfig, *, in_chans: int, workers: int, on_progress: Progress = lambda _done, _total: None
) -> tuple[Pairs, dict[str, PartCheck]]:
    """The pairs of `data` as the flags for pairs say, and what `check_pairs` finds in each part; errors as of both."""
    pairs = open_pairs(
        data, in_chans=in_chans, classes=config.classes, void=config.void_value, void_is_asked=config.void is not None,
        class_values=config.class_values, image_pattern=config.image_pattern,
        annotation_pattern=config.annotation_pattern, image_column=config.image_column,
        annotation_column=config.annotation_column, workers=workers, on_progress=on_progress,
    )  # fmt: skip
    return pairs, check_pairs(pairs, workers=workers, on_progress=on_progress)


def check_pairs(
    pairs: Pairs, *, workers: int = 0, on_progress: Progress = lambda _done, _total: None
) -> dict[str, PartCheck]:
    """Read every annotation and every image's header before training; pixels of each class for 'train' and 'val'.

    Images whose header cannot be read are no error here: `bad_images` names them.

    Raises:
        UserError: annotations that cannot be read, are coded by colours, differ in size from their image, or hold a
            value that stands for no class, each with its file, and values with their pixels.
    """
    found = check_parts(pairs.parts, workers, on_progress)
    complain(found, pairs.name)
    return found


def refuse_one_class(pairs: Pairs, check: PartCheck, data: str) -> None:
    """Refuse training images that show one class only: whatever says so everywhere would be right.

    Raises:
        UserError: the class, with the value that stands for it.
    """
    there = [class_id for class_id, pixels in enumerate(check.class_pixels.tolist()) if pixels]
    if len(there) > 1:
        return
    name, value = pairs.class_names[there[0]], pairs.numbering.value(there[0])
    raise UserError(
        f"--data {data}: every training pixel that has a class is of {name!r} (value {value}), so there is nothing to "
        f"tell apart; {pairs.numbering.rule()}: another --void, or --class-values with the value of each class, reads "
        "other values as classes"
    )


# ---- files ----


@dataclass
class _Listing:
    """Files by the name that image and annotation share; `where` speaks of them in messages."""

    where: str
    files: dict[bytes, bytes]

    def example(self) -> str:
        return printable(min(self.files.values(), default=b"no file"))


def _in_layout(root: str, shown: str, annotated: str, in_chans: int, notes: list[str]) -> dict[str, PairPart]:
    """Parts of a folder with images/ and a folder of annotations."""
    folders = {kind: _part_folders(root, shown, kind, notes) for kind in ("images", annotated)}
    wanted: list[str] = [part for part in ("train", "val") if part in folders["images"]]
    if folders["images"] and "train" not in wanted:
        raise UserError(f"--data {shown}: images/ has {_listed(folders['images'])} but no training/")
    parts: dict[str, PairPart] = {}
    for part in wanted or [""]:
        image_folder = f"images/{folders['images'].get(part, '')}".rstrip("/")
        if part and part not in folders[annotated]:
            has = _listed(folders[annotated]) or "no folders of parts"
            raise UserError(f"--data {shown}: no annotations for {image_folder}: {annotated}/ has {has}")
        beside = f"{annotated}/{folders[annotated].get(part, '')}".rstrip("/")
        if not part and folders[annotated]:
            has = _listed(folders[annotated])
            raise UserError(f"--data {shown}: {annotated}/ has {has} but images/ has no folders of parts")
        images = _list_folder(root, image_folder, shown, _IMAGE_SUFFIXES, "image")
        annotations = _list_folder(root, beside, shown, _ANNOTATION_SUFFIXES, "annotation")
        parts[part or "train"] = _matched(root, shown, images, annotations, in_chans, notes)
    return parts


def _listed(folders: dict[str, str]) -> str:
    return ", ".join(f"{printable(folder)}/" for folder in sorted(folders.values()))


def _part_folders(root: str, shown: str, kind: str, notes: list[str]) -> dict[str, str]:
    """Part -> its folder below images/ or that of the annotations; empty where none is named like a part."""
    found: dict[str, str] = {}
    others: list[str] = []
    try:
        entries = sorted(os.scandir(os.path.join(root, kind)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--data {shown}: cannot read the folder {kind} ({error.strerror})") from None
    for entry in entries:
        if not is_folder(entry) or entry.name.startswith("."):
            continue
        part = PART_WORDS.get(entry.name.lower())
        if part is None:
            others.append(printable(entry.name))
            continue
        if part in found:
            raise UserError(f"--data {shown}: {kind}/ has {found[part]}/ and {entry.name}/, both the {part} part")
        found[part] = entry.name
    if others and kind == "images":
        what = "left out, since no part is called so" if found else "no part is called so, so all is trained on"
        notes.append(f"{kind}/ has {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}: {what}")
    return found


def _list_folder(root: str, folder: str, shown: str, suffixes: frozenset[bytes], what: str) -> _Listing:
    files: dict[bytes, bytes] = {}
    seen = 0
    for path, _ in walk(os.fsencode(os.path.join(root, folder))):
        seen += 1
        stem, dot, suffix = path.rpartition(b".")
        if dot and dot + suffix.lower() in suffixes:
            _keep(files, stem, os.fsencode(folder) + b"/" + path, shown)
    if not files:
        read = " ".join(sorted(suffix.decode() for suffix in suffixes))
        raise UserError(f"--data {shown}: no {what} among {seen} files in {folder}; these suffixes are read: {read}")
    return _Listing(folder, files)


def _keep(files: dict[bytes, bytes], name: bytes, path: bytes, shown: str) -> None:
    if name in files:
        raise UserError(f"--data {shown}: {printable(files[name])} and {printable(path)} have one name; keep one there")
    files[name] = path


def _matched(
    root: str, shown: str, images: _Listing, annotations: _Listing, in_chans: int, notes: list[str]
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
    pairs = sorted((path, annotations.files[name]) for name, path in images.files.items())
    folder = os.fsencode(root)
    return PairPart(
        FilePart(folder, [image for image, _ in pairs], in_chans), FilePart(folder, [other for _, other in pairs], 1)
    )


def _by_pattern(
    root: str, shown: str, patterns: tuple[str | None, str | None], in_chans: int, notes: list[str]
) -> dict[str, PairPart]:
    """Parts of a folder by two patterns of paths relative to it."""
    image_pattern, annotation_pattern = patterns
    if image_pattern is None or annotation_pattern is None:
        raise UserError(f"--image-pattern and --annotation-pattern: only one of them is given; {PATTERNS_HELP}")
    if not os.path.isdir(root):
        raise UserError(f"--data {shown}: patterns are relative to a folder, and this is none")
    found = {
        "--image-pattern": _list_pattern(root, "--image-pattern", image_pattern, shown),
        "--annotation-pattern": _list_pattern(root, "--annotation-pattern", annotation_pattern, shown),
    }
    images, annotations = found.values()
    # One pattern may match the other's files too, as {}.png does {}_mask.png's: they are the more exact one's.
    general, exact = (images, annotations) if len(image_pattern) <= len(annotation_pattern) else (annotations, images)
    taken = set(exact.files.values())
    general.files = {name: path for name, path in general.files.items() if path not in taken}
    for flag, listing in found.items():
        if not listing.files:
            raise UserError(f"{flag} {printable(listing.where)}: no file below {shown} matches it")
    if _has_parts(images, shown):
        sides = {part: (_of_part(images, part), _of_part(annotations, part)) for part in ("train", "val")}
        return {
            part: _matched(root, shown, some, others, in_chans, notes)
            for part, (some, others) in sides.items()
            if some.files
        }
    return {"train": _matched(root, shown, images, annotations, in_chans, notes)}


def _list_pattern(root: str, flag: str, pattern: str, shown: str) -> _Listing:
    """The files that a pattern matches: {} is the name, * any characters but a slash."""
    if pattern.count("{}") != 1:
        raise UserError(f"{flag} {printable(pattern)}: needs one {{}}, which stands for the name that both files share")
    raw = os.fsencode(os.path.normpath(pattern))
    folder = re.split(rb"[*{]", raw)[0].rpartition(b"/")[0]
    pieces = {b"{}": b"(.+)", b"*": b"[^/]*"}
    expression = b"".join(pieces.get(piece, re.escape(piece)) for piece in re.split(rb"(\{\}|\*)", raw))
    matcher = re.compile(expression, re.DOTALL)
    files: dict[bytes, bytes] = {}
    start = os.path.join(os.fsencode(root), folder)
    if not os.path.isdir(start):
        raise UserError(f"{flag} {printable(pattern)}: no folder {printable(folder)} in {shown}")
    for below, _ in walk(start):
        path = folder + b"/" + below if folder else below
        match = matcher.fullmatch(path)
        if match is not None:
            _keep(files, match[1], path, shown)
    return _Listing(pattern, files)


def _has_parts(listing: _Listing, shown: str) -> bool:
    """Whether names begin with the folders of parts.

    Raises:
        UserError: some begin with a part's folder, and others do not, so that what is to be trained on is not clear.
    """
    by_part: dict[str | None, bytes] = {_part_of(name): path for name, path in listing.files.items()}
    if "train" not in by_part:
        return False
    if None in by_part:
        raise UserError(
            f"--data {shown}: {printable(listing.where)} finds {printable(by_part['train'])} of the training part, but "
            f"{printable(by_part[None])} of no part (train, val, test): move it away, or write a narrower pattern"
        )
    return True


def _part_of(name: bytes) -> str | None:
    """The part whose folder a name begins with."""
    folder, slash, _ = name.partition(b"/")
    return PART_WORDS.get(os.fsdecode(folder).lower()) if slash else None


def _of_part(listing: _Listing, part: str) -> _Listing:
    some = {name: path for name, path in listing.files.items() if _part_of(name) == part}
    return _Listing(f"{printable(listing.where)} ({part})", some)


def _refuse_columns(columns: Iterable[str | None], shown: str) -> None:
    flags = ("--image-column", "--annotation-column")
    given = [flag for flag, value in zip(flags, columns, strict=True) if value is not None]
    if given:
        raise UserError(f"{' and '.join(given)}: only for Parquet, which --data {shown} is not")
