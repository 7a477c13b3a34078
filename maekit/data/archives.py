"""Images in .tar and .zip archives, read where they lie: nothing is unpacked, nothing is written.

An archive is listed once; what is held of it are arrays, 37 bytes an image, and one blob of names. Links are never
followed, names lead nowhere, and a member is not believed to be what the index says before it is read.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from maekit.config import UserError
from maekit.data import archive_tar, archive_zip
from maekit.data.archive_labels import SIDES, SideLabels
from maekit.data.archive_members import BrokenArchive, Kind, Member, Method, OpenFile, Window, is_unsafe, path_of
from maekit.data.archive_names import UNPACK, Archive, refuse_form
from maekit.data.folders import METADATA
from maekit.data.images import IMAGE_SUFFIXES, MAX_PIXELS, BadImage
from maekit.data.parts import FINGERPRINT_SAMPLES, Labels, PlacedPart, evenly_spaced, name_blob, printable
from maekit.terminal import counting, make_console

_IMAGES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
_INNER = frozenset((b".tar", b".zip", b".gz", b".tgz", b".7z", b".parquet"))
_LINKS = "links, which are not followed (tar -h --hard-dereference packs files in their place)"
_FILES_KEPT = 200
_LARGE = 10**8
_TOLD_EVERY = 1000
MOST_BYTES = 8 * MAX_PIXELS
"""Bytes of one channel of the largest image, float64; no image has fewer than four channels' worth allowed."""
_BOMB_RATIO = 100
"""A member that unpacks to more than MAX_PIXELS bytes and this many times its size is no image."""
_MAGICS = {b"\x1f\x8b": "gz", b"\xfd7zXZ": "xz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst"}


class Node:
    """A folder within archives: the folders in it by name, and how many files and images lie directly in it."""

    __slots__ = ("files", "folders", "images")

    def __init__(self) -> None:
        self.folders: dict[bytes, Node] = {}
        self.files = self.images = 0


