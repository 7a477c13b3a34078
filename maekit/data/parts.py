"""A part of a data set (training, validation, test) behind one small interface, as files or as arrays in memory.

Parts are handed to loader workers, forked or spawned: they hold paths as one blob of bytes, never as a list of strings,
whose reference counts would copy every page of memory into every worker.
Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import AnyStr, Protocol

import numpy as np
import numpy.typing as npt

from maekit.data.images import BadImage, decode, frames_left_out, probe_size
from maekit.data.pixels import Look, Pixels, fit_channels

Labels = npt.NDArray[np.int64]

SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test", "testing": "test"}
"""Lower-case folder or file name -> the part it stands for."""
PART_WORDS = {**SPLITS, "valid": "val", "dev": "val"}
"""The same where a name cannot be a class's, as in a table's files or beside annotations."""

_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
_YEAR = re.compile(r"[_-]?20\d\d$")
LOOKED_AT = 16
"""Files of a part whose headers are looked at for pages that nothing reads."""
LOOKED_SECONDS = 0.5
FINGERPRINT_SAMPLES = 1000


class Part(Protocol):
    """One split. A sample's id is its index: the rank of its relative path in byte order, or its row number."""

    @property
    def in_chans(self) -> int:
        """Channels of every image that `read` returns."""

    @property
    def labels(self) -> Labels | None:
        """Class ids [N], indices into `class_names`; -1 is unlabelled; None where there are no labels."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, the same list for all parts of a source."""

    groups: Labels | None
    """A number for each image [N], the same for images that no split may part; None: each image is by itself."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and sizes or over the samples: the same wherever the data are stored."""

    def __len__(self) -> int: ...

    def read(self, index: int, look: Look | None = None) -> Pixels:
        """The image H W C, or the window that `look` chooses: uint8 or float32, as `images.decode`; raises BadImage."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels, from the header only; raises BadImage."""

    def frames_left_out(self, index: int) -> int:
        """Pages or frames of the file behind the first, which `read` does not return; raises BadImage."""

    def name(self, index: int) -> str:
        """What to call the sample in a message: its relative path, printable, or 'row 17'."""


@dataclass
class Source:
    """What `--data` stands for. `name` is short and fit for folder names."""

    name: str
    train: Part
    val: Part | None = None
    test: Part | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of them: folders that are left out."""
    empty: tuple[str, ...] = ()
    """Parts that have a place and no image in it: nobody is in their way but a report that would be about them."""

    def remarks(self) -> list[str]:
        """What is told at the start of a command: the notes, and whether a few of the files hold more than is read."""
        return [*self.notes, *left_out_remark(self.parts)]

    @property
    def parts(self) -> list[Part]:
        """Those that are there."""
        return list(self.named.values())

    @property
    def named(self) -> dict[str, Part]:
        """Those that are there, by their names."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}


def part_of(folder: str, words: dict[str, str] = PART_WORDS) -> str | None:
    """The part that a folder's name stands for in any case, with or without a year (COCO's train2017)."""
    return words.get(_YEAR.sub("", folder.lower()))


def evenly_spaced(num: int, count: int) -> Labels:
    """At most `count` ascending indices below `num`, the first and the last among them."""
    return np.unique(np.linspace(0, max(0, num - 1), min(num, count)).astype(np.int64))


def glance(parts: Iterable[Part], count: int) -> Iterator[tuple[Part, int]]:
    """Up to `count` evenly spaced samples of each part, for LOOKED_SECONDS (and one sample), however slow the disk."""
    until = time.monotonic() + LOOKED_SECONDS
    for part in parts:
        for index in evenly_spaced(len(part), count).tolist():
            if time.monotonic() > until:
                return
            yield part, index


def left_out_remark(parts: Iterable[Part]) -> list[str]:
    """A line where some of a few files hold pages or frames that nothing reads; by their headers.

    Damaged files are told by whoever reads.
    """
    looked, several, first = 0, 0, ""
    for part, index in glance(parts, LOOKED_AT):
        with contextlib.suppress(BadImage):
            left = part.frames_left_out(index)
            looked += 1
            several += left > 0
            first = first or (f"{part.name(index)} ({left + 1:,}, of which 1 is read)" if left else "")
    if not several:
        return []
    return [
        f"only the first page or frame of a file is read, and {several} of {looked} files that were looked at have "
        f"more, such as {first}: write each as a file of its own to use it (a model of N channels takes N gray pages "
        "as channels); maekit check-data counts them all"
    ]


def printable(name: bytes | str) -> str:
    """A path as one printable line: bytes that are not UTF-8 and control characters become escapes such as \\xff."""
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # half of a character, as JSON may spell it: no name of any file
        raw = str(name).encode("utf-8", "backslashreplace")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes as people order them: by number where all are numbers (10 comes after 9), else by bytes."""
    ordered = sorted(names, key=os.fsencode)
    return sorted(ordered, key=float) if all(map(_NUMBER.fullmatch, ordered)) else ordered


def is_folder(entry: os.DirEntry[AnyStr]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads nowhere, or to itself, is not."""
    try:
        return entry.is_dir()
    except OSError:  # only a missing target is no error to is_dir
        return False


