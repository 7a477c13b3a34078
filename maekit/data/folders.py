"""Folders of images as parts of a data set: the rules by which a tree of files is sorted into parts and classes.

They hold for every tree, one on disk or in archives (archive_trees.py). Paths are bytes throughout: names that are not
UTF-8, or hold newlines, are listed, sorted and opened like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from maekit.config import UserError
from maekit.data.beside import annotations_among, masks_beside
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.parts import SPLITS, FilePart, Labels, Part, Source, class_order, is_folder, part_of, printable

_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
METADATA = b"metadata.csv"
"""Where the hub's folders of images keep labels and captions."""
_SKIPPED = (b"lost+found",)  # on every ext4 disk, readable by root only


class Tree(Protocol):
    """A tree of files. Paths are relative to its top; those of folders end with a slash, and b"" is the top itself."""

    @property
    def depth(self) -> int:
        """Components of a listed name that come before its path: 1 where names begin with an archive's number."""

    @property
    def hint(self) -> str:
        """What else to say where there is no image: empty, or a clause that begins with a semicolon."""

    def subfolders(self, folder: bytes) -> list[bytes]:
        """Names of the folders in a folder, sorted, without slashes and hidden ones; raises UserError."""

    def images(self, folder: bytes) -> tuple[list[bytes], int, list[bytes]]:
        """As `list_images`, names and what was left out being relative to the folder; raises UserError."""

    def holds_images(self, folder: bytes) -> bool:
        """Whether any file below a folder has an image's suffix."""

    def is_file(self, path: bytes) -> bool:
        """Whether a file is there."""

    def alone(self, path: bytes) -> str:
        """The flag --data with what lies at a path, in words that suit a message."""

    def part(
        self, folder: bytes, names: list[bytes], in_chans: int, labels: Labels | None, class_names: list[str] | None
    ) -> Part:
        """The images that were listed below a folder, in their order."""


class FolderTree:
    """A folder on disk; `spec` names it in messages."""

    depth = 0
    hint = ""

    def __init__(self, root: bytes, spec: str) -> None:
        self.root, self.spec = root, spec

    def subfolders(self, folder: bytes) -> list[bytes]:
        """Names of the folders in a folder, sorted."""
        path = os.path.join(self.root, folder)
        try:
            with os.scandir(path) as entries:
                return sorted(e.name for e in entries if is_folder(e) and e.name[:1] != b"." and e.name not in _SKIPPED)
        except OSError as error:
            raise UserError(f"--data: cannot read the folder {printable(path)} ({error.strerror})") from None

    def images(self, folder: bytes) -> tuple[list[bytes], int, list[bytes]]:
        """The images below a folder, the number of files, and what is left out."""
        return list_images(os.path.join(self.root, folder))

    def holds_images(self, folder: bytes) -> bool:
        """Whether any file below a folder has an image's suffix."""
        return holds_images(os.path.join(self.root, folder))

    def is_file(self, path: bytes) -> bool:
        """Whether a file is there."""
        return os.path.isfile(os.path.join(self.root, path))

    def alone(self, path: bytes) -> str:
        """--data with the path below the folder."""
        return f"--data {os.path.join(self.spec, printable(path))}"

    def part(
        self, folder: bytes, names: list[bytes], in_chans: int, labels: Labels | None, class_names: list[str] | None
    ) -> Part:
        """The files below a folder."""
        root = os.path.join(self.root, folder)
        return FilePart(root, names, in_chans, prefix=folder, labels=labels, class_names=class_names)


def walk(root: bytes, annotations: list[bytes] | None = None) -> Iterator[tuple[bytes, bool]]:
    """Each file below a folder: its path relative to it, and whether its suffix is an image's. In no order.

    Hidden names are skipped. Links to folders are followed, but not into a folder that they lie in. No file is
    stat'ed: a name with an image's suffix that is not an image is found out when it is read. With a list
    `annotations`, folders of annotations beside those of images are added to it and not gone into.

    Raises:
        UserError: a folder that cannot be read.
    """
    pending: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [(b"", ())]
    while pending:
        prefix, above = pending.pop()
        folder = os.path.join(root, prefix)
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            folders: list[bytes] = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b".") or name in _SKIPPED:
                        continue
                    if is_folder(entry):
                        folders.append(name)
                    else:
                        yield prefix + name, name[name.rfind(b".") :].lower() in _SUFFIXES
            if annotations is not None:
                beside = list(map(os.fsencode, annotations_among(map(os.fsdecode, folders)).annotations))
                annotations += [prefix + name + b"/" for name in beside]
                folders = [name for name in folders if name not in beside]
            pending += [(prefix + name + b"/", (*above, here)) for name in folders]
        except OSError as error:
            raise UserError(f"--data: cannot read the folder {printable(folder)} ({error.strerror})") from None


