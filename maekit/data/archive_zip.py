"""The members of a zip, listed by Python's zipfile and read at their places, from any process or thread.

PKWARE's APPNOTE.TXT 6.3.10 has the local header (4.3.7), the end record (4.3.16) and the methods (4.4.5).
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator

from maekit.data.archive_members import BrokenArchive, Kind, Member, Method, OpenFile
from maekit.data.images import BadImage

_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_METHODS = {zipfile.ZIP_STORED: Method.STORED, zipfile.ZIP_DEFLATED: Method.DEFLATED}
_NAMES = {
    1: "shrink", 6: "implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd",
    99: "AES encryption",
}  # fmt: skip
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_UTF8 = 1 << 11
_DOS, _FROM_UNIX = 0, (3, 19)
_MOST = 1 << 62
_SLACK = 256
"""Bytes of a local header's extra fields that are read together with the data."""


def members(file: OpenFile) -> Iterator[Member]:
    """Every member in the order of the directory; names as they are there, but that a Windows program's backslashes
    are slashes.

    Raises:
        BrokenArchive: no zip, cut short, damaged, or split into several files.
        OSError: the file cannot be read.
    """
    _refuse_pieces(file)
    try:
        with os.fdopen(os.dup(file.descriptor), "rb") as handle, zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise BrokenArchive(_why(file, error)) from None
    for entry in entries:
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
        if entry.create_system == _DOS and b"/" not in name:
            name = name.replace(b"\\", b"/")
        how, why = _METHODS.get(entry.compress_type, Method.REFUSED), ""
        if how is Method.REFUSED:
            why = f"compressed by {_NAMES.get(entry.compress_type, f'method {entry.compress_type}')}"
        if entry.flag_bits & _ENCRYPTED or entry.compress_type == 99:
            how, why = Method.REFUSED, "encrypted"
        if max(entry.file_size, entry.compress_size, entry.header_offset) >= _MOST:
            raise BrokenArchive("damaged: a member of more than 4 EB")
        kind = _kind(name, entry.external_attr >> 16 if entry.create_system in _FROM_UNIX else 0)
        yield Member(name, kind, how, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, why)


def _kind(name: bytes, mode: int) -> Kind:
    if name.endswith(b"/") or stat.S_ISDIR(mode):
        return Kind.FOLDER
    if stat.S_ISLNK(mode):
        return Kind.LINK
    return Kind.FILE if stat.S_IFMT(mode) in (0, stat.S_IFREG) else Kind.OTHER


def _refuse_pieces(file: OpenFile) -> None:
    """Raise BrokenArchive for one piece of several, which zipfile would read as if it were the whole."""
    tail = file.read(max(0, file.size - _END.size - 0xFFFF), _END.size + 0xFFFF)
    found = tail.rfind(b"PK\5\6")
    if found >= 0 and len(tail) - found >= _END.size:
        _, disk, first_disk, on_disk, count, *_ = _END.unpack_from(tail, found)
        if {disk, first_disk} - {0, 0xFFFF} or on_disk != count:
            raise BrokenArchive(
                "one piece of a zip that was split: put the pieces together (zip -s 0 PIECES.zip --out whole.zip)"
            )


def _why(file: OpenFile, error: Exception) -> str:
    if str(error) != "File is not a zip file":
        return f"damaged: {' '.join(str(error).split())[:100]}"
    if file.read(0, 4) in (b"PK\3\4", b"PK\7\x08"):
        return "cut short: its directory, which stands at the end, is missing; fetch it again"
    return "no zip archive"


def read(file: OpenFile, start: int, stored: int, size: int, check: int, name_length: int, deflated: bool) -> bytes:
    """A member's bytes by what the directory says of it.

    Raises:
        BadImage: it is not there, or is not what the directory says.
        OSError: the file cannot be read.
    """
    piece = file.read(start, _LOCAL.size + name_length + _SLACK + stored)
    if len(piece) < _LOCAL.size or not piece.startswith(b"PK\3\4"):
        raise BadImage("not where the archive's directory says: it is damaged, or has changed")
    *_, name_length, extra_length = _LOCAL.unpack_from(piece)
    begin = _LOCAL.size + name_length + extra_length
    if begin + stored > len(piece):
        piece, begin = file.read(start + begin, stored), 0
    data = piece[begin : begin + stored]
    if len(data) < stored:
        raise BadImage("cut short within the archive")
    if deflated:
        data = _inflated(data, size)
    elif stored != size:
        raise BadImage(f"{stored:,} bytes where the archive's directory says {size:,}")
    if zlib.crc32(data) != check:
        raise BadImage("its checksum is another: the archive is damaged, or has changed")
    return data


def _inflated(data: bytes, size: int) -> bytes:
    """Never more than the directory says, whatever the compressed bytes hold."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        whole = inflate.decompress(data, max(1, size))
        more = b"" if inflate.eof else inflate.decompress(inflate.unconsumed_tail, 1)
    except zlib.error as error:
        raise BadImage(f"its compressed bytes are damaged ({error})"[:120]) from None
    if more or len(whole) > size:
        raise BadImage(f"more than the {size:,} bytes that the archive's directory says (a decompression bomb?)")
    if len(whole) < size:
        raise BadImage(f"{len(whole):,} bytes where the archive's directory says {size:,}")
    return whole
