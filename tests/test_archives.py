"""Archives as --data: the same samples, order, ids, labels and fingerprint as of the folder that was packed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_files import add, entries, make_tar, make_zip
from image_files import listed, make_tree, photograph, png, problem
from rich.console import Console
from rich.progress import Progress

from maekit import cli
from maekit.config import UserError
from maekit.data import archive_tar, archives
from maekit.data.archive_members import OpenFile
from maekit.data.archives import ArchivePart
from maekit.data.pairs import open_pairs
from maekit.data.parts import Source
from maekit.data.sources import lasting, open_source, short_name
from maekit.data.workers import in_order
from maekit.training.trained_on import Training, _overlap

NAMES: tuple[str | bytes, ...] = (
    "train/cat/1.png", "train/dog/2.png", "train/dog/deep/er/3.JPG", b"train/dog/\xff\n.png", "train/cat/.hidden.png",
    "train/cat/1_mask.png", "val/cat/4.png", "unlabeled/5.png", "masks/notes.txt", "train/cat-b/6.png",
)  # fmt: skip


def facts(source: Source) -> list[Any]:
    """All that must not depend on how the images are stored."""
    parts = [source.train, source.val, source.test]
    return [
        part
        and (
            listed(part),
            None if part.labels is None else part.labels.tolist(),
            part.class_names,
            part.fingerprint,
            [part.read(index).tobytes() for index in range(len(part))],
            [part.size(index) for index in range(len(part))],
        )
        for part in parts
    ]


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "gnu tar": lambda root, out: make_tar(out / "x.tar", entries(root)),
    "pax tar": lambda root, out: make_tar(out / "x.tar", entries(root), tarfile.PAX_FORMAT),
    "ustar": lambda root, out: make_tar(out / "x.tar", entries(root), tarfile.USTAR_FORMAT),
    "tar of .": lambda root, out: make_tar(out / "x.tar", entries(root, "./")),
    "tar of one folder": lambda root, out: make_tar(out / "x.tar", entries(root, "pets-main/")),
    "stored zip": lambda root, out: make_zip(out / "x.zip", entries(root)),
    "deflated zip": lambda root, out: make_zip(out / "x.zip", entries(root, "pets/"), zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_its_folder(form: str, tmp_path: Path) -> None:
    """Parts, classes over all parts, annotations and hidden files left out, byte order, bytes that are not UTF-8."""
    root = make_tree(tmp_path / "x", *NAMES)
    folder, archive = open_source(str(root)), open_source(str(FORMS[form](root, tmp_path / "out")))
    assert isinstance(archive.train, ArchivePart)
    assert facts(archive) == facts(folder)
    assert archive.name == folder.name
    assert [note.split(" (")[0] for note in archive.notes] == [note.split(" (")[0] for note in folder.notes]
    assert len(archive.train) == 5 and archive.train.class_names == ["cat", "cat-b", "dog"]


def test_what_macos_adds_is_passed_over(tmp_path: Path) -> None:
    files = [
        ("pets/a/1.png", png(1)),
        ("__MACOSX/pets/a/._1.png", b"x"),
        ("pets/b/2.png", png(2)),
        ("__MACOSX/c.png", png(3)),
        ("pets/.DS_Store", b""),
    ]
    part = open_source(str(make_zip(tmp_path / "x.zip", files))).train
    assert (listed(part), part.class_names) == (["a/1.png", "b/2.png"], ["a", "b"])


def test_a_lone_training_folder_is_named_as_on_disk(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "x", "train/a/1.png", "train/b/2.png")
    part = open_source(str(make_zip(tmp_path / "x.zip", entries(root)))).train
    assert listed(part) == listed(open_source(str(root)).train) == ["train/a/1.png", "train/b/2.png"]
    assert part.class_names == ["a", "b"]


def test_long_names_and_tars_of_the_seventh_edition(tmp_path: Path) -> None:
    """Names beyond 100 bytes by each format's own way; headers without a magic word, whose folders are empty files."""
    long = f"{'folder-with-a-long-name/' * 9}picture.png"
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        part = open_source(
            str(make_tar(tmp_path / f"{number}.tar", [(f"a/{long}", png(1)), ("b.png", png(2))], form))
        ).train
        assert listed(part) == [f"a/{long}", "b.png"], form
        assert int(part.read(0)[0, 0, 0]) == 1
    old = tmp_path / "old.tar"
    blocks = b""
    for name, data in ((b"a/", b""), (b"a/1.png", png(7))):
        head = bytearray(512)
        head[: len(name)], head[124:136] = name, b"%011o\0" % len(data)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        blocks += bytes(head) + data + bytes(-len(data) % 512)
    old.write_bytes(blocks)  # and without the empty blocks at the end
    source = open_source(str(old))
    assert int(source.train.read(0)[0, 0, 0]) == 7
    assert source.notes == (f"without the empty blocks that end a tar: {old}; perhaps the end is missing",)


