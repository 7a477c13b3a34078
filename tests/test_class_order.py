"""The order of classes, whatever form the data have, and what a table that is not understood is told."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_classes import write_images

from maekit.config import UserError
from maekit.data.parts import class_order
from maekit.data.sources import open_source


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (
            ["0.5", "10.0", "-1", "2", "-2"],
            ["-2", "-1", "0.5", "2", "10.0"],
        ),  # pandas writes 10.0 beside missing values
        (["10", "2", "b"], ["10", "2", "b"]),  # names, of which some are numbers
        (["01", "1", "1.0"], ["01", "1", "1.0"]),  # three names of one number stay three classes
        (["\u00f6", "z", "A", "nan"], ["A", "nan", "z", "\u00f6"]),
    ],
)
def test_numbers_are_ordered_as_numbers(names: list[str], ordered: list[str]) -> None:
    assert class_order(names) == ordered


def test_every_form_of_data_has_the_same_order(tmp_path: Path) -> None:
    """Folders, a table and Parquet strings; each image keeps the name of its own class."""
    folder = write_images(tmp_path / "set", {"10": 1, "2": 2, "1": 3})
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.png"))
    table = tmp_path / "set.csv"
    table.write_text("file_name,label\n" + "".join(f"{path},{path.split('/')[1]}\n" for path in paths))
    rows = [{"bytes": (tmp_path / path).read_bytes(), "path": None} for path in paths]
    columns = {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
               "label": [path.split("/")[1] for path in paths]}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    for spec, column in ((folder, None), (table, None), (tmp_path / "set.parquet", "label")):
        part = open_source(str(spec), in_chans=1, label_column=column).train
        assert part.class_names == ["1", "2", "10"]
        assert part.labels is not None
        assert [part.class_names[label] for label in part.labels] == [path.split("/")[1] for path in paths]


def test_other_separators_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name;label\na.png;cat\n")
    with pytest.raises(UserError, match=r"by commas in a [.]csv, by tabs in a [.]tsv, and not by ';'"):
        open_source(str(tmp_path / "a.csv"))
