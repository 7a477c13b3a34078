"""What the names of archives tell: which are read, which are not and what to do with these, and paths into them."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from maekit.config import UserError

SUFFIXES = (".tar", ".zip")
UNPACK = {
    "gz": "gunzip --keep", "tgz": "gunzip --keep", "xz": "unxz --keep", "txz": "unxz --keep", "bz2": "bunzip2 --keep",
    "tbz": "bunzip2 --keep", "tbz2": "bunzip2 --keep", "zst": "unzstd", "tzst": "unzstd",
}  # fmt: skip
"""Last part of a compressed tar's name -> the command that makes a plain one of it."""
_PIECE = re.compile(r"(?<=\.zip|\.tar)\.\d{2,3}$|(?<=\.7z)\.\d{2,3}$|\.z\d\d$", re.IGNORECASE)
"""What follows the name in a piece of a split archive: x.zip.001, x.z01."""


class Archive(NamedTuple):
    """An archive and what to call it."""

    path: str
    shown: str


def refuse_form(archive: Archive) -> None:
    """Raises UserError for archives by whose names one can tell that no member can be read by itself."""
    shown, name = archive.shown, os.path.basename(archive.path).lower()
    last = name.rpartition(".")[2]
    if _PIECE.search(name):
        whole = _PIECE.sub("", shown)
        command = f"cat {whole}.* > {whole}" if last.isdigit() else f"zip -s 0 {whole}.zip --out whole.zip"
        raise UserError(f"--data {shown}: one piece of an archive that was split; put the pieces together: {command}")
    if is_compressed(name):
        raise UserError(_compressed(shown, UNPACK.get(last, "uncompress")))
    if last in ("7z", "rar"):
        command = f"7z x {shown} -oDIR" if last == "7z" else f"unrar x {shown} DIR/"
        raise UserError(
            f"--data {shown}: a .{last} archive, which is not read (it may have to be unpacked from the begin for any "
            f"file of it): {command}, then --data DIR"
        )


def is_compressed(name: str) -> bool:
    """Whether a file's name is that of a compressed tar."""
    stem, _, last = name.lower().rpartition(".")
    return (stem.endswith(".tar") and (last in UNPACK or last in ("lz4", "lz", "lzma", "z"))) or (
        last in UNPACK and last.startswith("t")
    )


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive, also of one that is not read."""
    return name.lower().endswith((*SUFFIXES, ".7z", ".rar")) or is_compressed(name) or bool(_PIECE.search(name))


def is_read(name: str) -> bool:
    """Whether a file's name is that of an archive that is read."""
    return name.lower().endswith(SUFFIXES)


def archive_above(path: str) -> str | None:
    """The archive that a path names or leads into, as photos.zip/train does; None for all other paths."""
    above = path
    while above and not os.path.isfile(above):
        parent = os.path.dirname(above)
        above = parent if parent != above else ""
    return above if above and is_archive(above) else None


def _compressed(shown: str, command: str) -> str:
    return (
        f"--data {shown}: a compressed tar, of which no image can be read before all that stands in front of it is "
        f"unpacked: {command} {shown} makes a plain .tar of it, which is read; or unpack it (tar xf {shown} -C DIR) "
        "and give --data DIR"
    )
