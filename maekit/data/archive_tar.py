"""The members of a tar: ustar, GNU's and pax headers (POSIX.1-2001, pax; GNU tar's manual, "Basic Tar Format").

A tar has no index: each header says how far the next one is away, so that all headers are read once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from maekit.data.archive_members import BrokenArchive, Kind, Member, Method, OpenFile, Window

BLOCK = 512
RECORD = 20 * BLOCK
"""A multiple of this is what tars are filled up to."""
_LONGEST_RECORDS = 1 << 20
"""Bytes of pax records or of a long name, in front of a member."""
_KINDS = {
    b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"5": Kind.FOLDER, b"1": Kind.LINK, b"2": Kind.LINK,
}  # fmt: skip
_NO_DATA = b"123456"
"""Links, devices, folders and pipes: whatever their size says, the next header follows at once."""
_ADLER = 65521
_WINDOW = 8192


def members(file: OpenFile, window: Window | None = None) -> Iterator[Member]:
    """Every member in the order of the file, names as they are there.

    window: what the headers are read through, for whoever reads small members on the way.

    Raises:
        BrokenArchive: no tar, cut short, or damaged.
        OSError: the file cannot be read.
    """
    window = window or Window(file, _WINDOW)
    at = 0
    long_name: bytes | None = None
    records: dict[bytes, bytes] = {}
    last = b""
    while True:
        block = window.read(at, BLOCK)
        if len(block) < BLOCK:
            if at and at == file.size:  # without the two empty blocks that end most
                return
            raise BrokenArchive(_ends(last, at + BLOCK - file.size) if at else "no tar archive: shorter than a header")
        if not block[0] and not any(block):
            window.end = at
            return
        if not _adds_up(block):
            where = f"damaged at byte {at:,}, behind {shown(last)}" if at else "no tar archive"
            raise BrokenArchive(where)
        form, size, start = block[156:157], _number(block[124:136]), at + BLOCK
        if form in (b"x", b"X", b"L", b"K", b"g"):
            if size > _LONGEST_RECORDS:
                raise BrokenArchive(f"damaged at byte {at:,}: {size:,} bytes of names in front of a member")
            data = window.read(start, size)
            if len(data) < size:
                raise BrokenArchive(_ends(last, start + size - file.size))
            if form == b"L":
                long_name = data.split(b"\0", 1)[0]
            elif form in (b"x", b"X"):
                records = _records(data, at)
            at = start + _padded(size)
            continue
        name, kind = long_name or _name(block), _KINDS.get(form, Kind.OTHER)
        if records:
            name = records.get(b"path") or name
            size = _number(records[b"size"], 10) if b"size" in records else size
            kind = Kind.OTHER if any(key.startswith(b"GNU.sparse") for key in records) else kind
        if kind is Kind.FILE and name.endswith(b"/"):  # as tar's seventh edition wrote folders
            kind = Kind.FOLDER
        if form == b"S" and block[482]:
            start = _behind_holes(window, start)
        length = 0 if form in _NO_DATA else size
        if start + length > file.size:
            raise BrokenArchive(_ends(name, start + length - file.size))
        yield Member(name, kind, Method.TAR, start, length, length, zlib.crc32(block))
        at, last = start + _padded(length), name
        long_name, records = None, {}


def shown(name: bytes) -> str:
    """A name in a message about damage: short, on one line, whatever it holds."""
    return repr(name[:100].decode("utf-8", "backslashreplace")) if name else "its begin"


def _ends(name: bytes, missing: int) -> str:
    return f"cut short within {shown(name)}: at least {missing:,} bytes are missing; fetch it again"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _adds_up(block: bytes) -> bool:
    """Whether the sum of the block's bytes is the one that it states, its own eight bytes counted as spaces."""
    try:
        stated = int(block[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    # Adler-32's lower half is one more than the sum, modulo 65521: a tenth of the time of adding up in Python.
    others = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156])
    if (others + 8 * 32 - stated) % _ADLER == 0 and stated < 256 * BLOCK:
        return True
    plain = block[:148] + b" " * 8 + block[156:]
    return sum(plain) - 256 * sum(byte > 127 for byte in plain) == stated  # some old tars added signed bytes


def _number(field: bytes, base: int = 8) -> int:
    """A number in a header's field: digits, or GNU's binary, of which 0xFF would begin one below 0.

    Raises:
        BrokenArchive: neither of them.
    """
    try:
        if field[:1] == b"\x80":
            number = int.from_bytes(field[1:], "big")
        else:
            number = int(field.split(b"\0", 1)[0].strip() or b"0", base)
    except ValueError:
        number = -1
    if number < 0:
        raise BrokenArchive(f"damaged: a size that is no number ({field[:24]!r})")
    return number


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes, at: int) -> dict[bytes, bytes]:
    """A pax header's records: each is its own length, a space, keyword=value and a newline.

    Raises:
        BrokenArchive: lengths that do not fit.
    """
    found = {}
    while data.strip(b"\0"):
        digits, space, rest = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not space or not len(digits) + 1 < length <= len(data) or data[length - 1 : length] != b"\n":
            raise BrokenArchive(f"damaged at byte {at:,}: records that cannot be read")
        keyword, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        found[keyword] = value
        data = data[length:]
    return found


def _behind_holes(window: Window, start: int) -> int:
    """Where the data of an old sparse file begin: further blocks of its map come before them."""
    while True:
        block = window.read(start, BLOCK)
        start += BLOCK
        if len(block) < BLOCK or not block[504]:
            return start
