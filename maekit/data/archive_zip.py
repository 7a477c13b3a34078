"""The members of a zip by its central directory (PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5), zip64 included."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator

from maekit.data.archive_members import BrokenArchive, Kind, Member, Method, OpenFile, Window
from maekit.data.images import BadImage

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_METHODS = {0: Method.STORED, 8: Method.DEFLATED}
_NAMES = {
    1: "shrink", 6: "implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd",
    99: "AES encryption",
}  # fmt: skip
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_FROM_UNIX = (3, 19)
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_WINDOW = 1 << 20
_SLACK = 256
"""Bytes of a local header's extra fields that are read together with the data."""


def members(file: OpenFile) -> Iterator[Member]:
    """Every member in the order of the directory; names as they are there, but that a Windows program's backslashes
    are slashes.

    Raises:
        BrokenArchive: no zip, cut short, damaged, or split into several files.
        OSError: the file cannot be read.
    """
    at, end, shift = _directory(file)
    window = Window(file, _WINDOW)
    while at < end:
        entry = window.read(at, _ENTRY.size)
        if len(entry) < _ENTRY.size or not entry.startswith(b"PK\1\2"):
            raise BrokenArchive(f"damaged: its directory breaks off at byte {at:,}")
        (_, made_by, _, flags, method, _, _, check, stored, size, name_length, extra_length, comment_length, _, _,
         mode, start) = _ENTRY.unpack(entry)  # fmt: skip
        rest = window.read(at + _ENTRY.size, name_length + extra_length)
        name = rest[:name_length]
        if _FULL32 in (stored, size, start):
            size, stored, start = _wide(rest[name_length:], size, stored, start)
        system = made_by >> 8
        if system == 0 and b"/" not in name:
            name = name.replace(b"\\", b"/")
        how, why = _METHODS.get(method, Method.REFUSED), ""
        if how is Method.REFUSED:
            why = f"compressed by {_NAMES.get(method, f'method {method}')}"
        if flags & _ENCRYPTED or method == 99:
            how, why = Method.REFUSED, "encrypted"
        yield Member(name, _kind(name, mode >> 16 if system in _FROM_UNIX else 0), how, start + shift, stored, size,
                     check, why)  # fmt: skip
        at += _ENTRY.size + name_length + extra_length + comment_length


def _kind(name: bytes, mode: int) -> Kind:
    if name.endswith(b"/") or stat.S_ISDIR(mode):
        return Kind.FOLDER
    if stat.S_ISLNK(mode):
        return Kind.LINK
    return Kind.FILE if stat.S_IFMT(mode) in (0, stat.S_IFREG) else Kind.OTHER


def _directory(file: OpenFile) -> tuple[int, int, int]:
    """Where the directory begins and ends, and by how much all places are shifted by what stands before the zip."""
    tail_start = max(0, file.size - _END.size - _FULL16)
    tail = file.read(tail_start, file.size - tail_start)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        begins = file.read(0, 4)
        if begins in (b"PK\3\4", b"PK\7\x08"):
            raise BrokenArchive("cut short: its directory, which stands at the end, is missing; fetch it again")
        raise BrokenArchive("no zip archive")
    _, disk, first_disk, on_disk, count, length, start, _ = _END.unpack_from(tail, found)
    end = tail_start + found
    locator = file.read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        _, _, place, disks = _LOCATOR.unpack(locator)
        record, end = _end64(file, (end - _LOCATOR.size - _END64.size, place))
        _, _, _, _, disk, first_disk, on_disk, count, length, start = _END64.unpack(record)
        disk += disks > 1
    if disk or first_disk or on_disk != count:
        raise BrokenArchive(
            "one piece of a zip that was split: put the pieces together (zip -s 0 PIECES.zip --out whole.zip)"
        )
    shift = end - length - start
    if shift < 0:
        raise BrokenArchive("damaged: its directory does not fit into the file")
    return end - length, end, shift


def _end64(file: OpenFile, places: tuple[int, int]) -> tuple[bytes, int]:
    """The end record of a zip64 and where it begins: it stands before its locator, or where that says."""
    for place in places:
        record = file.read(place, _END64.size) if 0 <= place < file.size else b""
        if len(record) == _END64.size and record.startswith(b"PK\6\6"):
            return record, place
    raise BrokenArchive("damaged: the end of its directory (zip64) is missing")


def _wide(extra: bytes, size: int, stored: int, start: int) -> tuple[int, int, int]:
    """Size, stored size and place, where those that do not fit into 32 bits stand in an extra field."""
    numbers = [size, stored, start]
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
            for place, number in enumerate(numbers):
                if number == _FULL32 and wide:
                    numbers[place] = wide.pop(0)
            break
        extra = extra[4 + length :]
    if max(numbers) >= 1 << 62:
        raise BrokenArchive("damaged: a member of more than 4 EB")
    return numbers[0], numbers[1], numbers[2]


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
