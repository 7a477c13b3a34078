"""maekit/data/parquet.py: Parquet in the hub's image schema."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import SHARED, listed, make_tree, png, problem

from maekit.data.images import BadImage
from maekit.data.sources import TablePart, open_source

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(
    path: Path,
    images: list[bytes | None],
    paths: list[str | None] | None = None,
    *,
    features: dict[str, Any] | None = None,
    image: str = "image",
    **columns: Any,
) -> Path:
    """A Parquet file in the hub's schema; other columns come before the images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": where} for data, where in zip(images, paths or [None] * len(images), strict=True)]
    table = pa.table({**columns, image: pa.array(rows, IMAGE)})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)
    return path


def class_label(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def test_parquet_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    features = {"kind": class_label("cat", "dog"), "img": {"_type": "Image"}}
    for folder in (tmp_path / "one", tmp_path / "two" / "data"):
        for name, kinds in (
            ("train-00000-of-00002", [0, 1, 1]), ("train-00001-of-00002", [0]), ("validation-00000-of-00001", [1]),
            ("test-00000-of-00001", [1, 0]),
        ):  # fmt: skip
            images = [png(10 * kind + len(name) % 7) for kind in kinds]
            parquet(folder / f"{name}.parquet", list(images), features=features, image="img", label=[9] * len(kinds),
                    kind=kinds)  # fmt: skip
    one, two = open_source(str(tmp_path / "one")), open_source(str(tmp_path / "two"))
    for source in (one, two):
        assert source.val is not None
        assert source.test is not None
        assert [len(part) for part in (source.train, source.val, source.test)] == [4, 1, 2]
        assert source.train.labels is not None
        assert source.train.labels.tolist() == [0, 1, 1, 0]  # the metadata's class label, not the column called label
        assert source.train.class_names == source.test.class_names == ["cat", "dog"]
        assert source.train.read(1).shape == (3, 4, 3)
        assert int(source.train.read(1)[0, 0, 0]) - int(source.train.read(3)[0, 0, 0]) == 10
        assert source.train.size(3) == (3, 4)
        assert source.train.name(3) == "row 3"
    assert one.train.fingerprint == two.train.fingerprint
    assert one.train.fingerprint != (one.test or one.train).fingerprint
    copy = pickle.loads(pickle.dumps(one.train))
    np.testing.assert_array_equal(copy.read(3), one.train.read(3))
    assert copy.fingerprint == one.train.fingerprint
    assert pickle.dumps(one.train).count(b"PNG") == 0  # file names only


def test_parquet_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [png(1), png(2)], label=[3, 0], name=["b", "a"], raw=[png(7), png(8)])
    part = open_source(str(path)).train
    assert part.labels is not None
    assert part.labels.tolist() == [3, 0]
    assert part.class_names == ["0", "1", "2", "3"]
    assert part.read(1)[0, 0, 0] == 2
    other = open_source(str(path), image_column="raw", label_column="name").train
    assert other.labels is not None
    assert (other.class_names, other.labels.tolist()) == (["a", "b"], [1, 0])
    assert other.read(1)[0, 0, 0] == 8
    assert "--image-column imgae" in problem(path, image_column="imgae")
    assert "did you mean image" in problem(path, image_column="imgae")
    assert "not encoded images" in problem(path, image_column="name")
    assert "--label-column nmae" in problem(path, label_column="nmae")
    assert "integers or strings" in problem(path, label_column="raw")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    assert "no image column" in problem(tmp_path / "text.parquet")
    assert "text (string), label (int64)" in problem(tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as Parquet" in problem(tmp_path / "broken.parquet")


def test_parquet_labels_that_are_missing_or_wrong(tmp_path: Path) -> None:
    features = {"label": class_label("cat", "dog")}
    data: list[bytes | None] = [png(), png()]
    some = open_source(str(parquet(tmp_path / "a.parquet", data, label=[1, None], features=features))).train
    assert some.labels is not None
    assert some.labels.tolist() == [1, -1]
    none = open_source(str(parquet(tmp_path / "b.parquet", data, label=[-1, -1], features=features))).train
    assert (none.labels, none.class_names) == (None, None)
    assert "0..5" in problem(parquet(tmp_path / "c.parquet", data, label=[5, 0], features=features))
    loose = parquet(tmp_path / "d.parquet", data, label=[10**12, 0])  # some number that happens to be called label
    assert open_source(str(loose)).train.labels is None
    assert "--label-column label" in problem(loose, label_column="label")
    parquet(tmp_path / "e" / "train.parquet", data, label=[0, 1], features=features)
    parquet(tmp_path / "e" / "test.parquet", data, label=[0, 1], features={"label": class_label("dog", "cat")})
    assert "the classes of test" in problem(tmp_path / "e")


def test_parquet_rows_that_point_to_files(tmp_path: Path) -> None:
    make_tree(tmp_path / "set" / "sub", "x.png", "in.png")
    make_tree(tmp_path, "secret.png")
    (tmp_path / "set" / "sneaky.png").symlink_to(tmp_path / "secret.png")
    paths = ["sub/in.png", "../secret.png", str(tmp_path / "secret.png"), "sneaky.png", None]
    path = parquet(tmp_path / "set" / "x.parquet", [None] * 5, list(paths))
    part = open_source(str(path)).train
    assert part.read(0)[0, 0, 0] == 1
    for row in (1, 2, 3):
        with pytest.raises(BadImage, match="leaves"):
            part.read(row)
        with pytest.raises(BadImage, match="leaves"):
            part.size(row)
    with pytest.raises(BadImage, match="no image in this row"):
        part.read(4)
    make_tree(tmp_path / "other" / "sub", "a.png", "b.png", "in.png")  # each row starts from its own file's folder
    other = parquet(tmp_path / "other" / "y.parquet", [None], ["sub/in.png"])
    both = TablePart([str(path), str(other)], "image", 3, None, None)
    assert [int(both.read(row)[0, 0, 0]) for row in (0, 5)] == [1, 2]


def test_parquet_folders_that_are_not_clear(tmp_path: Path) -> None:
    parquet(tmp_path / "one" / "extra.parquet", [png()])
    assert len(open_source(str(tmp_path / "one")).train) == 1  # no part in the name: training
    parquet(tmp_path / "one" / "train.parquet", [png()])
    assert "extra.parquet" in problem(tmp_path / "one")
    parquet(tmp_path / "two" / "test.parquet", [png()])
    parquet(tmp_path / "two" / "val.parquet", [png()])
    assert "training part" in problem(tmp_path / "two")
    assert len(open_source(str(tmp_path / "two" / "test.parquet")).train) == 1
    parquet(tmp_path / "three" / "plain" / "train" / "0000.parquet", [png()])
    parquet(tmp_path / "three" / "plain" / "test" / "0000.parquet", [png(), png()])
    assert len(open_source(str(tmp_path / "three")).test or ()) == 2
    parquet(tmp_path / "three" / "noisy" / "train.parquet", [png()])
    assert f"{tmp_path}/three/plain" in problem(tmp_path / "three")
    pq.write_table(pa.table({"feature": [1.0]}), make_tree(tmp_path / "four", "a.png") / "features.parquet")
    assert listed(open_source(str(tmp_path / "four")).train) == ["a.png"]


@pytest.mark.skipif(not (SHARED / "data" / "cifar10").exists(), reason="../shared/data/cifar10 is not here")
def test_the_shared_cifar10() -> None:
    source = open_source(str(SHARED / "data" / "cifar10"))
    assert source.test is not None
    assert (source.name, len(source.train), len(source.test), source.val) == ("cifar10", 50_000, 10_000, None)
    assert source.train.class_names == CIFAR10
    assert source.train.labels is not None
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    assert source.train.read(49_999).shape == (32, 32, 3)
    assert source.test.size(0) == (32, 32)


def test_parts_by_the_word_in_a_files_name(tmp_path: Path) -> None:
    """Wherever it stands and whatever is around it; of several the first, where it begins the name."""
    names = {
        "a": ["cifar10-train", "cifar10-test"], "b": ["train0", "train1", "test0"], "c": ["my train", "my test"],
        "d": ["train-no-test", "test-no-train"],
    }  # fmt: skip
    for folder, files in names.items():
        for number, name in enumerate(files):
            parquet(tmp_path / folder / f"{name}.parquet", [png(number)])
        source = open_source(str(tmp_path / folder))
        assert source.test is not None, folder
        assert (len(source.train), len(source.test)) == (len(files) - 1, 1), folder
    for name in ("pets-0", "pets-1"):
        parquet(tmp_path / "e" / f"{name}.parquet", [png(1)])
    assert len(open_source(str(tmp_path / "e")).train) == 2