def holds_images(root: bytes) -> bool:
    """Whether any file below a folder has an image's suffix."""
    return any(is_image for _, is_image in walk(root))


def list_images(root: bytes) -> tuple[list[bytes], int, list[bytes]]:
    """The images below a folder in byte order, the number of files that were seen, and what was left out of them.

    Left out are folders (their names end with a slash) and single files that are annotations of images beside them.
    """
    left: list[bytes] = []
    seen, names = 0, []
    for path, is_image in walk(root, left):
        seen += 1
        if is_image:
            names.append(path)
    masks = masks_beside(names)
    return sorted(name for name in names if name not in masks), seen, sorted(left) + sorted(masks)


def annotations_note(left: list[bytes]) -> tuple[str, ...]:
    """A line for the folders and files that are left out as annotations."""
    if not left:
        return ()
    folders = [printable(name) for name in left if name.endswith(b"/")]
    files = [printable(name) for name in left if not name.endswith(b"/")]
    said = (
        [", ".join(folders[:4]) + (f", ... ({len(folders):,} folders)" if len(folders) > 4 else "")] if folders else []
    )
    said += [f"{len(files):,} files, such as {files[0]}"] if files else []
    return (f"left out, as annotations of the images beside them: {' and '.join(said)}",)


def open_folder(root: bytes, spec: str, name: str, in_chans: int) -> Source:
    """A folder on disk as a source; see `open_tree`."""
    return open_tree(FolderTree(root, spec), spec, name, in_chans)


def open_tree(tree: Tree, spec: str, name: str, in_chans: int) -> Source:
    """A tree of images: flat, nested, one folder per class, or in parts (train/, val/, test/; any case).

    Folders beside a training part and a validation or test part are left out, which a note says; and so are the
    annotations of images, where the names of folders or files tell them (beside.py): of images/ beside masks/ or
    annotations/ (ADE20K's layout) only images/ is listed. The top-level folder is the class where every training image
    lies under one and there are two or more, counted over all parts.

    Raises:
        UserError: no image, two folders for one part, or a folder that may be a part or a class.
    """
    prefix = b""
    subfolders = tree.subfolders(b"")
    images, annotations = annotations_among(map(os.fsdecode, subfolders))
    left = [os.fsencode(folder) + b"/" for folder in annotations]
    subfolders = [folder for folder in subfolders if folder + b"/" not in left]
    notes: tuple[str, ...] = ()
    if images is not None:
        prefix = os.fsencode(images) + b"/"
        notes += _left_out(tree, b"", subfolders, [prefix[:-1]], f"{printable(prefix)} holds the images")
        subfolders = tree.subfolders(prefix)
    parts = _parts(tree, prefix, subfolders, spec)
    places = {part: (tree, prefix + folder + b"/") for part, folder in parts.items()} or {"train": (tree, prefix)}
    opened, empty = gather(places, left, spec, in_chans)
    known = ", ".join(f"{printable(folder)}/" for folder in parts.values())
    if parts:
        notes += _left_out(tree, prefix, subfolders, list(parts.values()), f"{known} are parts")
    for table in (prefix + folder + METADATA for folder in (b"", *(folder + b"/" for folder in parts.values()))):
        if tree.is_file(table):
            notes += (f"not read: {printable(table)} ({tree.alone(table)} takes labels from it)",)
    notes += annotations_note(left)
    return Source(name, opened["train"], opened.get("val"), opened.get("test"), notes, empty)


