"""What the readers of tar and zip share: how a member is told, how its name becomes a path, and reading at a place.

Headers of tar are read here and not by Python's tarfile, which takes 4.4 times as long (41 microseconds a member):
minutes, at the start of every command, for WebDataset's shards of a million images with two or three members each.
"""

from __future__ import annotations

import os
import stat
import threading
from enum import IntEnum
from typing import NamedTuple

LONGEST_NAME = 4096
"""Bytes of a member's name, as of a path on Linux."""
DEEPEST = 64
"""Folders within each other: names of ten thousand slashes would take memory and show nobody anything."""
_HIDDEN = (b"__MACOSX", b"lost+found")


class BrokenArchive(Exception):
    """An archive whose index cannot be read; the message is what is wrong, to be put behind its name."""


class Kind(IntEnum):
    """What a member is; images are FILE."""

    FILE = 0
    FOLDER = 1
    LINK = 2
    OTHER = 3
    """A device, a pipe, or a file with holes (sparse)."""


class Method(IntEnum):
    """How a member's bytes lie in the archive."""

    TAR = 0
    """As they are, behind a block of 512 bytes that tells of them."""
    STORED = 1
    """As they are, behind a local header of a zip."""
    DEFLATED = 2
    REFUSED = 3
    """Encrypted, or compressed in another way."""


class Member(NamedTuple):
    """One member, as the archive's index tells of it: nothing of it is to be believed."""

    name: bytes
    kind: Kind
    method: Method
    start: int
    """Where its bytes begin (tar), or its local header (zip)."""
    stored: int
    """Bytes in the archive."""
    size: int
    """Bytes of the file."""
    check: int
    """CRC-32 of its header block (tar) or of its bytes (zip): tells whether the archive is still the same."""
    why: str = ""
    """Why it is refused."""


def path_of(name: bytes) -> bytes | None:
    """Where unpacking would put a member, below the folder that it is unpacked into; b"" for that folder itself.

    None for what leads out of it, cannot be a path, or would be hidden there: names that begin with a dot, and
    __MACOSX/, where macOS keeps what no other system reads. A slash in front is dropped, as tar and unzip do.
    """
    if b"//" not in name and b"/." not in name and name[:1] not in b"./_" and b"lost+found" not in name:
        components = None  # most names: nothing has to be taken apart
        path = name.rstrip(b"/")
    else:
        components = [one for one in name.split(b"/") if one not in (b"", b".")]
        if any(one.startswith(b".") or one in _HIDDEN for one in components):
            return None
        path = b"/".join(components)
    if b"\0" in path or len(path) > LONGEST_NAME or path.count(b"/") >= DEEPEST:
        return None
    return path


def is_unsafe(name: bytes) -> bool:
    """Whether a name that is no path was one that leads elsewhere or cannot be one, and not only hidden."""
    components = name.split(b"/")
    return b".." in components or b"\0" in name or len(name) > LONGEST_NAME or len(components) > DEEPEST


_one_at_a_time = threading.Lock()


class OpenFile:
    """A file that is open for reading at any place, from any thread, and closed when nobody holds it any more.

    Raises:
        OSError: cannot be opened, or is no regular file.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        # O_NONBLOCK: opening a pipe would wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(path, flags)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(None, "not a regular file")
        self.size = status.st_size

    def read(self, start: int, length: int) -> bytes:
        """So many bytes from a place, fewer at the end of the file; raises OSError."""
        if hasattr(os, "pread"):
            return os.pread(self.descriptor, length, start)
        with _one_at_a_time:  # Windows, where all threads share the file's position
            os.lseek(self.descriptor, start, os.SEEK_SET)
            return os.read(self.descriptor, length)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Window:
    """Reading an index from front to back: the file in pieces, of which the last one is kept."""

    def __init__(self, file: OpenFile, length: int) -> None:
        self.file, self.length = file, length
        self.end = 0
        """Where the empty block was met that ends a tar; 0: nowhere."""
        self._start, self._piece = 0, b""

    def read(self, start: int, length: int) -> bytes:
        """So many bytes from a place, fewer at the end of the file; raises OSError."""
        at = start - self._start
        if at < 0 or at + length > len(self._piece):
            self._start, at = start, 0
            self._piece = self.file.read(start, max(length, self.length))
        return self._piece[at : at + length]
