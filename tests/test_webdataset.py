"""Folders of archives as --data: WebDataset's shards, their labels, and parts by the archives' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from archive_files import entries, make_tar, make_zip, shard
from image_files import listed, make_tree, png, problem

from maekit.data.sources import open_source


def test_shards_with_classes_by_number(tmp_path: Path) -> None:
    """Parts by the archives' names; keys that come again in the next shard are other samples."""
    shard(tmp_path / "set-train-0001.tar", ("0", {"jpg": png(10), "cls": b"2"}), ("1", {"cls": b"0\n", "png": png(11)}))
    shard(
        tmp_path / "set-train-0000.tar", ("1", {"png": png(12), "cls": b"1", "txt": b"a cat"}), ("0", {"png": png(13)})
    )
    shard(tmp_path / "set-val-0000.tar", ("0", {"png": png(14), "cls": b"2"}))
    source = open_source(str(tmp_path))
    assert listed(source.train) == [
        "set-train-0000.tar: 0.png",
        "set-train-0000.tar: 1.png",
        "set-train-0001.tar: 0.jpg",
        "set-train-0001.tar: 1.png",
    ]
    assert [int(source.train.read(index)[0, 0, 0]) for index in range(4)] == [13, 12, 10, 11]
    assert source.train.labels is not None and source.train.labels.tolist() == [-1, 1, 2, 0]
    assert source.val is not None and source.val.labels is not None and source.val.labels.tolist() == [2]
    assert source.train.class_names == source.val.class_names == ["0", "1", "2"]
    assert source.notes == ("labels are those of the .cls files beside the images, 3 classes",)
    shard(tmp_path / "set-train-0001.tar", ("0", {"jpg": png(10), "cls": b"1"}), ("1", {"cls": b"0\n", "png": png(11)}))
    assert open_source(str(tmp_path)).train.fingerprint != source.train.fingerprint  # labels are no part of a name


def test_numbers_are_called_by_their_folders(tmp_path: Path) -> None:
    """Where each class has one; numbers decide, and not the folders' order."""
    shard(
        tmp_path / "train-0.tar", ("zebra/1", {"png": png(), "cls": b"0"}), ("ape/2", {"png": png(), "cls": b"1"}),
        ("ape/3", {"png": png(), "cls": b"1"}),
    )  # fmt: skip
    shard(tmp_path / "test-0.tar", ("ape/4", {"png": png(), "cls": b"1"}))
    source = open_source(str(tmp_path))
    assert source.train.class_names == ["zebra", "ape"]
    assert source.train.labels is not None and source.train.labels.tolist() == [1, 1, 0]
    assert source.test is not None and source.test.labels is not None and source.test.labels.tolist() == [1]
    shard(tmp_path / "train-1.tar", ("zebra/9", {"png": png(), "cls": b"1"}))
    assert open_source(str(tmp_path)).train.class_names == ["0", "1"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([{"label": 1}, {"label": 0}], ([1, 0], ["0", "1"])),
        ([{"class": "cat", "label": None}, {"class": "cat"}], ([0, 0], ["cat"])),
        ([{"label": "a man on a horse"}, {"label": "a dog"}], (None, None)),  # captions
        ([{"caption": "a dog", "width": 4}, ["label"]], (None, None)),
        ([{"label": True}, {"label": 2.5}], (None, None)),
        ([{"label": 10**7}, {"label": 0}], (None, None)),
    ],
)
def test_labels_in_json(files: list[Any], expected: tuple[Any, Any], tmp_path: Path) -> None:
    samples = [(f"{number}", {"png": png(), "json": json.dumps(file).encode()}) for number, file in enumerate(files)]
    part = open_source(str(shard(tmp_path / "x.tar", *samples))).train
    assert (None if part.labels is None else part.labels.tolist(), part.class_names) == expected


def test_names_in_cls_files_and_those_that_say_nothing(tmp_path: Path) -> None:
    samples = [
        (str(number), {"png": png(), "cls": text}) for number, text in enumerate((b"b", b"a", b"b", b"", b"\xff", b"a"))
    ]
    samples[4][1]["json"] = b'{"label": 3}'
    part = open_source(str(shard(tmp_path / "x.tar", *samples))).train
    assert part.labels is not None and part.labels.tolist() == [1, 0, 1, -1, -1, 0]
    assert part.class_names == ["a", "b"]


