"""Folders of images as parts of a data set.

Paths are bytes throughout: names that are not UTF-8, or hold newlines, are listed, sorted and opened like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from maekit.config import UserError
from maekit.data.beside import annotations_among, masks_beside
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.parts import SPLITS, FilePart, Source, class_order, is_folder, part_of, printable

_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
METADATA = b"metadata.csv"
"""Where the hub's folders of images keep labels and captions."""
_SKIPPED = (b"lost+found",)  # on every ext4 disk, readable by root only


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
    """A tree of images: flat, nested, one folder per class, or in parts (train/, val/, test/; any case).

    Folders beside a training part and a validation or test part are left out, which a note says; and so are the
    annotations of images, where the names of folders or files tell them (beside.py): of images/ beside masks/ or
    annotations/ (ADE20K's layout) only images/ is listed. The top-level folder is the class where every training image
    lies under one and there are two or more, counted over all parts.

    Raises:
        UserError: no image, two folders for one part, or a folder that may be a part or a class.
    """
    prefix = b""
    subfolders = _subfolders(root)
    images, annotations = annotations_among(map(os.fsdecode, subfolders))
    left = [os.fsencode(folder) + b"/" for folder in annotations]
    subfolders = [folder for folder in subfolders if folder + b"/" not in left]
    notes: tuple[str, ...] = ()
    if images is not None:
        prefix = os.fsencode(images) + b"/"
        notes += _left_out(root, subfolders, [prefix[:-1]], f"{printable(prefix)} holds the images", spec)
        subfolders = _subfolders(os.path.join(root, prefix))
    parts = _parts(os.path.join(root, prefix), subfolders, spec)
    roots = {part: prefix + folder + b"/" for part, folder in parts.items()} or {"train": prefix}
    names: dict[str, list[bytes]] = {}
    for part, folder in roots.items():
        names[part], seen, beside = list_images(os.path.join(root, folder))
        left += [one for one in (folder + name for name in beside) if one not in left]
        if part == "train" and not names[part]:
            read = " ".join(sorted(IMAGE_SUFFIXES))
            where = f" in {printable(folder)}" if folder else ""
            raise UserError(f"--data {spec}: no image among {seen} files{where}; these suffixes are read: {read}")
    classes = _classes(names)
    opened = {
        part: _labelled(os.path.join(root, roots[part]), roots[part], found, classes, in_chans)
        for part, found in names.items()
        if found
    }
    known = ", ".join(f"{printable(folder)}/" for folder in parts.values())
    if parts:
        notes += _left_out(os.path.join(root, prefix), subfolders, list(parts.values()), f"{known} are parts", spec)
    for table in (prefix + folder + METADATA for folder in (b"", *(folder + b"/" for folder in parts.values()))):
        if os.path.isfile(os.path.join(root, table)):
            notes += (
                f"not read: {printable(table)} (--data {os.path.join(spec, printable(table))} takes labels from it)",
            )
    notes += annotations_note(left)
    empty = tuple(part for part in names if part not in opened)
    return Source(name, opened["train"], opened.get("val"), opened.get("test"), notes, empty)


def _left_out(base: bytes, subfolders: list[bytes], kept: list[bytes], why: str, spec: str) -> tuple[str, ...]:
    """A line for the folders of images beside those that are kept."""
    beside = [folder for folder in subfolders if folder not in kept]
    found = [printable(folder) for folder in beside if holds_images(os.path.join(base, folder))]
    if not found:
        return ()
    left = ", ".join(f"{folder}/" for folder in found[:4]) + (", ..." if len(found) > 4 else "")
    return (f"left out, since {why}: {left} (--data {os.path.join(spec, found[0])} takes it alone)",)


def _subfolders(folder: bytes) -> list[bytes]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if is_folder(e) and e.name[:1] != b"." and e.name not in _SKIPPED)
    except OSError as error:
        raise UserError(f"--data: cannot read the folder {printable(folder)} ({error.strerror})") from None


def _parts(base: bytes, subfolders: list[bytes], spec: str) -> dict[str, bytes]:
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
    some = printable(next(iter(parts.values())))
    for folder in subfolders:
        if folder not in parts.values() and holds_images(os.path.join(base, folder)):
            raise UserError(
                f"--data {spec}: is {some}/ a part or a class beside {printable(folder)}/? "
                f"For the part, give --data {os.path.join(spec, some)}; for a class, rename the folder"
            )
    if "train" not in parts:
        path = os.path.join(spec, some)
        raise UserError(f"--data {spec}: a {some}/ folder but no train/; to train on it, give --data {path}")
    return parts


def _classes(names: dict[str, list[bytes]]) -> list[bytes]:
    """The class folders over all parts, in their order; empty where the training images are not in class folders."""
    if any(b"/" not in name for name in names["train"]):
        return []
    tops = {name.partition(b"/")[0] for found in names.values() for name in found if b"/" in name}
    return [os.fsencode(name) for name in class_order(map(os.fsdecode, tops))] if len(tops) > 1 else []


def _labelled(root: bytes, prefix: bytes, names: list[bytes], classes: list[bytes], in_chans: int) -> FilePart:
    if not classes or any(b"/" not in name for name in names):
        return FilePart(root, names, in_chans, prefix=prefix)
    ids = {folder: index for index, folder in enumerate(classes)}
    labels = np.fromiter((ids[name.partition(b"/")[0]] for name in names), np.int64, len(names))
    class_names = [printable(folder) for folder in classes]
    return FilePart(root, names, in_chans, prefix=prefix, labels=labels, class_names=class_names)
