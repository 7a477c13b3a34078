"""Archives from strangers: nothing is written, no link is followed, nothing is believed before it is checked."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from archive_files import add, make_tar, make_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import listed, photograph, png, problem
from test_fuzz import SCRATCH, _scratch, bounded, refused, said
from test_untrusted import PROMISE

from maekit import cli
from maekit.config import UserError
from maekit.data import archives
from maekit.data.images import BadImage
from maekit.data.sources import open_source

__all__ = ["PROMISE", "_scratch"]


def why_bad(part: Any, index: int) -> str:
    with pytest.raises(BadImage) as caught:
        part.read(index)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_that_lead_elsewhere_links_and_devices(tmp_path: Path) -> None:
    """Left out and told; an absolute path is one in the archive; nothing outside is read, nothing is written."""
    (tmp_path / "secret.png").write_bytes(png(99))
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", png(1))
        add(tar, "../../x.png", png(2))
        add(tar, f"{tmp_path}/secret.png", png(3))
        add(tar, "folder/../../y.png", png(4))
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname=f"{tmp_path}/secret.png")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "zero.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(tar, "sparse.png", png(5), type=tarfile.GNUTYPE_SPARSE)
        add(tar, "d/" * 70 + "deep.png", png(6))
        add(tar, "n" * 5000 + ".png", png(7))
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(path))
    inside = f"{tmp_path}/secret.png"[1:]
    assert listed(source.train) == ["a.png", inside]
    assert int(source.train.read(1)[0, 0, 0]) == 3
    (note,) = source.notes
    assert "4 names that lead out of the archive or are no paths, such as ../../x.png" in note
    assert "2 links, which are not followed (tar -h --hard-dereference packs files in their" in note
    assert "2 devices, pipes or sparse files, such as zero.png" in note
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_a_zip_and_links_only(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        link = zipfile.ZipInfo("b.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    source = open_source(str(tmp_path / "x.zip"))
    assert listed(source.train) == ["a.png"]
    assert "1 links, which are not followed" in source.notes[0]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "c.png", type=tarfile.SYMTYPE, linkname="objects/1")
    assert "no image among 1 files" in problem(tmp_path / "x.tar")
    assert "; left out: 1 links, which are not followed (tar -h " in problem(tmp_path / "x.tar")


def test_zip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is declared is never exceeded, and what no image has is not even begun."""
    zeros = make_zip(tmp_path / "zeros.zip", [("a.png", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archives, "MAX_PIXELS", 1 << 19)
    assert "(a decompression bomb?)" in why_bad(open_source(str(zeros)).train, 0)
    monkeypatch.setattr(archives, "MOST_BYTES", 1 << 16)
    plain = make_tar(tmp_path / "plain.tar", [("a.png", bytes(1 << 20))])
    assert "(a decompression bomb?)" in why_bad(open_source(str(plain)).train, 0)
    monkeypatch.undo()
    raw = zeros.read_bytes()
    place = raw.rindex((1 << 20).to_bytes(4, "little"))  # in the directory, which counts
    zeros.write_bytes(raw[:place] + (1000).to_bytes(4, "little") + raw[place + 4 :])
    assert "more than the 1,000 bytes that the archive's directory says" in why_bad(open_source(str(zeros)).train, 0)
    zeros.write_bytes(raw[:place] + (1 << 21).to_bytes(4, "little") + raw[place + 4 :])
    assert why_bad(open_source(str(zeros)).train, 0).startswith("1,048,576 bytes where")


def test_damage_within_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    """By its checksum, also where a decoder would see nothing; the others are read."""
    raw = (path := make_zip(tmp_path / "x.zip", [("a.png", png(1)), ("b.png", png(2))])).read_bytes()
    place = raw.index(png(1)) + 40
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    part = open_source(str(path)).train
    assert "its checksum is another" in why_bad(part, 0)
    assert int(part.read(1)[0, 0, 0]) == 2
    for start in (2**31, 2**32 - 1):  # places that are not there
        entry = raw.index(b"PK\1\2")
        path.write_bytes(raw[: entry + 42] + struct.pack("<L", start) + raw[entry + 46 :])
        assert "not where the archive's directory says" in why_bad(open_source(str(path)).train, 0)


def test_archives_that_change_while_they_are_read(tmp_path: Path) -> None:
    """Written over, cut, or gone: a bad image that says so, never another image's pixels."""
    files = [("a.png", png(1)), ("b.png", png(2))]
    tar, packed = make_tar(tmp_path / "x.tar", files), make_zip(tmp_path / "x.zip", files)
    parts = [open_source(str(path)).train for path in (tar, packed)]
    make_tar(tar, [("c.png", png(7)), ("d.png", png(8))])
    assert "the archive has changed since it was listed" in why_bad(parts[0], 1)
    tar.write_bytes(tar.read_bytes()[:1100])
    assert "cut short within the archive" in why_bad(parts[0], 1)
    assert int(parts[1].read(1)[0, 0, 0]) == 2
    packed.write_bytes(make_zip(tmp_path / "y.zip", [("a.png", png(3)), ("b.png", png(4))]).read_bytes())
    assert "checksum" in why_bad(parts[1], 1)
    fresh = open_source(str(packed)).train
    packed.unlink()
    assert why_bad(fresh, 0) == "no such file or directory"


def raw_header(name: bytes, size: bytes, form: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, form
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_headers_that_libraries_seldom_write(tmp_path: Path) -> None:
    """A link that states a size, a size in a record of pax, a map of holes in further blocks, signed sums: each time
    the next member is where it should be.
    """
    data = png(7)
    digits, padded = b"%011o\0" % len(data), data + bytes(-len(data) % 512)
    last = raw_header(b"last.png", digits) + padded
    record = b"%d size=%d\n"
    record = record % (len(record % (10, len(data))), len(data))
    holes = bytearray(raw_header(b"holes.bin", digits, b"S"))
    holes[482] = 1
    holes[148:156] = b" " * 8
    holes[148:156] = b"%06o\0 " % sum(holes)
    signed = bytearray(raw_header(b"\xff.bin", digits))
    signed[148:156] = b" " * 8
    signed[148:156] = b"%06o\0 " % (sum(signed) - 256)
    before = {
        "a link with a size": raw_header(b"hard.png", digits, b"1"),
        "size in a record": raw_header(b"x", b"%011o\0" % len(record), b"x")
        + record
        + bytes(512 - len(record))
        + raw_header(b"a.bin", b"0\0")
        + padded,
        "holes": bytes(holes) + bytes(504) + b"\1" + bytes(7) + bytes(512) + padded,
        "signed sum": bytes(signed) + padded,
    }
    for what, blocks in before.items():
        (tmp_path / "x.tar").write_bytes(blocks + last + bytes(1024))
        part = open_source(str(tmp_path / "x.tar")).train
        assert (listed(part), int(part.read(0)[0, 0, 0])) == (["last.png"], 7), what


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w", format=tarfile.PAX_FORMAT) as _tar:
    for _name in ("a/1.png", "a/\u00e4.png", "b/" + "x" * 120 + ".png", "b/3.cls"):
        add(_tar, _name, b"1" if _name.endswith(".cls") else png(3))
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as _zip:
    for _name in ("a/1.png", "b/2.png", "b/2.json"):
        _zip.writestr(_name, png(3) if _name.endswith("png") else '{"label": 1}')
WHOLE = TAR.getvalue()

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.tar", b"", "an empty file"),
    "empty zip": ("x.zip", b"", "an empty file"),
    "a web page": ("x.zip", b"<!DOCTYPE html><html>", "no zip archive; it begins with <!DOCTYPE html><html> as a page"),
    "short": ("x.tar", b"ab", "no tar archive: shorter than a header; it begins with ab"),
    "noise": ("x.tar", bytes(range(256)) * 8, "no tar archive; it begins with"),
    "compressed by another name": ("x.tar", b"\x1f\x8b" + bytes(600), "gunzip --keep after calling it .tar.gz"),
    "cut in a header": ("x.tar", WHOLE[:1700], "cut short within"),
    "cut in a member": ("x.tar", WHOLE[:530], "cut short within 'a/1.png'"),
    "cut behind a member": ("x.tar", WHOLE[:700], "cut short within 'a/1.png'"),
    "damaged header": ("x.tar", WHOLE[:1030] + b"!!" + WHOLE[1032:], "damaged at byte 1,024, behind 'a/1.png'"),
    "cut zip": ("x.zip", ZIP.getvalue()[:-40], "its directory, which stands at the end, is missing; fetch it again"),
    "damaged directory": ("x.zip", ZIP.getvalue().replace(b"PK\1\2", b"PK\1\3"), "damaged: Bad magic number"),
    "size beyond the end": ("x.tar", raw_header(b"a.png", b"77777777777\0"), "at least 8,589,934,"),
    "endless size": ("x.tar", raw_header(b"a.png", b"\x80" + b"\xff" * 11), "cut short within 'a.png'"),
    "size below 0": ("x.tar", raw_header(b"a.png", b"\xff" * 12), "a size that is no number"),
    "size of letters": ("x.tar", raw_header(b"a.png", b"12x\0"), "a size that is no number"),
    "long names without end": ("x.tar", raw_header(b"a", b"77777777777\0", b"L"), "of names in front of a member"),
    "records that lie": ("x.tar", raw_header(b"a", b"00000000020\0", b"x") + b"99 path=x" + bytes(503), "records that"),
    "split": ("x.zip", ZIP.getvalue()[:-18] + b"\1\0" + ZIP.getvalue()[-16:], "one piece of a zip that was split"),
    "nothing in it": ("x.tar", bytes(1024), "no image among 0 files"),
    "archives in it": ("x.tar", raw_header(b"n01440764.tar", b"0\0"), "it holds n01440764.tar, which is not looked"),
    "Parquet in it": ("x.tar", raw_header(b"data/train.parquet", b"0\0"), "it holds data/train.parquet, which is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    file, data, words = BROKEN[name]
    (tmp_path / file).write_bytes(data)
    with bounded(), pytest.raises(UserError) as caught:
        open_source(str(tmp_path / file))
    refused(caught.value)
    (line,) = caught.value.problems
    assert words in line and line.startswith(f"--data {tmp_path}")


def test_every_broken_shard_is_named_at_once(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"train-{number}.tar").write_bytes(WHOLE if number == 3 else WHOLE[:1100])
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert len(caught.value.problems) == 6
    assert "train-0.tar: cut short within" in caught.value.problems[0]
    assert caught.value.problems[-1] == "and 2 more archives that cannot be read"


@pytest.mark.parametrize(
    ("name", "said_of_it"),
    [
        ("x.tar.gz", "a compressed tar, .*: gunzip --keep .*x.tar.gz makes a plain .tar of it"),
        ("x.tgz", "gunzip --keep .*x.tgz"),
        ("X.TAR.XZ", "unxz --keep"),
        ("x.tar.bz2", "bunzip2 --keep"),
        ("x.tar.zst", "unzstd .*x.tar.zst makes"),
        ("x.7z", "a .7z archive, .*: 7z x .*x.7z -oDIR, then --data DIR"),
        ("x.rar", "unrar x"),
        ("x.zip.001", "one piece of an archive that was split; .*: cat .*x.zip.\\* > .*x.zip"),
        ("x.z01", "zip -s 0 .*x.zip --out whole.zip"),
    ],
)  # fmt: skip
def test_forms_that_are_not_read_say_what_helps(name: str, said_of_it: str, tmp_path: Path) -> None:
    """As a file and as all that a folder holds."""
    (tmp_path / name).write_bytes(b"x")
    for spec in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=said_of_it):
            open_source(str(spec))


@pytest.mark.parametrize(
    ("change", "said_of_it"),
    [
        ({6: b"\1\0", 8: b"\1\0"}, "a.png is encrypted; .* Unpack it: unzip .*x.zip -d DIR, then --data DIR"),
        ({10: b"\x09\0"}, "a.png is compressed by Deflate64; .*: 7z x"),
        ({10: b"\x63\0"}, "encrypted"),
        ({10: b"\xfe\0"}, "compressed by method 254"),
    ],
)
def test_encrypted_zips_and_other_methods(change: dict[int, bytes], said_of_it: str, tmp_path: Path) -> None:
    raw = bytearray(make_zip(tmp_path / "x.zip", [("a.png", png())]).read_bytes())
    entry = raw.index(b"PK\1\2")
    for place, data in change.items():
        raw[entry + place : entry + place + len(data)] = data
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(UserError, match=said_of_it):
        open_source(str(tmp_path / "x.zip"))


@pytest.mark.skipif(shutil.which("zip") is None, reason="Info-ZIP's zip is not here")
def test_a_zip_that_zip_encrypted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    subprocess.run(["zip", "-qP", "word", "x.zip", "a.png"], cwd=tmp_path, check=True)
    assert "a.png is encrypted" in problem(tmp_path / "x.zip")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_by_the_name_of_an_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with bounded():
        assert "regular file" in problem(tmp_path / "x.tar")
        assert "no image among 1 files" in problem(tmp_path)


def test_bad_members_are_named_by_archive_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check-data names them as quarantine.jsonl does, in the order of ids; its exit code says that there are some."""
    picture = io.BytesIO()
    photograph(1).save(picture, "JPEG")
    make_tar(tmp_path / "train-0000.tar", [("a/b.jpg", picture.getvalue()[:400]), ("a/c.jpg", picture.getvalue())])
    make_tar(tmp_path / "train-0001.tar", [("a/b.jpg", b""), ("\x1b[2J.png", b"not an image")])
    assert cli.main(["check-data", "--data", str(tmp_path), "--workers", "0"]) == 1
    shown = capsys.readouterr().out
    for line in (
        "cannot be read: train-0000.tar: a/b.jpg: truncated JPEG",
        "cannot be read: train-0001.tar: \\x1b[2J.png: not an image",
        "cannot be read: train-0001.tar: a/b.jpg: empty file",
    ):
        assert line in shown


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
wholes: dict[str, Callable[[], bytes]] = {"tar": lambda: WHOLE, "zip": ZIP.getvalue}


@pytest.mark.parametrize("form", wholes)
@pytest.mark.parametrize("how", ["bytes", "ends"])
def test_fuzz(form: str, how: str) -> None:
    """Bytes that are others, or an archive that ends early or goes on: refused in a line, or every image is read or
    named; and what is read are the pixels that were packed, but for a tar's data, which no checksum guards.
    """
    path = SCRATCH / f"fuzzed.{form}"
    whole = wholes[form]()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damage)
    def prop(places: list[tuple[float, int]]) -> None:
        raw = bytearray(whole.rstrip(b"\0"))
        for place, value in places:
            if how == "bytes":
                raw[int(place * len(raw))] = value
            else:
                raw = raw[: int(place * len(raw)) + 1] + bytes([value]) * (value % 7)
        path.write_bytes(raw)
        with bounded():
            try:
                source = open_source(str(path))
            except UserError as error:
                refused(error)
                return
            for part in filter(None, (source.train, source.val, source.test)):
                assert len(part.fingerprint) == 64
                for index in range(len(part)):
                    said(part.name(index), 20_000)
                    with contextlib.suppress(BadImage):
                        assert part.read(index).shape[2] == 3
                        assert form == "tar" or zlib.crc32(part.data(index)) == zlib.crc32(png(3))  # type: ignore[attr-defined]

    prop()
