"""maekit/data/sources.py: folders, text files of paths, and which form of --data is meant."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import SHARED, listed, make_tree, png, problem

from maekit.config import UserError
from maekit.data.images import BadImage
from maekit.data.sources import FilePart, open_source


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Make images below tmp_path / root: tree(name, name, ..., root="set")."""
    return lambda *names, root="set": make_tree(tmp_path / root, *names)


# ---- folders ----


def test_flat_and_nested_folders_in_byte_order(tree: Callable[..., Path]) -> None:
    root = tree("b/x.png", "b-c.png", "B.PNG", "a.jpg", "b/.hidden.png", ".git/y.png", "notes.txt", "b/deep/er/z.tif")
    source = open_source(str(root))
    # '-' (0x2d) comes before '/' (0x2f), and capitals before small letters
    assert listed(source.train) == ["B.PNG", "a.jpg", "b-c.png", "b/deep/er/z.tif", "b/x.png"]
    assert (source.name, source.val, source.test, source.train.labels) == ("set", None, None, None)
    assert source.train.read(4).shape == (3, 4, 3)
    assert source.train.size(4) == (3, 4)
    assert source.train.read(4)[0, 0, 0] == 0  # b/x.png was written first
    assert open_source(str(root) + "/", in_chans=5).train.read(1).shape == (3, 4, 5)


def test_names_that_are_not_utf8_or_hold_newlines(tree: Callable[..., Path]) -> None:
    root = tree(b"\xff.png", b"two\nlines.png", "\u00e4.png", b"plain.png")
    part = open_source(str(root)).train
    assert listed(part) == ["plain.png", "two\\nlines.png", "\u00e4.png", "\\xff.png"]
    assert [int(part.read(index)[0, 0, 0]) for index in range(4)] == [3, 1, 2, 0]
    assert all("\n" not in name and name.encode("utf-8") for name in listed(part))


def test_a_folder_per_class(tree: Callable[..., Path]) -> None:
    part = open_source(str(tree("dog/a.png", "cat/x/b.png", "cat/c.png"))).train
    assert part.class_names == ["cat", "dog"]
    assert part.labels is not None
    assert part.labels.dtype == np.int64
    classes = {"cat/c.png": 0, "cat/x/b.png": 0, "dog/a.png": 1}
    assert dict(zip(listed(part), part.labels.tolist(), strict=True)) == classes


def test_no_labels_where_an_image_lies_outside_or_there_is_one_folder(tree: Callable[..., Path]) -> None:
    assert open_source(str(tree("dog/a.png", "cat/b.png", "c.png", root="one"))).train.labels is None
    assert open_source(str(tree("dog/a.png", "dog/b.png", root="two"))).train.labels is None
    source = open_source(str(tree("train/a.png", "val/cat/b.png", "val/dog/c.png", root="three")))
    assert source.val is not None
    assert source.val.labels is None


@pytest.mark.parametrize(
    ("train", "val", "test"), [("train", "val", "test"), ("Training", "VALIDATION", "testing"), ("TRAIN", "val", "")]
)
def test_parts_share_their_class_ids(tree: Callable[..., Path], train: str, val: str, test: str) -> None:
    names = [f"{train}/b/1.png", f"{train}/c/2.png", f"{val}/a/3.png", f"{val}/c/4.png", "masks/m.png"]
    source = open_source(str(tree(*names, *([f"{test}/c/5.png"] if test else []))))
    assert listed(source.train) == [f"{train}/b/1.png", f"{train}/c/2.png"]
    assert source.train.class_names == ["a", "b", "c"]
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [1, 2]
    assert source.val is not None
    assert source.val.labels is not None
    assert source.val.labels.tolist() == [0, 2]
    assert (source.test is not None) == bool(test)
    if source.test is not None:
        assert source.test.class_names == ["a", "b", "c"]
        assert source.test.labels is not None
        assert source.test.labels.tolist() == [2]


