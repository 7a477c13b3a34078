"""`maekit check-data`: what a folder holds and which files cannot be read, without training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from conftest import NEEDS_FORK
from image_files import PLAIN, encoded, good_files, make_corpus, photograph, png16
from pair_files import annotation, picture
from PIL import Image
from test_cli import run
from test_parquet import class_label, parquet

from maekit import cli
from maekit.config import UserError
from maekit.data.sources import open_source
from maekit.data.survey import summary, survey

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    base = tmp_path_factory.mktemp("check")
    bad = make_corpus(base / "images")
    (base / "images" / "deleted.png").unlink()
    (base / "images" / "denied.png").unlink()
    return base, {name: words for name, words in bad.items() if name not in ("deleted.png", "denied.png")}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_corpus_is_reported(
    workers: str, corpus: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; the report names every bad file with its reason, in order; the screen the first 20."""
    base, bad = corpus
    out = base / "reports" / f"{workers}.json"
    words = ["check-data", "--data", str(base / "images"), "--workers", workers, "--out", str(out)]
    code, error = run(capsys, *words)
    assert (code, error) == (1, "")
    report = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert {record["name"] for record in report["bad"]} == bad.keys()
    assert all(record["part"] == "train" for record in report["bad"])
    ids = [record["id"] for record in report["bad"]]
    assert ids == sorted(ids)
    for record in report["bad"]:
        assert bad[record["name"]] in record["reason"] or record["name"].startswith("cut1."), record
    train = report["parts"]["train"]
    readable = PLAIN + len(good_files())
    assert (train["readable"], train["bad"], train["images"]) == (readable, len(bad), readable + len(bad))
    assert (train["height"]["min"], train["height"]["max"]) == (1, 20_000)
    assert train["sixteen_bit_or_float"] == 2
    assert report == json.loads((out.parent / "0.json").read_text())


def test_the_screen_shows_the_first_bad_files(
    corpus: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    from maekit import cli

    base, bad = corpus
    assert cli.main(["check-data", "--data", str(base / "images"), "--workers", "0"]) == 1
    text = capsys.readouterr().out
    assert text.count("cannot be read:") == 20
    assert f"... and {len(bad) - 20} more: --out FILE names all" in text


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes, gray, 16 bits and labels of a folder per class with a test part; a name that looks like markup."""
    sizes = {"train/[red]/a.png": (10, 20), "train/dog/b.png": (30, 20), "train/dog/c.png": (12, 24)}
    for name, (height, width) in sizes.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(1, height, width).save(path)
    Image.new("L", (8, 9)).save(tmp_path / "set" / "train" / "dog" / "gray.png")
    (tmp_path / "set" / "test" / "dog").mkdir(parents=True)
    wide = np.full((5, 6, 3), 300, np.uint16) + np.arange(3, dtype=np.uint16)
    (tmp_path / "set" / "test" / "dog" / "x.png").write_bytes(png16(wide))
    out = tmp_path / "r.json"
    assert run(capsys, "check-data", "--data", str(tmp_path / "set"), "--out", str(out), "--workers", "1") == (0, "")
    assert json.loads(out.read_text())["bad"] == []
    parts = json.loads(out.read_text())["parts"]
    assert parts["train"] == {
        "images": 4, "readable": 4, "bad": 0, "height": {"min": 9, "median": 10, "max": 30},
        "width": {"min": 8, "median": 20, "max": 24}, "eight_bit": 4, "sixteen_bit_or_float": 0, "gray": 1,
        "with_frames_left_out": 0, "frames_left_out": 0,
        "labels": {"[red]": 1, "dog": 3}, "groups": None,
    }  # fmt: skip
    assert (parts["test"]["sixteen_bit_or_float"], parts["test"]["eight_bit"], parts["test"]["gray"]) == (1, 0, 0)


def test_pages_that_nothing_reads_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stack of microscopy in a folder: its first page is an image, the others are counted, or they are channels."""
    for name, pages in (("a", 4), ("b", 4), ("c", 1)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((pages, 6, 7), np.uint8), photometric="minisblack")
    from maekit import cli

    words = ["check-data", "--data", str(tmp_path), "--workers", "0"]
    assert cli.main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "only the first page or frame is read of 2 files, and 6 others are left out" in text
    (tmp_path / "c.tif").unlink()
    assert cli.main([*words, "--in-chans", "4"]) == 0
    assert "first page" not in capsys.readouterr().out


def test_another_number_of_channels_is_told_as_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Satellite scenes of six bands are not broken: one line tells what reads them, and none where they are read."""
    for index in range(3):
        tifffile.imwrite(tmp_path / f"{index}.tif", np.full((6, 8, 8), index, np.uint16), photometric="minisblack")
    (tmp_path / "empty.tif").write_bytes(b"")
    from maekit import cli

    words = ["check-data", "--data", str(tmp_path), "--workers", "0"]
    assert cli.main([*words, "--in-chans", "5"]) == 1
    assert "3 of these have 6 channels: --in-chans 6 reads them" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*words, "--in-chans", "6"]) == 1
    assert "channels: --in-chans" not in capsys.readouterr().out


def test_parquet_and_known_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows without an image are bad; unlabelled rows are counted; a known name needs no file."""
    rows: list[bytes | None] = [encoded(photograph(1)), None, encoded(photograph(2))]
    path = parquet(tmp_path / "x.parquet", rows, label=[0, 1, -1], features={"label": class_label("cat", "dog")})
    out = tmp_path / "r.json"
    assert run(capsys, "check-data", "--data", str(path), "--out", str(out), "--workers", "2") == (1, "")
    report = json.loads(out.read_text())
    assert report["bad"] == [{"part": "train", "id": 1, "name": "row 1", "reason": "no image in this row"}]
    assert report["parts"]["train"]["labels"] == {"cat": 1, "dog": 1, "": 1}
    assert run(capsys, "check-data", "--data", "digits", "--in-chans", "1", "--workers", "0") == (0, "")


def test_user_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code 2 and the flag's name; an --out that cannot be written is found before anything is read."""
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["--data", "nowhere/images"], "--data nowhere/images"),
        (["--data", "digits", "--workers", "-1"], "--workers -1"),
        (["--data", "digits", "--in-chans", "0"], "--in-chans 0"),
        (["--data", "digits", "--out", str(tmp_path)], "is a folder"),
        (["--data", "digits", "--out", str(tmp_path / "file" / "r.json")], "cannot be written"),
        (["--data", str(tmp_path / "file")], "nameless"),
        ([], "data"),
    ):
        code, error = run(capsys, "check-data", *words)
        assert (code, expected in error) == (2, True), (words, error)


