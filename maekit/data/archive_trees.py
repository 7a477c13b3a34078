"""Archives as sources: the rules of folders (folders.py) for the tree of files that they hold.

- One archive is a folder that was packed: the same parts, classes, order, ids and fingerprint as of the folder. One
  folder that holds all the rest, as in archives of a repository, is looked through. A path may lead on into it:
  photos.zip/train is what photos/train was.
- A folder of archives (WebDataset's shards): parts by the archives' names, as with Parquet (train-000000.tar, val.tar,
  test/0.tar). Where no name tells a part, all of them together are one tree. Images stand in the order of the archives.
- Where files beside the images tell labels (archive_labels.py), these count, and not the folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from maekit.config import UserError, did_you_mean
from maekit.data.archive_labels import SIDES, classes_of
from maekit.data.archive_members import path_of
from maekit.data.archive_names import Archive, archive_above, is_archive, is_read, refuse_form
from maekit.data.archives import ArchivePart, Contents, Node, members_of
from maekit.data.beside import annotations_among, masks_beside
from maekit.data.folders import Tree, annotations_note, gather, holds_images, open_tree
from maekit.data.parquet import by_part, find_files
from maekit.data.parts import Labels, Part, Source, part_of, printable


class ArchiveTree:
    """The files of some archives together, below a folder `base` in all of them."""

    def __init__(self, contents: Contents, base: bytes = b"", *, numbered: bool) -> None:
        """numbered: whether the images' names begin with the archive's number, so that they are told apart."""
        self.contents, self.base, self.depth = contents, base, int(numbered)
        names = contents.names
        if numbered:
            names = [b"%06d/" % number + name for number, name in zip(contents.number, names, strict=True)]
        order = sorted(range(len(names)), key=names.__getitem__)
        # Of several members of one name the last one counts, as it does where they are unpacked.
        kept = [i for i, after in pairwise(order) if names[i] != names[after]] + order[-1:]
        self._order = np.array(kept, np.int64)
        self._names = [names[i] for i in kept]
        contents.names = []

    @property
    def hint(self) -> str:
        """Images that are left out; archives, or Parquet, within the archives."""
        said = "".join(f"; left out: {line}" for line in self.contents.left_out())
        inner = self.contents.inner
        return said + (f"; it holds {inner}, which is not looked into: unpack it and give that folder" if inner else "")

    def subfolders(self, folder: bytes) -> list[bytes]:
        """Names of the folders in a folder, sorted."""
        return sorted(self._node(folder).folders)

    def _node(self, folder: bytes) -> Node:
        node = self.contents.root
        for name in (self.base + folder).split(b"/")[:-1]:
            node = node.folders.get(name) or Node()
        return node

    def images(self, folder: bytes) -> tuple[list[bytes], int, list[bytes]]:
        """The images below a folder (names begin with the archive's number, if any), the number of files, and what is
        left out.
        """
        left: list[bytes] = []
        kept, seen, pending = set(), 0, [(b"", self._node(folder))]
        while pending:
            path, node = pending.pop()
            kept.add(path)
            seen += node.files
            beside = set(map(os.fsencode, annotations_among(map(os.fsdecode, node.folders)).annotations))
            left += [path + name + b"/" for name in beside]
            pending += [(path + name + b"/", below) for name, below in node.folders.items() if name not in beside]
        top = self.base + folder
        begin = 7 * self.depth
        found = []
        for name in self._names:
            if name.startswith(top, begin):
                inside = name[begin + len(top) :]
                if inside[: inside.rfind(b"/") + 1] in kept:
                    found.append(name[:begin] + inside)
        masks = masks_beside(found)
        files = sorted(masks)
        if self.depth:
            files = [os.fsencode(self.contents.archives[int(name[:6])].shown) + b": " + name[7:] for name in files]
        return [name for name in found if name not in masks], seen, sorted(left) + files

    def holds_images(self, folder: bytes) -> bool:
        """Whether any image lies below a folder."""
        pending = [self._node(folder)]
        while pending:
            node = pending.pop()
            if node.images:
                return True
            pending += node.folders.values()
        return False

    def is_file(self, path: bytes) -> bool:
        """Whether a table is there; not known of other files."""
        return self.base + path in self.contents.tables

    def alone(self, path: bytes) -> str:
        """How to name a folder or a table in it: only a folder of one archive can be given as it is."""
        inside = printable(self.base + path)
        if self.depth or self.is_file(path):
            return f"--data DIR/{inside} of the archive unpacked into DIR"
        return f"--data {os.path.join(self.contents.archives[0].shown, inside)}"

    def part(
        self, folder: bytes, names: list[bytes], in_chans: int, labels: Labels | None, class_names: list[str] | None
    ) -> ArchivePart:
        """The images that were listed below a folder, in their order."""
        contents, begin, top = self.contents, 7 * self.depth, self.base + folder
        rows = np.zeros(len(names), np.int64)
        at = 0  # both lists are sorted
        for row, name in enumerate(names):
            whole = name[:begin] + top + name[begin:]
            while self._names[at] != whole:
                at += 1
            rows[row] = at
        rows = self._order[rows]
        of = np.array(contents.number, np.int64)[rows]
        index: dict[str, npt.NDArray[Any]] = {
            "places": np.frombuffer(contents.places, np.int64).reshape(-1, 3)[rows],
            "checks": np.array(contents.checks, np.uint32)[rows],
            "methods": np.array(contents.methods, np.uint8)[rows],
            "firsts": np.searchsorted(of, np.arange(len(contents.archives) + 1)),
        }
        return ArchivePart(
            contents.archives, [name[begin:] for name in names], index, in_chans, base=self.base, prefix=folder,
            labels=labels, class_names=class_names,
        )  # fmt: skip


def find_archives(folder: str, spec: str) -> list[str]:
    """The archives of a folder, where Parquet files would be looked for; those that are not read where there are no
    others.

    Raises:
        UserError: several folders of them to choose from.
    """
    found = find_files(folder, spec, is_archive, "archives")
    read = [path for path in found if is_read(path)]
    return read or found


def refuse_archives(path: str, spec: str) -> None:
    """Raise UserError for an archive, or a folder of archives, where only files on disk can be read."""
    above = archive_above(path)
    if above is not None:
        found = [above]
    else:
        found = find_archives(path, spec) if os.path.isdir(path) and not holds_images(os.fsencode(path)) else []
    if found:
        name = os.path.basename(found[0])
        command = f"unzip {name} -d DIR" if name.lower().endswith(".zip") else f"tar xf {name} -C DIR"
        what = "an archive" if above is not None else "a folder of archives"
        raise UserError(
            f"--data {spec}: {what}, and pairs of images and annotations are read from files on disk only: unpack it "
            f"({printable(command)}), then --data DIR"
        )


def open_archive(path: str, spec: str, name: str, in_chans: int) -> Source:
    """One archive as a source, or the folder in it to which the path leads on.

    Raises:
        UserError: cannot be read, or holds no such folder; and as of `open_tree`.
    """
    above = archive_above(path) or path
    inside = path[len(above) :]
    archive = Archive(os.path.abspath(above), spec.removesuffix(printable(inside)))
    return _open_together([archive], spec, name, in_chans, os.fsencode(inside))


def open_archives(paths: list[str], folder: str, spec: str, name: str, in_chans: int) -> Source:
    """A folder's archives as a source.

    Raises:
        UserError: one that cannot be read, no training part, or no image in it; and as of `open_tree`.
    """
    if len(paths) == 1:
        return open_archive(paths[0], os.path.join(spec, os.path.relpath(paths[0], folder)), name, in_chans)
    shown = {path: printable(os.path.relpath(path, folder)) for path in paths}
    for path in paths:
        refuse_form(Archive(path, os.path.join(spec, shown[path])))
    files = by_part(paths, spec)
    archives = {part: [Archive(os.path.abspath(path), shown[path]) for path in some] for part, some in files.items()}
    if list(files) == ["train"]:
        return _open_together(archives["train"], spec, name, in_chans)
    trees = {part: Contents(some) for part, some in archives.items()}
    places: dict[str, tuple[Tree, bytes]] = {
        part: (ArchiveTree(trees[part], base, numbered=True), b"") for part, base in _lone_folders(trees).items()
    }
    left: list[bytes] = []
    opened, empty = gather(places, left, spec, in_chans)
    notes = annotations_note(left)
    source = Source(name, opened["train"], opened.get("val"), opened.get("test"), notes, empty)
    return _finished(source, trees)


def _open_together(archives: list[Archive], spec: str, name: str, in_chans: int, inside: bytes = b"") -> Source:
    contents = Contents(archives)
    base = _lone_folder(contents)
    if folder := inside.strip(b"/"):
        base = _base_of(contents, folder, base, spec)
    elif part_of(os.fsdecode(base[:-1])) == "train":  # named in messages as a folder's is
        base = b""
    source = open_tree(ArchiveTree(contents, base, numbered=len(archives) > 1), spec, name, in_chans)
    return _finished(source, dict.fromkeys(("train", "val", "test"), contents))


def _base_of(contents: Contents, folder: bytes, lone: bytes, spec: str) -> bytes:
    """A folder that was named, with a slash: where it is, or below the one that is looked through, which no message
    names."""
    path = path_of(folder)
    for found in () if path is None else (path, lone + path):
        if contents.holds(found):
            return found + b"/"
    shown = contents.archives[0].shown
    hint = did_you_mean(printable(folder), contents.folders() or ["the archive as a whole"])
    raise UserError(f"--data {spec}: no such folder in {shown}; {hint}")


def _lone_folder(contents: Contents) -> bytes:
    """The one folder that holds everything, with a slash; b"" where there is none."""
    root = contents.root
    return next(iter(root.folders)) + b"/" if not root.files and len(root.folders) == 1 else b""


def _lone_folders(trees: dict[str, Contents]) -> dict[str, bytes]:
    """For each part the one folder that is looked through; of parts that hold one class only, that is its folder."""
    bases = {part: _lone_folder(contents) for part, contents in trees.items()}
    if bases["train"]:
        top = trees["train"].root.folders[bases["train"][:-1]]
        classes = {name + b"/" for name in top.folders}
        return {part: b"" if base in classes else base for part, base in bases.items()}
    return {part: base if part_of(os.fsdecode(base[:-1])) else b"" for part, base in bases.items()}


def _finished(source: Source, contents: dict[str, Contents]) -> Source:
    """With labels of files beside the images, and notes of what is left out."""
    parts: dict[str, Part | None] = {"train": source.train, "val": source.val, "test": source.test}
    there = {part: one for part, one in parts.items() if isinstance(one, ArchivePart)}
    source.notes += _label(there, contents) + _left_out(contents.values())
    return source


def _label(parts: dict[str, ArchivePart], contents: dict[str, Contents]) -> tuple[str, ...]:
    """Give the parts the labels of files beside the images, where there are any; and say so."""
    for side in SIDES:
        if not any(len(contents[part].sides[side]) for part in parts):
            continue
        said = {part: contents[part].sides[side].of(members_of(one), len(one)) for part, one in parts.items()}
        found = classes_of(said, {part: (one.labels, one.class_names) for part, one in parts.items()})
        if found is None or not (found[0]["train"] >= 0).any():
            continue
        for part, one in parts.items():
            labelled = bool((found[0][part] >= 0).any())
            one.labels, one.class_names = (found[0][part], found[1]) if labelled else (None, None)
            one.by_side = labelled
        return (f"labels are those of the {side.decode()} files beside the images, {len(found[1]):,} classes",)
    return ()


def _left_out(all_contents: Iterable[Contents]) -> tuple[str, ...]:
    """Lines for the members that are never read (links, devices, names that lead elsewhere), and for lost ends."""
    contents = list(dict.fromkeys(all_contents))
    said = [line for one in contents for line in one.left_out()]
    notes: tuple[str, ...] = (f"left out of the images: {'; '.join(said)}",) if said else ()
    endless = _first_of([shown for one in contents for shown in one.unmarked])
    if endless:
        notes += (f"without the empty blocks that end a tar: {endless}; perhaps the end is missing",)
    longer = _first_of([shown for one in contents for shown in one.behind])
    if longer:
        notes += (f"not read: what stands behind the end of {longer}; of tars put one behind the other only the first "
                  "is read (tar xif unpacks them all)",)  # fmt: skip
    return notes


def _first_of(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1:,} more" if len(names) > 1 else "".join(names)