class Contents:
    """What some archives hold together: only for as long as they are opened.

    Raises:
        UserError: one that cannot be read, or holds images that cannot be read for the way in which they are packed;
            all such archives at once.
    """

    def __init__(self, archives: list[Archive]) -> None:
        self.archives = archives
        self.names: list[bytes] = []
        """Paths of the images, in the order in which they were listed."""
        self.number = array("I")
        """Of each image, its archive's number here."""
        self.places = array("q")
        """Three for each image: start, stored, size."""
        self.checks = array("I")
        self.methods = array("B")
        self.root = Node()
        self.sides = {side: SideLabels() for side in SIDES}
        self.left: Counter[str] = Counter()
        """Why images are left out -> how many."""
        self.examples: dict[str, str] = {}
        """Why -> the first of them."""
        self.tables: set[bytes] = set()
        """Paths of tables that hold labels in a folder."""
        self.unmarked: list[str] = []
        """Tars without an end mark."""
        self.behind: list[str] = []
        """Tars with something behind it."""
        self.inner = ""
        """A file within that may hold images: an archive or Parquet."""
        self._nodes = {b"": self.root}
        problems: list[str] = []
        sizes = [os.path.getsize(archive.path) if os.path.isfile(archive.path) else 0 for archive in archives]
        before = 0
        with _bar(sum(sizes)) as told:
            for number, size in enumerate(sizes):
                try:
                    self._list(number, before, told)
                except UserError as error:
                    problems += error.problems
                before += size
        if problems:
            more = [f"and {len(problems) - 5} more archives that cannot be read"] if len(problems) > 5 else []
            raise UserError(*problems[:5], *more)

    def _list(self, number: int, before: int, told: Callable[[int], None]) -> None:
        """told: is told how far it is, in bytes, of which so many stand in the archives before."""
        archive = self.archives[number]
        told(before)
        refuse_form(archive)
        try:
            file = OpenFile(archive.path)
            if archive.path.lower().endswith(".zip"):
                for member in archive_zip.members(file):
                    self._add(number, member, partial(_of_zip, file, member))
            else:
                window = Window(file, 8192)
                for count, member in enumerate(archive_tar.members(file, window), 1):
                    self._add(number, member, partial(window.read, member.start, member.size))
                    if count % _TOLD_EVERY == 0:
                        told(before + member.start)
                if not window.end:
                    self.unmarked.append(archive.shown)
                elif any(file.read(window.end, archive_tar.RECORD + archive_tar.BLOCK)):
                    self.behind.append(archive.shown)
        except BrokenArchive as error:
            raise UserError(f"--data {archive.shown}: {_reason(error, file)}") from None
        except OSError as error:
            raise UserError(f"--data {archive.shown}: cannot be read ({error.strerror or error})") from None

    def _add(self, number: int, member: Member, read: Callable[[], bytes]) -> None:
        path = path_of(member.name)
        suffix = member.name[member.name.rfind(b".") :].lower()
        if path is None:
            if suffix in _IMAGES and is_unsafe(member.name):
                self._leave_out("names that lead out of the archive or are no paths", member)
            return
        if member.kind is Kind.FOLDER:
            self._node(path)
            return
        folder = path.rpartition(b"/")[0]
        node = self._nodes.get(folder) or self._node(folder)
        node.files += 1
        if suffix in _IMAGES:
            if member.kind is not Kind.FILE:
                self._leave_out(_LINKS if member.kind is Kind.LINK else "devices, pipes or sparse files", member)
                return
            if member.method is Method.REFUSED:
                raise UserError(_packed(self.archives[number], member))
            node.images += 1
            self.names.append(path)
            self.number.append(number)
            self.places.extend((member.start, member.stored, member.size))
            self.checks.append(member.check)
            self.methods.append(member.method)
        elif suffix in SIDES and member.kind is Kind.FILE:
            self.sides[suffix].add(number, path, member.size, read)
        elif path.endswith(METADATA) and path[-len(METADATA) - 1 : -len(METADATA)] in (b"", b"/"):
            self.tables.add(path)
        elif not self.inner and suffix in _INNER:
            self.inner = printable(path)

    def holds(self, folder: bytes) -> bool:
        """Whether there is a folder of that path."""
        return folder in self._nodes

    def folders(self) -> list[str]:
        """The paths of all folders, on one printable line each."""
        return [printable(path) for path in self._nodes if path]

    def left_out(self) -> list[str]:
        """What is left out of the images, in words."""
        return [f"{count:,} {why}, such as {self.examples[why]}" for why, count in self.left.items()]

    def _leave_out(self, why: str, member: Member) -> None:
        self.left[why] += 1
        self.examples.setdefault(why, _short(member.name))

    def _node(self, folder: bytes) -> Node:
        node = self._nodes.get(folder)
        if node is None:
            above, _, name = folder.rpartition(b"/")
            node = self._nodes[folder] = self._node(above).folders.setdefault(name, Node())
        return node


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar for so many bytes of archives, if they are so large that somebody waits: tars are read from end to end."""
    if total < _LARGE:
        yield lambda done: None
        return
    with counting(make_console(), "listing archives (MB)") as told:
        yield lambda done: told(done // 10**6, total // 10**6)


def _of_zip(file: OpenFile, member: Member) -> bytes:
    deflated = member.method is Method.DEFLATED
    return archive_zip.read(
        file, member.start, member.stored, member.size, member.check, len(member.name), deflated=deflated
    )


def _short(name: bytes) -> str:
    text = printable(name)
    return text if len(text) < 60 else f"{text[:57]}..."


def _packed(archive: Archive, member: Member) -> str:
    command = f"7z x {archive.shown} -oDIR" if member.why != "encrypted" else f"unzip {archive.shown} -d DIR"
    return (
        f"--data {archive.shown}: {_short(member.name)} is {member.why}; members that are stored or deflated are read. "
        f"Unpack it: {command}, then --data DIR"
    )


def _reason(error: BrokenArchive, file: OpenFile) -> str:
    reason = str(error)
    if not reason.startswith("no "):
        return reason
    begins = file.read(0, 64)
    for magic, form in _MAGICS.items():
        if begins.startswith(magic):
            return f"{reason}, but compressed by another name: {UNPACK[form]} after calling it .tar.{form}"
    if not begins:
        return "an empty file"
    page = begins.lstrip()[:1] == b"<"
    return f"{reason}; it begins with {_short(begins[:24])}" + (" as a page of the web does" if page else "")


class ArchivePart(PlacedPart):
    """Images of archives, in the order of the archives and of the members' names in byte order.

    A copy that was pickled for a spawned worker opens the archives anew; forked ones and threads share what is open.
    """

    def __init__(
        self, archives: list[Archive], names: list[bytes], index: dict[str, npt.NDArray[Any]], in_chans: int, *,
        base: bytes = b"", prefix: bytes = b"", labels: Labels | None = None, class_names: list[str] | None = None,
    ) -> None:  # fmt: skip
        """`names` are relative to base + prefix; `base` is not shown where there is one archive.

        index: places [N, 3] (start, stored, size), checks [N], methods [N], firsts [archives + 1]: the number of the
        first image of each archive.
        """
        self.archives, self.base, self.prefix = archives, base, prefix
        self.in_chans, self.labels, self.class_names = in_chans, labels, class_names
        self.places_N3, self.checks, self.methods, self.firsts = (
            index[key] for key in ("places", "checks", "methods", "firsts")
        )
        self.by_side = False
        """Whether the labels are those of files beside the images."""
        self._blob, self._starts = name_blob(names)
        self._open: dict[int, OpenFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def archive(self, index: int) -> int:
        """The number of an image's archive."""
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def member(self, index: int) -> bytes:
        """An image's path in its archive."""
        return self.base + self.prefix + self._relative(index)

    def _relative(self, index: int) -> bytes:
        return self._blob[self._starts[index] : self._starts[index + 1] - 1]

    def data(self, index: int) -> bytes:
        """The encoded image; raises BadImage."""
        start, stored, size = self.places_N3[index].tolist()
        most = MOST_BYTES * max(4, self.in_chans)
        bomb = size > MAX_PIXELS and size > _BOMB_RATIO * stored
        if max(stored, size) > most or bomb:
            raise BadImage(f"{size:,} bytes of {stored:,} in the archive (a decompression bomb?)")
        try:
            file, method = self._file(self.archive(index)), self.methods[index]
            if method == Method.TAR:
                return self._of_tar(file, index, start, size)
            check, deflated = int(self.checks[index]), bool(method == Method.DEFLATED)
            return archive_zip.read(file, start, stored, size, check, len(self.member(index)), deflated=deflated)
        except OSError as error:
            raise BadImage((error.strerror or str(error)).lower()) from None

    def _of_tar(self, file: OpenFile, index: int, start: int, size: int) -> bytes:
        piece = file.read(start - archive_tar.BLOCK, archive_tar.BLOCK + size)
        if len(piece) < archive_tar.BLOCK + size:
            raise BadImage("cut short within the archive")
        if zlib.crc32(piece[: archive_tar.BLOCK]) != self.checks[index]:
            raise BadImage("not where it was: the archive has changed since it was listed")
        return piece[archive_tar.BLOCK :]

    def _file(self, number: int) -> OpenFile:
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= _FILES_KEPT:
                self._open.clear()  # a thread that reads holds its own, and it stays open as long
            file = self._open[number] = OpenFile(self.archives[number].path)
        return file

    def name(self, index: int) -> str:
        """The path in the archive, behind the archive's name where there are several, on one printable line."""
        if len(self.archives) == 1:
            return printable(self.prefix + self._relative(index))
        return f"{self.archives[self.archive(index)].shown}: {printable(self.member(index))}"

    def place(self, index: int) -> str:
        """The member as a path below its archive's."""
        return os.path.join(self.archives[self.archive(index)].path, os.fsdecode(self.member(index)))

    def stored_bytes(self, index: int) -> int:
        """Bytes of the encoded image."""
        return int(self.places_N3[index, 2])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all names and the sizes of at most 1,000 evenly spaced members: a folder's of the same files.

        Of several archives, also over their names and numbers of images; and over labels that no name tells.
        """
        digest = hashlib.sha256(self._blob)
        for index in evenly_spaced(len(self), FINGERPRINT_SAMPLES):
            digest.update(int(self.places_N3[index, 2]).to_bytes(8, "little", signed=True))
        if len(self.archives) > 1:
            digest.update("\0".join(archive.shown for archive in self.archives).encode("utf-8", "surrogateescape"))
            digest.update(self.firsts.astype("<i8").tobytes())
        if self.by_side and self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def members_of(part: ArchivePart) -> Iterator[tuple[int, bytes]]:
    """Archive's number and path of each image."""
    for number in range(len(part.archives)):
        for index in range(int(part.firsts[number]), int(part.firsts[number + 1])):
            yield number, part.member(index)