def test_valid_beside_train_is_the_validation_part(tree: Callable[..., Path]) -> None:
    """As Kaggle and Roboflow spell it; alone it may be a class, and of two nobody can tell which is meant."""
    source = open_source(str(tree("train/a/1.png", "train/b/2.png", "valid/a/3.png", root="two")))
    assert source.val is not None and source.train.class_names == ["a", "b"]
    assert (listed(source.train), listed(source.val)) == (["train/a/1.png", "train/b/2.png"], ["valid/a/3.png"])
    assert open_source(str(tree("train/a.png", "Valid/b.png", "test/c.png", root="three"))).val is not None
    assert open_source(str(tree("valid/a.png", "expired/b.png", root="classes"))).train.class_names == [
        "expired",
        "valid",
    ]
    both = open_source(str(tree("train/a.png", "test/b.png", "valid/c.png", "dev/d.png", root="both")))
    assert both.val is None and "dev/, valid/" in both.notes[0]


def test_folders_beside_the_parts_are_left_out_and_named(tree: Callable[..., Path]) -> None:
    source = open_source(str(tree("train/a.png", "test/b.png", "unlabeled/c.png", "notes/d.txt")))
    assert len(source.train) == 1
    (note,) = source.notes
    assert "left out, since train/, test/ are parts: unlabeled/" in note.replace("test/, train/", "train/, test/")
    assert not open_source(str(tree("train/a.png", "test/b.png", root="other"))).notes


def test_ade20k_lists_images_and_never_annotations(tree: Callable[..., Path]) -> None:
    root = tree("images/training/a.jpg", "images/validation/b.jpg", "annotations/training/a.png", "annotations/x.png")
    source = open_source(str(root))
    assert listed(source.train) == ["images/training/a.jpg"]
    assert source.val is not None
    assert listed(source.val) == ["images/validation/b.jpg"]
    assert source.train.read(0).shape == (3, 4, 3)


def test_only_a_run_is_refused_as_one(tree: Callable[..., Path]) -> None:
    """Both of its files tell it: many a folder of images has a config.json."""
    root = tree("a.png", "b.png")
    (root / "config.json").write_text("{}")
    assert len(open_source(str(root)).train) == 2
    (root / "metrics.jsonl").write_text("")
    assert "is the folder of a run, not of images" in problem(root)


@pytest.mark.parametrize("annotated", ["annotations", "masks", "labels"])
def test_masks_beside_images_are_left_out_and_named(annotated: str, tree: Callable[..., Path]) -> None:
    """They would be trained on as images of a second class."""
    root = tree("images/a.jpg", "images/b.jpg", f"{annotated}/a.png", f"{annotated}/b.png")
    source = open_source(str(root))
    assert listed(source.train) == ["images/a.jpg", "images/b.jpg"]
    (note,) = source.notes
    assert note == f"left out, as annotations of the images beside them: {annotated}/"
    assert source.train.labels is None


def test_a_folder_that_may_be_a_part_or_a_class_is_asked_about(tree: Callable[..., Path]) -> None:
    root = tree("train/a.png", "bus/b.png", root="one")
    assert f"--data {root}/train" in problem(root)
    assert "bus" in problem(root)
    assert "no train/" in problem(tree("test/a.png", root="two"))
    assert "both the train part" in problem(tree("train/a.png", "Training/b.png", "val/c.png", root="three"))
    assert listed(open_source(str(tree("train/a.png", root="four"))).train) == ["train/a.png"]


def test_link_loops_are_cut_and_linked_folders_followed(tree: Callable[..., Path], tmp_path: Path) -> None:
    root = tree("a/x.png")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(".")
    tree("y.png", root="elsewhere")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to("nowhere.png")
    part = open_source(str(root)).train
    assert listed(part) == ["a/x.png", "gone.png", "link/y.png"]
    with pytest.raises(BadImage, match="no such file"):
        part.read(1)