def name_blob(names: list[bytes]) -> tuple[bytes, Labels]:
    """Names as one blob, each with a zero byte behind it, and where each begins; the last place is the blob's end."""
    starts = np.zeros(len(names) + 1, np.int64)
    np.cumsum(np.fromiter((len(name) + 1 for name in names), np.int64, len(names)), out=starts[1:])
    blob = io.BytesIO()  # bytes.join would take 80 bytes more for each name
    blob.writelines(name + b"\0" for name in names)  # no file name holds a zero byte
    return blob.getvalue(), starts


class EncodedPart:
    """Images that are decoded as they are asked for, out of what `data` gives."""

    in_chans: int
    groups: Labels | None = None

    def data(self, index: int) -> bytes | str:
        """The encoded image, or the path of its file; raises BadImage."""
        raise NotImplementedError

    def read(self, index: int, look: Look | None = None) -> Pixels:
        """The image H W C or the window that `look` chooses; raises BadImage."""
        return decode(self.data(index), self.in_chans, look)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels from the header; raises BadImage."""
        return probe_size(self.data(index))

    def frames_left_out(self, index: int) -> int:
        """Pages or frames of the file that `read` does not return; raises BadImage."""
        return frames_left_out(self.data(index), self.in_chans)

    def stored_bytes(self, index: int) -> int:
        """Bytes of the encoded image; raises BadImage, or OSError where its file is gone."""
        data = self.data(index)
        return os.path.getsize(data) if isinstance(data, str) else len(data)


class PlacedPart(EncodedPart):
    """Images that have a path of their own: on disk, or below an archive's."""

    def place(self, index: int) -> str:
        """That path."""
        raise NotImplementedError


class FilePart(PlacedPart):
    """Image files below one root, their names in byte order."""

    def __init__(
        self,
        root: bytes,
        names: Iterable[bytes],
        in_chans: int,
        *,
        prefix: bytes = b"",
        labels: Labels | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        """`names` are relative to `root` and sorted; `prefix` comes before them in messages only."""
        names = names if isinstance(names, list) else list(names)
        self.root = root
        self.prefix = prefix
        self.in_chans = in_chans
        self.labels = labels
        self.class_names = class_names
        self._blob, self._starts = name_blob(names)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _relative(self, index: int) -> bytes:
        return self._blob[self._starts[index] : self._starts[index + 1] - 1]

    def path(self, index: int) -> str:
        """The file's path, ready to open."""
        return os.fsdecode(os.path.join(self.root, self._relative(index)))

    def data(self, index: int) -> str:
        """The file's path."""
        return self.path(index)

    def place(self, index: int) -> str:
        """The file's path."""
        return self.path(index)

    def name(self, index: int) -> str:
        """The path relative to the folder that `--data` names, with slashes, on one printable line."""
        return printable(self.prefix + self._relative(index))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all names and the sizes of at most 1,000 evenly spaced files."""
        digest = hashlib.sha256(self._blob)
        for index in evenly_spaced(len(self), FINGERPRINT_SAMPLES):
            try:
                size = os.stat(self.path(int(index))).st_size
            except (OSError, ValueError):
                size = -1
            digest.update(size.to_bytes(8, "little", signed=True))
        return digest.hexdigest()


def loose_files(paths: Iterable[str], in_chans: int) -> FilePart:
    """Image files that were named one by one, in their order."""
    return FilePart(b"", [os.fsencode(os.path.expanduser(path)) for path in paths], in_chans)


class ArrayPart:
    """Decoded images in memory: `images` N H W C uint8, whose C is 1 or `in_chans` (or 3 where `in_chans` is 1)."""

    groups: Labels | None = None

    def __init__(
        self, images_NHWC: npt.NDArray[np.uint8], labels: Labels | None, class_names: list[str] | None, in_chans: int
    ) -> None:
        self.images = images_NHWC
        self.labels = labels
        self.class_names = class_names
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, look: Look | None = None) -> Pixels:
        """The image H W C, or a window of it, as an array of its own; raises BadImage where the channels do not fit."""
        image = self.images[index]
        image = fit_channels(image if look is None else look(*image.shape[:2]).cut(image), self.in_chans)
        return image.copy() if np.shares_memory(image, self.images) else image

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels."""
        if not 0 <= index < len(self):
            raise BadImage(f"no row {index}")
        return self.images.shape[1], self.images.shape[2]

    def frames_left_out(self, index: int) -> int:
        """None: an array is one image."""
        return 0

    def name(self, index: int) -> str:
        """'row 17'."""
        return f"row {index}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, labels, and at most 1,000 evenly spaced images."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(b"" if self.labels is None else self.labels.astype("<i8").tobytes())
        digest.update(self.images[evenly_spaced(len(self), FINGERPRINT_SAMPLES)].tobytes())
        return digest.hexdigest()