def test_our_reader_of_tars_agrees_with_pythons(tmp_path: Path) -> None:
    """Every kind of member, numbers in binary, negative sums: names, kinds, places and sizes."""
    path = tmp_path / "x.tar"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            add(tar, "a" * 150 + ".png", b"1" * 513)
            add(tar, "folder/", type=tarfile.DIRTYPE)
            add(tar, "link.png", type=tarfile.SYMTYPE, linkname="a" * 200)
            add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a.png")
            add(tar, "pipe.png", type=tarfile.FIFOTYPE)
            add(tar, "\u00e4.png", b"2" * 512, mtime=8**12 if form == tarfile.GNU_FORMAT else 1.5)
            add(tar, "last.png", b"")
        with tarfile.open(path) as tar:
            theirs = [(os.fsencode(one.name), one.isreg(), one.offset_data, one.size) for one in tar]
        ours = [
            (one.name.rstrip(b"/"), one.kind == 0, one.start, one.size)
            for one in archive_tar.members(OpenFile(str(path)))
        ]
        assert ours == theirs


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    """As where the archive is unpacked; tar -r appends a file's newer version."""
    files = [("b.png", png(1)), ("a.png", png(2)), ("b.png", png(3))]
    for path in (make_tar(tmp_path / "x.tar", files), tmp_path / "x.zip"):
        if path.suffix == ".zip":
            with pytest.warns(UserWarning, match="Duplicate"):
                make_zip(path, files)
        part = open_source(str(path)).train
        assert listed(part) == ["a.png", "b.png"]
        assert int(part.read(1)[0, 0, 0]) == 3