def test_a_folder_without_images_says_what_was_seen(tree: Callable[..., Path]) -> None:
    message = problem(tree("a.txt", "b/c.csv"))
    assert "no image among 2 files" in message
    assert ".jpg" in message
    assert "--data" in message


def test_fingerprint_depends_on_names_and_sizes_not_on_the_place(tree: Callable[..., Path]) -> None:
    def fingerprint(*names: str, root: str) -> str:
        return open_source(str(tree(*names, root=root))).train.fingerprint

    first = fingerprint("a.png", "b/c.png", root="one")
    assert first == fingerprint("a.png", "b/c.png", root="two")
    assert len(bytes.fromhex(first)) == 32
    assert first != fingerprint("a.png", "b/d.png", root="three")
    (tree("a.png", "b/c.png", root="four") / "a.png").write_bytes(png(0, (40, 30)))
    assert first != open_source(str(tree(root="four"))).train.fingerprint


def test_a_part_is_small_and_travels(tree: Callable[..., Path]) -> None:
    names = [f"{number:07d}.png".encode() for number in range(100_000)]
    part = FilePart(b"/data", names, 3)
    held = sum(sys.getsizeof(value) for value in part.__dict__.values())
    assert held < 100_000 * (12 + 8) + 2000  # the names, their ends, and next to nothing else
    assert part.name(99_999) == "0099999.png"
    copy = pickle.loads(pickle.dumps(open_source(str(tree("dog/a.png", "cat/b.png"))).train))
    assert listed(copy) == ["cat/b.png", "dog/a.png"]
    assert copy.read(0)[0, 0, 0] == 1


# ---- lists of paths ----


def test_text_file_of_paths(tree: Callable[..., Path], tmp_path: Path) -> None:
    root = tree("b.png", "a.png", root="pictures")
    text = f"\ufeff# mine\r\n\npictures/b.png\r\npictures/a.png\npictures/b.png\n  {root}/a.png\ngone.png\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = open_source(str(tmp_path / "list.txt"))
    assert source.name == "list"
    assert listed(source.train) == [f"{root}/a.png", "gone.png", "pictures/a.png", "pictures/b.png"]
    assert [int(source.train.read(index)[0, 0, 0]) for index in (0, 2, 3)] == [1, 1, 0]
    assert source.train.labels is None
    with pytest.raises(BadImage):
        source.train.read(1)


def test_text_files_without_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    assert "no paths" in problem(tmp_path / "empty.txt")
    (tmp_path / "wrong.txt").write_text("nowhere/a.png\n")
    assert "nowhere/a.png" in problem(tmp_path / "wrong.txt")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    assert "not a text file" in problem(tmp_path / "binary.txt")


def test_tables_of_paths_labels_and_parts(tree: Callable[..., Path], tmp_path: Path) -> None:
    """By the rules of folders: byte order, classes over all parts, numbers in their order, no label for none."""
    root = tree("b.png", "a.png", "c.png", "d.png", root="pictures")
    text = (
        f'\ufeffsplit,file_name,note,Label\r\ntrain,pictures/b.png,"x, y",10\r\nTrain,{root}/a.png,,9\r\n\r\n'
        "validation, pictures/c.png ,,9\r\ntrain,pictures/d.png,,\r\ntrain,pictures/b.png,again,10\r\n"
        "test,gone.png,,10"
    )
    (tmp_path / "list.csv").write_bytes(text.encode())
    source = open_source(str(tmp_path / "list.csv"))
    assert source.name == "list"
    assert listed(source.train) == [f"{root}/a.png", "pictures/b.png", "pictures/d.png"]
    assert source.train.labels is not None and source.train.labels.tolist() == [0, 1, -1]
    assert source.train.class_names == ["9", "10"]
    assert source.val is not None and source.test is not None
    assert (listed(source.val), listed(source.test)) == (["pictures/c.png"], ["gone.png"])
    assert int(source.train.read(1)[0, 0, 0]) == 0
    (tmp_path / "other.tsv").write_text("where\tkind\npictures/a.png\tcat, big\npictures/b.png\tdog\n")
    source = open_source(str(tmp_path / "other.tsv"), image_column="where", label_column="kind")
    assert (source.train.class_names, source.val) == (["cat, big", "dog"], None)
    (tmp_path / "names.csv").write_text("path,labels,class_name\npictures/a.png,1,cat\npictures/b.png,2,dog\n")
    assert open_source(str(tmp_path / "names.csv")).train.class_names == ["1", "2"]
    (tmp_path / "plain.csv").write_text("path\npictures/a.png\n")
    assert open_source(str(tmp_path / "plain.csv")).train.labels is None


