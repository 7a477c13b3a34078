"""Layouts in which people have images with masks: every command must take the same files for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import make_tree
from pair_files import SIZE_HW, annotation, picture, refusal

from maekit.data.pairs import check_pairs, open_pairs
from maekit.data.sources import Source, open_source
from maekit.tasks.segment_predict import find_images

LAYOUTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "part above kind": (
        {"train/images/{}.jpg": "train/masks/{}.png"},
        {"val/images/{}.jpg": "val/masks/{}.png"},
    ),
    "kind above part": (
        {"images/train/{}.jpg": "masks/train/{}.png"},
        {"images/val/{}.jpg": "masks/val/{}.png"},
    ),
    "singular, in capitals": ({"Image/{}.png": "Mask/{}.png"}, {}),
    "MMSegmentation": (
        {"img_dir/train/{}.jpg": "ann_dir/train/{}.png"},
        {"img_dir/val/{}.jpg": "ann_dir/val/{}.png"},
    ),
    "COCO's years": (
        {"images/train2017/{}.jpg": "annotations/train2017/{}.png"},
        {"images/val2017/{}.jpg": "annotations/val2017/{}.png"},
    ),
    "a name of its own beside masks": ({"photographs/{}.png": "masks/{}.png"}, {}),
    "other endings": ({"images/{}_rgb.png": "masks/{}_mask.png"}, {}),
    "two suffixes": ({"images/{}.jpg": "masks/{}.jpg.png"}, {}),
    "a folder below": ({"images/{}.jpg": "annotations/trimaps/{}.png"}, {}),
    "nnU-Net": ({"imagesTr/{}_0000.png": "labelsTr/{}.png"}, {}),
    "Carvana": ({"train/{}.jpg": "train_masks/{}_mask.png"}, {}),
    "SegNet's CamVid": ({"train/{}.png": "trainannot/{}.png"}, {"val/{}.png": "valannot/{}.png"}),
    "CamVid as it came": ({"701_StillsRaw_full/0_{}.png": "LabeledApproved_full/0_{}_L.png"}, {}),
    "one folder": ({"{}.jpg": "{}_mask.png"}, {}),
    "one folder, satellite": ({"{}_sat.jpg": "{}_mask.png"}, {}),
    "Roboflow": ({"train/{}.rf.1.jpg": "train/{}.rf.1_mask.png"}, {"valid/{}.rf.1.jpg": "valid/{}.rf.1_mask.png"}),
    "classes of whole images": ({"benign/{}.png": "benign/{}_mask.png"}, {}),
    "Cityscapes": (
        {"leftImg8bit/train/ulm/ulm_{}_leftImg8bit.png": "gtFine/train/ulm/ulm_{}_gtFine_labelTrainIds.png"},
        {"leftImg8bit/val/bonn/b_{}_leftImg8bit.png": "gtFine/val/bonn/b_{}_gtFine_labelTrainIds.png"},
    ),
    "Pascal VOC": (
        {"JPEGImages/{}.jpg": "SegmentationClass/{}.png"},
        {"JPEGImages/{}.jpg": "SegmentationClass/{}.png"},
    ),
}
NUMBERS = {"train": ("01", "02", "11"), "val": ("03", "04")}


def write(root: Path, layout: str) -> dict[str, dict[str, Any]]:
    """Part -> image's path -> its mask's numbers; and files beside them that are neither."""
    found: dict[str, dict[str, Any]] = {}
    for part, shapes in zip(NUMBERS, LAYOUTS[layout], strict=True):
        for (image, mask), number in ((pair, number) for pair in shapes.items() for number in NUMBERS[part]):
            picture(root / image.format(number))
            values = annotation(root / mask.format(number))
            found.setdefault(part, {})[image.format(number)] = values
            if layout == "Cityscapes":
                for kind in ("color", "labelIds", "instanceIds"):
                    annotation(root / mask.format(number).replace("labelTrainIds", kind), np.full(SIZE_HW, 200))
    if layout == "Pascal VOC":
        for part, numbers in NUMBERS.items():
            (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
            (root / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(numbers) + "\n")
        (root / "Annotations").mkdir()
        (root / "Annotations/01.xml").write_text("<annotation/>")
        annotation(root / "SegmentationObject/01.png")
    return found


def names_of(source: Source) -> list[str]:
    parts = (source.train, source.val, source.test)
    return sorted(part.name(index) for part in parts if part is not None for index in range(len(part)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_and_masks_are_no_images(tmp_path: Path, layout: str) -> None:
    wanted = write(tmp_path, layout)
    pairs = open_pairs(str(tmp_path))
    assert {*pairs.parts} == {*wanted}
    for part, of in pairs.parts.items():
        read = {of.name(index): of.values(index) for index in range(len(of))}
        assert {*read} == {*wanted[part]}
        assert all(np.array_equal(read[name], wanted[part][name]) for name in read)

    source = open_source(str(tmp_path))
    assert names_of(source) == sorted({name for part in wanted.values() for name in part})
    assert source.train.class_names in (None, ["bonn", "ulm"]), "a folder of masks is no class"
    assert any("left out, as annotations of the images beside them" in note for note in source.notes)
    found, notes = find_images((str(tmp_path),))
    assert sorted(Path(path).relative_to(tmp_path).as_posix() for path in found.values()) == names_of(source)
    assert len(notes) == 1


def test_what_only_looks_like_annotations_stays(tmp_path: Path) -> None:
    """Classes of such names, a part whose name another only contains, files that are masks of nothing there."""
    worn = open_source(str(make_tree(tmp_path / "one", "face/a.png", "face_mask/b.png", "mask/c.png")))
    assert worn.train.class_names == ["face", "face_mask", "mask"] and not worn.notes
    train = open_source(str(make_tree(tmp_path / "two", "train/a.png", "val/b.png", "trains/c.png")))
    assert "left out, since train/, val/ are parts: trains/" in train.notes[0]
    alone = open_source(str(make_tree(tmp_path / "three", "a_mask.png", "b.png", "c/b_mask.png")))
    assert len(alone.train) == 3 and not alone.notes
    beside = open_source(str(make_tree(tmp_path / "four", "images/a.png", "masks/a.png", "more/b.png")))
    assert len(beside.train) == 1
    assert "left out, since images/ holds the images: more/" in beside.notes[0]


def test_numbers_that_begin_alike_are_not_cut(tmp_path: Path) -> None:
    """Of 010, 011 and 110, 111 no common beginning may be taken away: they would be paired with each other."""
    for number in range(10):
        picture(tmp_path / f"images/01{number}.png")
        annotation(tmp_path / f"masks/11{number}.png")
    assert "no common names" in refusal(lambda: open_pairs(str(tmp_path)))


def test_a_missing_mask_is_named_where_names_differ(tmp_path: Path) -> None:
    write(tmp_path, "other endings")
    (tmp_path / "masks/02_mask.png").unlink()
    words = refusal(lambda: open_pairs(str(tmp_path)))
    assert "1 of 3 images have no annotation in masks, such as images/02_rgb.png" in words
    write(tmp_path / "two", "Roboflow")
    picture(tmp_path / "two/train/alone.jpg")
    assert "1 of 4 images have no annotation" in refusal(lambda: open_pairs(str(tmp_path / "two")))


def test_what_is_paired_by_more_than_the_name_is_said(tmp_path: Path) -> None:
    write(tmp_path, "Carvana")
    notes = open_pairs(str(tmp_path)).notes
    assert notes[0] == (
        "paired by what {} stands for in train/{} and train_masks/{}_mask, such as train_masks/01_mask.png with "
        "train/01.jpg"
    )


def test_the_first_of_several_masks_is_read_and_the_others_told(tmp_path: Path) -> None:
    """As in BUSI, whose a_mask_1.png is a second tumour."""
    wanted = write(tmp_path, "one folder")["train"]["01.jpg"]
    annotation(tmp_path / "01_mask_1.png", (wanted + 1) % 4)
    pairs = open_pairs(str(tmp_path))
    assert np.array_equal(pairs.train.values(0), wanted)
    assert "1 masks beside the first of an image are left out" in pairs.notes[0]
    assert len(open_source(str(tmp_path)).train) == 3


def test_cityscapes_without_the_numbers_to_train_on(tmp_path: Path) -> None:
    write(tmp_path, "Cityscapes")
    for path in tmp_path.rglob("*_labelTrainIds.png"):
        path.unlink()
    words = refusal(lambda: open_pairs(str(tmp_path)))
    assert "csCreateTrainIdLabelImgs" in words and "gtFine/{}_gtFine_labelIds.png" in words


def test_lists_that_name_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, "Pascal VOC")
    (tmp_path / "SegmentationClass/02.png").unlink()
    words = refusal(lambda: open_pairs(str(tmp_path)))
    assert "ImageSets/Segmentation/train.txt names 02, and SegmentationClass/ has no such file" in words


def test_patterns_with_the_word_of_a_part(tmp_path: Path) -> None:
    for part in ("Train", "val", "test"):
        picture(tmp_path / f"{part}_photos/x/1.jpg")
        if part != "test":
            annotation(tmp_path / f"truth/{part.lower()}/x/1.png")
    pairs = open_pairs(str(tmp_path), image_pattern="{part}_photos/{}.jpg", annotation_pattern="truth/{part}/{}.png")
    assert [of.name(0) for of in pairs.parts.values()] == ["Train_photos/x/1.jpg", "val_photos/x/1.jpg"]
    wrong: dict[str, Any] = {"image_pattern": "{part}/{part}/{}.jpg", "annotation_pattern": "{}.png"}
    assert "may have one {part}" in refusal(lambda: open_pairs(str(tmp_path), **wrong))


@pytest.mark.parametrize("ending", [".jpg", ".gif"])
def test_lossy_masks_are_told_with_the_way_out(tmp_path: Path, ending: str) -> None:
    for kind in ("images", "masks"):
        picture(tmp_path / kind / f"a{ending}")
    words = refusal(lambda: open_pairs(str(tmp_path)))
    assert "do not keep numbers as they are; write PNG instead" in words


def test_the_way_to_resize_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    annotation(tmp_path / "masks/a.png", np.eye(4) + 1)
    words = refusal(lambda: check_pairs(open_pairs(str(tmp_path))))
    assert "4 x 4 pixels where its image has 6 x 9" in words and "Image.Resampling.NEAREST" in words


# ---- tables of pairs ----


def table(root: Path, rows: list[str], name: str = "pairs.csv") -> str:
    (root / name).write_text("\n".join(rows) + "\n")
    return str(root / name)


def test_a_table_of_pairs(tmp_path: Path) -> None:
    values = {}
    for name in "abc":
        picture(tmp_path / f"x/{name}.jpg")
        values[name] = annotation(tmp_path / f"y/{name}1.png")
    rows = ["split,image,mask", "train,x/b.jpg,y/b1.png", "Valid,x/c.jpg,y/c1.png", "train,x/a.jpg,y/a1.png", "test,z,"]
    pairs = open_pairs(table(tmp_path, rows))
    assert [pairs.train.name(i) for i in range(2)] == ["x/a.jpg", "x/b.jpg"] and pairs.val is not None
    assert np.array_equal(pairs.train.values(1), values["b"]) and np.array_equal(pairs.val.values(0), values["c"])
    others = [line.replace("mask", "truth") for line in rows]
    assert len(open_pairs(table(tmp_path, others), annotation_column="truth").train) == 2
    labels = open_source(table(tmp_path, [line.replace("mask", "label") for line in rows[:-1]])).train
    assert labels.labels is None, "paths of masks are no classes"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["image,thing", "a.png,b.png"], "call them image and mask, or give --image-column and --annotation-column"),
        (["image,mask", "a.png"], "row 2 has 1 values under 2 headings"),
        (["image,mask", "a.png,"], "row 2: a.png has no annotation"),
        (["image,mask", "a.png,none.png"], "no such file as"),
        (["image,mask,split", "a.png,a.png,nowhere"], "row 2: 'nowhere' is no part"),
        (["image,mask,split", "a.png,a.png,val"], "no row of a train part"),
        (["image,mask", "a.png,a.png", "a.png,b.png"], "row 3: a.png stands in another row too"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, rows: list[str], words: str) -> None:
    annotation(tmp_path / "a.png")
    assert words in refusal(lambda: open_pairs(table(tmp_path, rows)))