def test_a_zip_behind_other_bytes_and_with_a_comment(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", [("a.png", png(5))])
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6 is not the end"[:2] + b" some words"
    path.write_bytes(b"#!/bin/sh\n" * 9 + path.read_bytes())
    assert int(open_source(str(path)).train.read(0)[0, 0, 0]) == 5


def test_zip64_and_backslashes(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a", "b"):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = f"{name}\\1.png", 0
            with archive.open(info, "w", force_zip64=True) as file:
                file.write(png(3))
    raw = path.read_bytes()
    entry = raw.index(b"PK\1\2")
    # The first entry's sizes and place go to an extra field of zip64, as where they exceed 32 bits.
    size, raw_name = len(png(3)), b"a\\1.png"
    extra = b"\1\0\x18\0" + b"".join(number.to_bytes(8, "little") for number in (size, size, 0))
    old = raw[entry : entry + 46 + len(raw_name)]
    new = (
        old[:20]
        + b"\xff" * 8
        + old[28:30]
        + len(extra).to_bytes(2, "little")
        + old[32:42]
        + b"\xff" * 4
        + raw_name
        + extra
    )
    raw = raw.replace(old, new)
    end = raw.index(b"PK\5\6")
    length = int.from_bytes(raw[end + 12 : end + 16], "little") + len(extra)
    path.write_bytes(raw[: end + 12] + length.to_bytes(4, "little") + raw[end + 16 :])
    part = open_source(str(path)).train
    assert (listed(part), part.class_names) == (["a/1.png", "b/1.png"], ["a", "b"])
    assert [int(part.read(index)[0, 0, 0]) for index in (0, 1)] == [3, 3]


def test_a_folder_in_an_archive(tmp_path: Path) -> None:
    """photos.zip/train is what photos/train was; also where the one folder around all is not named."""
    root = make_tree(tmp_path / "x", *NAMES)
    flat, round_ = make_zip(tmp_path / "flat.zip", entries(root)), make_tar(tmp_path / "round.tar", entries(root, "x/"))
    for inside in ("train", "train/dog"):
        folder = open_source(str(root / inside))
        for way in (flat / inside, round_ / "x" / inside, round_ / inside, f"{flat}//{inside}/"):
            source = open_source(str(way))
            assert facts(source) == facts(folder), way
            assert (source.name, short_name(f"{way}")) == (folder.name, folder.name)
    assert facts(open_source(f"{flat}/")) == facts(open_source(str(root)))
    assert lasting(os.path.relpath(flat / "val")) == str(flat / "val")
    assert (short_name(f"{flat}/"), short_name(f"{flat}/v1.5")) == ("flat", "v1.5")
    (tmp_path / "notes.txt").write_text("")
    for way, words in {
        "flat.zip/trian": f"no such folder in {flat}; did you mean train",
        "flat.zip/../x": "no such folder in",
        "flat.zip/train/cat/1.png": "no such folder in",
        "notes.txt/train": "notes.txt is a file: nothing lies below it",
        "none.zip/train": "no such file or folder",
    }.items():
        assert words in problem(tmp_path / way)
    with pytest.raises(UserError, match=r"flat.zip/train: an archive, and pairs of images"):
        open_pairs(str(flat / "train"))


def test_messages_name_folders_of_one_archive_as_they_can_be_given(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", [(f"all/{name}/1.png", png()) for name in ("train", "car")])
    assert f"For the part, give --data {path}/all/train; for a class" in problem(path)
    assert listed(open_source(f"{path}/all/train").train) == ["1.png"]
    source = open_source(str(make_zip(tmp_path / "y.zip", [("metadata.csv", b""), ("a.png", png())])))
    (note,) = source.notes
    assert "(--data DIR/metadata.csv of the archive unpacked into DIR takes labels from it)" in note


def test_tars_one_behind_the_other(tmp_path: Path) -> None:
    """As cat makes one of several: readers stop at the first one's end, which must not happen in silence."""
    one, two = (make_tar(tmp_path / f"{name}.tar", [(f"{name}.png", png())]).read_bytes() for name in "ab")
    (tmp_path / "both.tar").write_bytes(one + two)
    source = open_source(str(tmp_path / "both.tar"))
    assert listed(source.train) == ["a.png"]
    (note,) = source.notes
    assert note.startswith(f"not read: what stands behind the end of {tmp_path}/both.tar; of tars put")
    (tmp_path / "full.tar").write_bytes(one + bytes(99 * 512))  # filled up to longer records
    assert open_source(str(tmp_path / "full.tar")).notes == ()


def test_a_bar_while_large_archives_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all of them together, on a terminal only; small ones are listed at once."""
    for name in ("a.tar", "b.tar"):
        make_tar(tmp_path / name, [(f"{number}.png", bytes(10**6)) for number in range(3)])
    make_zip(tmp_path / "c.zip", [("d.png", bytes(10**6))])
    screen = io.StringIO()
    monkeypatch.setattr(archives, "make_console", lambda: Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(archives, "_TOLD_EVERY", 1)
    told: list[tuple[int, int]] = []
    real = Progress.update

    def update(self: Progress, task: Any, **given: Any) -> None:
        told.append((given["completed"], given["total"]))
        real(self, task, **given)

    monkeypatch.setattr(Progress, "update", update)
    assert len(open_source(str(tmp_path)).train) == 7 and not told
    monkeypatch.setattr(archives, "_LARGE", 1)
    assert len(open_source(str(tmp_path)).train) == 7
    assert told == [(done, 7) for done in (0, 0, 1, 2, 3, 3, 4, 5, 6)]
    assert "listing archives (MB)" in screen.getvalue() and "/7" in screen.getvalue()


# ---- processes and threads ----


def read_all(part: Any, chunk: range) -> list[bytes]:
    return [part.read(index).tobytes() for index in chunk]


def photographs(tmp_path: Path, count: int = 12) -> Path:
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        photograph(number).save(buffer, "JPEG")
        files.append((f"{number:02d}.jpg", buffer.getvalue()))
    make_tar(tmp_path / "set" / "a.tar", files[: count // 2])
    make_zip(tmp_path / "set" / "b.zip", files[count // 2 :], zipfile.ZIP_DEFLATED)
    return tmp_path / "set"


def test_forked_processes_and_threads_read_the_same(tmp_path: Path) -> None:
    part = open_source(str(photographs(tmp_path))).train
    expected = read_all(part, range(12))
    chunks = [range(start, start + 3) for start in range(0, 12, 3)]
    found = [data for _, some in in_order(part, read_all, chunks, 2) for data in some]
    assert found == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: part.read(index % 12).tobytes(), range(240))) == expected * 20


SPAWN = """
import multiprocessing, sys
from maekit.data.sources import open_source
def read(part, index):
    return int(part.read(index).sum())
if __name__ == "__main__":
    part = open_source(sys.argv[1]).train
    part.read(0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print([pool.apply(read, (part, index)) for index in (0, 11)])
"""


def test_spawned_processes_read_the_same(tmp_path: Path) -> None:
    part = open_source(str(photographs(tmp_path))).train
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "set")], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [int(part.read(index).sum()) for index in (0, 11)]


def test_a_part_is_small_and_travels(tmp_path: Path) -> None:
    part: Any = open_source(str(photographs(tmp_path))).train
    part.read(0)
    part.read(11)
    assert len(part._open) == 2
    copy = pickle.loads(pickle.dumps(part))
    assert copy._open == {} and read_all(copy, range(12)) == read_all(part, range(12))
    held = sum(getattr(value, "nbytes", 0) for value in part.__dict__.values()) + len(part._blob)
    assert held <= 12 * (37 + 7) + 40


# ---- commands ----


def test_commands_take_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check-data, pack and plan of the archive say what they say of the folder; segment refuses it."""
    root = make_tree(tmp_path / "x", *(f"train/{'ab'[n % 2]}/{n}.png" for n in range(8)), "val/a/9.png")
    path = make_zip(tmp_path / "x.zip", entries(root))
    reports = []
    for data in (root, path):
        out = tmp_path / "report.json"
        assert cli.main(["check-data", "--data", str(data), "--out", str(out), "--workers", "0"]) == 0
        reports.append(json.loads(out.read_text()) | {"data": ""})
    assert reports[0] == reports[1]
    assert (
        cli.main(["pack", "--data", str(path), "--out", str(tmp_path / "packed"), "--size", "3", "--workers", "2"]) == 0
    )
    packed = open_source(str(tmp_path / "packed"))
    assert (len(packed.train), packed.train.class_names) == (8, ["a", "b"])
    with pytest.raises(UserError, match=r"x.zip: an archive, .* unpack it \(unzip x.zip -d DIR\), then --data DIR"):
        open_pairs(str(path))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(make_tar(tmp_path / "0.tar", entries(root)).read_bytes())
    with pytest.raises(UserError, match=r"a folder of archives, .* \(tar xf 0.tar -C DIR\)"):
        open_pairs(str(tmp_path / "shards"))
    with pytest.raises(UserError, match="--label-column: only for Parquet and tables"):
        open_source(str(path), label_column="x")
    capsys.readouterr()


def test_members_are_known_again(tmp_path: Path) -> None:
    """What was trained on is told also where one shard of several is asked about, by whatever way."""
    folder = photographs(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    whole = open_source(str(folder)).train
    one = open_source(str(tmp_path / "link" / "a.tar")).train
    training = Training(whole.fingerprint, np.array([1, 7, 9]), whole)
    assert training.among(one).tolist() == [False, True, False, False, False, False]
    archive = make_zip(tmp_path / "x.zip", [("train/a.png", png()), ("val/a.png", png())])
    assert _overlap(f"{archive}/train", str(archive)) and not _overlap(f"{archive}/train", str(tmp_path / "no"))