def gather(
    places: dict[str, tuple[Tree, bytes]], left: list[bytes], spec: str, in_chans: int
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Part -> its images, with classes over all parts; and the parts that hold none.

    places: part -> tree and folder. What is left out as annotations is added to `left`.

    Raises:
        UserError: no image in the training part.
    """
    names: dict[str, list[bytes]] = {}
    for part, (tree, folder) in places.items():
        names[part], seen, beside = tree.images(folder)
        left += [one for one in (folder + name for name in beside) if one not in left]
        if part == "train" and not names[part]:
            read = " ".join(sorted(IMAGE_SUFFIXES))
            where = f" in {printable(folder)}" if folder else ""
            raise UserError(
                f"--data {spec}: no image among {seen} files{where}; these suffixes are read: {read}{tree.hint}"
            )
    depth = places["train"][0].depth
    classes = _classes(names, depth)
    opened = {}
    for part, (tree, folder) in places.items():
        if names[part]:
            labels, class_names = _labels(names[part], classes, depth)
            opened[part] = tree.part(folder, names[part], in_chans, labels, class_names)
    return opened, tuple(part for part in names if part not in opened)


def _left_out(tree: Tree, base: bytes, subfolders: list[bytes], kept: list[bytes], why: str) -> tuple[str, ...]:
    """A line for the folders of images beside those that are kept."""
    found = [folder for folder in subfolders if folder not in kept and tree.holds_images(base + folder + b"/")]
    if not found:
        return ()
    left = ", ".join(f"{printable(folder)}/" for folder in found[:4]) + (", ..." if len(found) > 4 else "")
    return (f"left out, since {why}: {left} ({tree.alone(base + found[0])} takes it alone)",)


def _parts(tree: Tree, base: bytes, subfolders: list[bytes], spec: str) -> dict[str, bytes]:
    """Part -> its folder; empty where no subfolder is named like one."""
    parts: dict[str, bytes] = {}
    for folder in subfolders:
        part = part_of(os.fsdecode(folder), SPLITS)
        if part is None:
            continue
        if part in parts:
            two = f"{printable(parts[part])}/ and {printable(folder)}/"
            raise UserError(f"--data {spec}: {two} are both the {part} part; keep one of them there")
        parts[part] = folder
    if "train" in parts and "val" not in parts:  # beside it these words are no classes
        more = [folder for folder in subfolders if part_of(os.fsdecode(folder)) == "val"]
        parts |= {"val": more[0]} if len(more) == 1 else {}
    if not parts or ("train" in parts and len(parts) > 1):
        return parts
    # One lone name can be a class, such as a train among vehicles; a wrong guess would mix up parts in silence.
    alone = next(iter(parts.values()))
    some = printable(alone)
    for folder in subfolders:
        if folder not in parts.values() and tree.holds_images(base + folder + b"/"):
            raise UserError(
                f"--data {spec}: is {some}/ a part or a class beside {printable(folder)}/? "
                f"For the part, give {tree.alone(base + alone)}; for a class, rename the folder"
            )
    if "train" not in parts:
        raise UserError(
            f"--data {spec}: a {some}/ folder but no train/; to train on it, give {tree.alone(base + alone)}"
        )
    return parts


def class_folder(name: bytes, depth: int) -> bytes | None:
    """The first folder of a listed name; None where it lies in none."""
    components = name.split(b"/", depth + 1)
    return components[depth] if len(components) > depth + 1 else None


def _classes(names: dict[str, list[bytes]], depth: int) -> list[bytes]:
    """The class folders over all parts, in their order; empty where the training images are not in class folders."""
    if any(name.count(b"/") <= depth for name in names["train"]):
        return []
    tops = {top for found in names.values() for name in found if (top := class_folder(name, depth)) is not None}
    return [os.fsencode(name) for name in class_order(map(os.fsdecode, tops))] if len(tops) > 1 else []


def _labels(names: list[bytes], classes: list[bytes], depth: int) -> tuple[Labels | None, list[str] | None]:
    """Class ids of a part's images and the classes' names; None where some image lies in no class folder."""
    if not classes or any(name.count(b"/") <= depth for name in names):
        return None, None
    ids = {folder: index for index, folder in enumerate(classes)}
    labels = np.fromiter((ids[class_folder(name, depth) or b""] for name in names), np.int64, len(names))
    return labels, [printable(folder) for folder in classes]