def test_a_folders_own_table_is_named(tree: Callable[..., Path]) -> None:
    """The hub's metadata.csv holds labels that a folder of images does not show."""
    root = tree("train/a.png", "train/b.png", "test/c.png")
    (root / "train" / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,dog\n")
    (note,) = open_source(str(root)).notes
    assert note == f"not read: train/metadata.csv (--data {root}/train/metadata.csv takes labels from it)"
    assert open_source(f"{root}/train/metadata.csv").train.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column of paths in its first line"),
        ("name,label\na.png,x", "no column of paths in its first line (name, label)"),
        ("file_name,label\n", "no rows below"),
        ("file_name,label\na.png", "row 2 has 1 values under 2 headings"),
        ("file_name,label\na.png,x\n,y", "row 3 has no path"),
        ("file_name,label\na.png,x\na.png,y", "row 3: a.png stands in another row too"),
        ("file_name,split\na.png,train\na.png,test", "row 3: a.png stands in another row too"),
        ("file_name,split\na.png,tranig", "'tranig' is no part; did you mean train"),
        ("file_name,split\na.png,test", "no row of a train part; its parts: test"),
        ("file_name\nnowhere/a.png", "no such file as nowhere/a.png"),
        ("file_name\n\0", "no path"),
    ],
)
def test_tables_that_cannot_be_used(text: str, said: str, tree: Callable[..., Path], tmp_path: Path) -> None:
    tree("a.png", root=".")
    (tmp_path / "list.csv").write_text(text)
    assert said in problem(tmp_path / "list.csv")
    if text.startswith("file_name"):
        with pytest.raises(UserError, match="--label-column kind: no such column"):
            open_source(str(tmp_path / "list.csv"), label_column="kind")


# ---- which form it is ----


def test_paths_and_known_names(tree: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree("a.png", root="digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits").train) == 1438
    assert listed(open_source("./digits").train) == ["a.png"]
    tree("b.png", root="mine")
    assert listed(open_source("mine").train) == ["b.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listed(open_source("~/mine").train) == ["b.png"]
    assert open_source(".").name == tmp_path.name


def test_what_cannot_be_data_is_explained(tmp_path: Path) -> None:
    assert "did you mean cifar10" in problem("cifar-10")
    assert "no such file or folder" in problem(tmp_path / "nowhere")
    assert "photos" in problem(tmp_path / "nowhere")
    assert "on the Hugging Face hub: --data hub:uoft-cs/cifar10" in problem("uoft-cs/cifar10")
    (tmp_path / "one.png").write_bytes(png())
    assert "one image" in problem(tmp_path / "one.png")
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert ".zip" in problem(tmp_path / "x.zip")
    assert "empty" in problem("")
    assert "--label-column" in problem("digits", label_column="x")
    assert "--image-column" in problem(tmp_path, image_column="x")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        assert "regular file" in problem(tmp_path / "pipe.txt")


@pytest.mark.skipif(not (SHARED / "data" / "camvid").exists(), reason="../shared/data/camvid is not here")
def test_the_shared_camvid() -> None:
    source = open_source(str(SHARED / "data" / "camvid"))
    assert (len(source.train), len(source.val or ()), source.test) == (367, 101, None)
    assert source.train.size(0) == (360, 480)