def test_dots_in_keys(tmp_path: Path) -> None:
    """Files of exactly one image's name are its own; those of a key hold for all its images that have none."""
    samples: list[tuple[str, dict[str, bytes]]] = [
        (f"v1.0/IMG.{n}", {"png": png(n), "cls": b"%d" % (n % 2)}) for n in range(4)
    ]
    samples += [("v1.0/two", {"left.png": png(), "right.png": png(), "cls": b"2", "right.cls": b"1"})]
    part = open_source(str(shard(tmp_path / "x.tar", *samples))).train
    assert part.labels is not None and part.labels.tolist() == [0, 1, 0, 1, 2, 1]


def test_each_part_in_an_archive_of_its_own(tmp_path: Path) -> None:
    """train.tar and val.zip, one with a folder around its classes, as ImageNet is often kept; also below folders."""
    root = make_tree(tmp_path / "x", "train/a/1.png", "train/b/2.png", "val/b/3.png")
    make_tar(tmp_path / "one" / "train.tar", entries(root / "train", "train/"))
    make_zip(tmp_path / "one" / "val.zip", entries(root / "val"))
    make_tar(tmp_path / "two" / "train" / "0.tar", entries(root / "train"))
    make_tar(tmp_path / "two" / "validation" / "0.tar", entries(root / "val", "val/"))
    folder = open_source(str(root))
    for name in ("one", "two"):
        source = open_source(str(tmp_path / name))
        assert source.train.fingerprint == folder.train.fingerprint
        assert source.val is not None and source.val.labels is not None and source.val.labels.tolist() == [1]
        assert source.val.class_names == ["a", "b"]
    # Archives whose names tell no part are one tree, in which parts may be.
    make_tar(tmp_path / "three" / "0.tar", entries(root / "train", "train/"))
    make_tar(tmp_path / "three" / "1.tar", entries(root / "val", "val/"))
    source = open_source(str(tmp_path / "three"))
    assert listed(source.train) == ["0.tar: train/a/1.png", "0.tar: train/b/2.png"]
    assert source.val is not None and listed(source.val) == ["1.tar: val/b/3.png"]
    assert source.val.labels is not None and source.val.labels.tolist() == [1]


def test_folders_with_images_and_archives(tmp_path: Path) -> None:
    """Images count, which is said; archives that are compressed stand in nobody's way where others can be read."""
    make_tree(tmp_path / "one", "a.png")
    make_tar(tmp_path / "one" / "b.tar", [("b.png", png())])
    source = open_source(str(tmp_path / "one"))
    assert listed(source.train) == ["a.png"]
    said = f"left out, since images lie beside: b.tar (--data {tmp_path}/one/b.tar takes it alone)"
    assert source.notes == (said,)
    make_tar(tmp_path / "two" / "train.tar", [("b.png", png())])
    (tmp_path / "two" / "devkit.tar.gz").write_bytes(b"x")
    assert listed(open_source(str(tmp_path / "two")).train) == ["b.png"]
    make_tar(tmp_path / "three" / "x" / "a.tar", [])
    make_tar(tmp_path / "three" / "y" / "b.tar", [])
    assert "several folders of archives; choose --data" in problem(tmp_path / "three")
    assert "patterns of names are not read: give the folder" in problem(f"{tmp_path}/two/train-{{000000..000146}}.tar")


def test_masks_in_samples_are_no_images(tmp_path: Path) -> None:
    """KEY.seg.png and KEY.mask.png beside KEY.jpg; several images of a sample are images."""
    samples = [
        ("a/0", {"jpg": png(1), "seg.png": png(2)}),
        ("a/1", {"left.jpg": png(3), "right.jpg": png(4), "cls": b"1"}),
    ]
    shard(tmp_path / "0.tar", *samples, ("a/2", {"jpg": png(5), "mask.png": png(6)}))
    shard(tmp_path / "1.tar", ("b/2", {"mask.png": png(7)}))
    source = open_source(str(tmp_path))
    assert listed(source.train) == [
        "0.tar: a/0.jpg", "0.tar: a/1.left.jpg", "0.tar: a/1.right.jpg", "0.tar: a/2.jpg", "1.tar: b/2.mask.png"
    ]  # fmt: skip
    assert source.train.labels is not None and source.train.labels.tolist() == [-1, 1, 1, -1, -1]
    assert "2 files, such as 0.tar: a/0.seg.png" in source.notes[0]