@NEEDS_FORK
def test_a_reader_that_dies_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system kills a process that takes too much memory: said, with the place. (On Python 3.13 the others, which
    ignore SIGTERM, were waited for without end.)
    """
    for index in range(40):
        photograph(index).save(tmp_path / f"{index:02d}.png")
    part = open_source(str(tmp_path)).train

    def read(index: int) -> Any:
        return os._exit(9) if index == 35 else np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(part, "read", read)
    with pytest.raises(UserError, match=r"died near \d\d.png.*--workers 0"):
        survey(part, 2, lambda done, total: None, lambda bad: None)


def test_a_median_of_counts() -> None:
    from collections import Counter

    values = [3, 3, 9, 1, 100, 7]
    assert summary(Counter(values)) == {"min": 1, "median": sorted(values)[2], "max": 100}
    assert summary(Counter()) == {}


@pytest.mark.parametrize("form", ["train/images", "one folder", "csv", "parquet"])
def test_annotations_are_found_as_segment_finds_them(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask = ("train/images/a.png", "train/masks/a.png") if form != "one folder" else ("a.png", "a_mask.png")
    data = tmp_path / "data"
    picture(data / image)
    annotation(data / mask, np.tile([1, 2, 2], (6, 3)))
    if form == "csv":
        data = tmp_path / "pairs.csv"
        data.write_text(f"image,mask\ndata/{image},data/{mask}\n")
    elif form == "parquet":
        columns = {name: [{"bytes": (data / path).read_bytes()}] for name, path in (("image", image), ("label", mask))}
        data = tmp_path / "pairs.parquet"
        pq.write_table(pa.table(columns), data)
    assert cli.main(["check-data", "--data", str(data), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "annotations of train, 1, shares of the pixels: class 1 (value 1) 33.3%, class 2 (value 2) 66.7%" in said
    assert "train: " not in said.replace("of train, ", ""), "no classes of whole images"
