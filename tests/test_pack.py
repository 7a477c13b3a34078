"""maekit pack: what other tools find in the shards, what stays out of them, and that none is ever half there."""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from image_files import encoded, photograph, png16
from PIL import Image

from maekit import cli
from maekit.config import PackConfig, UserError
from maekit.data import rows, shards
from maekit.data.images import BadImage
from maekit.data.parquet import TablePart
from maekit.data.parts import EncodedPart
from maekit.data.rows import INDEX_KEY, GroupedRows, LoadedRows, PlacedRows
from maekit.data.sources import open_source
from maekit.tasks import pack


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def packed(data: Path, out: Path, *flags: str) -> int:
    return cli.main(["pack", "--data", str(data), "--out", str(out), "--workers", "0", *flags])


def table(folder: Path, part: str = "train") -> list[dict[str, Any]]:
    """All rows by pyarrow alone."""
    return [row for file in sorted(folder.glob(f"{part}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def opened(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A labelled folder in parts, and its shards of at most 100 rows."""
    base = tmp_path_factory.mktemp("pack")
    for index in range(250):
        image = photograph(index, 30 + index % 7, 40)
        save(base / "data" / "train" / f"class-{index % 3}" / f"{index:03d}.png", image)
    for index in range(4):
        save(base / "data" / "val" / "class-1" / f"{index}.png", photograph(index, 40, 30))
    assert packed(base / "data", base / "shards", "--size", "20", "--shard-size", "0.05") == 0
    return base / "data", base / "shards"


def test_pyarrow_and_pillow_read_the_shards(folders: tuple[Path, Path]) -> None:
    """Names, schema, order, labels and paths of the hub's form; the pixels are Pillow's own resize and JPEG."""
    data, out = folders
    names = sorted(path.name for path in out.iterdir())
    count = len(names) - 1
    assert count > 1
    train = [f"train-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
    assert names == sorted([*train, "validation-00000-of-00001.parquet"])
    schema = pq.read_schema(out / names[0])
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["class-0", "class-1", "class-2"], "_type": "ClassLabel"}
    expected = sorted((data / "train").glob("*/*.png"))
    found = table(out)
    assert [row["image"]["path"] for row in found] == [str(path.relative_to(data)) for path in expected]
    assert [row["label"] for row in found] == [int(path.parent.name[-1]) for path in expected]
    for row, path in list(zip(found, expected, strict=True))[::17]:
        image = Image.open(path)
        zoom = 20 / min(image.size)
        resized = image.resize((round(image.width * zoom), round(image.height * zoom)), Image.Resampling.BICUBIC)
        assert row["image"]["bytes"] == encoded(resized, "JPEG", quality=95)
    assert [row["label"] for row in table(out, "validation")] == [1] * 4


def test_maekit_reads_the_shards_by_place(folders: tuple[Path, Path]) -> None:
    """Every row, in any order, as pyarrow and Pillow; nothing is held but the places."""
    _, out = folders
    source = open_source(str(out))
    part = source.train
    assert isinstance(part, TablePart) and isinstance(part.rows, PlacedRows)
    found = table(out)
    assert len(part) == len(found) == 250
    assert source.val is not None and len(source.val) == 4
    assert part.labels is not None and part.labels.tolist() == [row["label"] for row in found]
    assert part.class_names == ["class-0", "class-1", "class-2"]
    for index in np.random.default_rng(0).permutation(250):
        assert np.array_equal(part.read(int(index)), np.asarray(opened(found[index])))
    assert part.path(249) == found[249]["image"]["path"]
    assert part.size(0) == opened(found[0]).size[::-1]


def test_all_ways_to_read_a_table_agree(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By place, from memory, and by row groups (of a table too large for memory): bytes, paths, numbers of rows."""
    files = sorted(str(path) for path in folders[1].glob("train*"))
    placed = rows.open_rows(files, "image")
    loaded, grouped = LoadedRows(files, "image"), GroupedRows(files, "image")
    assert isinstance(placed, PlacedRows)
    for index in [0, 99, 100, 249, 3]:
        assert placed.encoded(index) == loaded.encoded(index) == grouped.encoded(index) is not None
        assert placed.path(index) == loaded.path(index) == grouped.path(index) is not None
    for one in (loaded, grouped):
        assert one.first_rows.tolist() == placed.first_rows.tolist()
    assert np.array_equal(placed.lengths(), loaded.lengths())
    assert len(grouped._kept) <= rows._GROUPS_KEPT
    monkeypatch.setattr(rows, "_places", lambda file, column: None)
    assert isinstance(rows.open_rows(files, "image"), LoadedRows)
    monkeypatch.setattr(rows, "IN_MEMORY", 1000)
    part = TablePart(files, "image", 3, None, None)
    assert isinstance(part.rows, GroupedRows)
    assert np.array_equal(part.read(200), np.asarray(opened(table(folders[1])[200])))
    assert len(part.fingerprint) == 64


def test_an_index_that_does_not_fit_is_not_believed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A table that another tool wrote anew keeps the footer's entry; and an index may be anything."""
    first = sorted(folders[1].glob("train*"))[0]
    whole = pq.read_table(first)
    index = pq.ParquetFile(first).metadata.metadata[INDEX_KEY]
    for number, entry in enumerate(
        [
            index,
            b"{",
            b'{"column": "image", "end": 4, "places": ""}',
            b'{"column": "image", "end": "x", "places": "AAAA"}',
        ]
    ):
        again = tmp_path / f"{number}.parquet"
        pq.write_table(whole.replace_schema_metadata({**(whole.schema.metadata or {}), INDEX_KEY: entry}), again)
        assert pq.ParquetFile(again).metadata.metadata[INDEX_KEY] == entry
        part = open_source(str(again)).train
        assert isinstance(part, TablePart) and isinstance(part.rows, LoadedRows)
        assert np.array_equal(part.read(7), open_source(str(first)).train.read(7))


@pytest.mark.parametrize(("shift", "longer", "believed"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_the_places_and_the_end_must_both_fit(
    shift: int, longer: int, believed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def index(column: str, places: Any, end: int) -> bytes:
        return rows.make_index(column, places + np.array([shift, 0]), end + longer)

    monkeypatch.setattr(shards, "make_index", index)
    writer = shards.ShardWriter(tmp_path, "train", None, 1_000_000)
    for number in range(3):
        writer.add(encoded(photograph(number)), "x.png", -1)
    writer.finish()
    part = open_source(str(tmp_path)).train
    assert isinstance(part, TablePart) and isinstance(part.rows, PlacedRows) == believed
    assert np.array_equal(part.read(2), np.asarray(photograph(2)))


def test_a_shard_that_changes_under_a_run_is_a_bad_image(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Cut short or overwritten after it was opened: a reason, neither a crash nor another image."""
    shard = tmp_path / "train.parquet"
    shard.write_bytes(sorted(folders[1].glob("train*"))[0].read_bytes())
    part = open_source(str(shard)).train
    part.read(0)
    os.truncate(shard, 1000)
    with pytest.raises(BadImage, match="changed since it was packed"):
        part.read(50)
    shard.write_bytes(b"\xff" * 10**6)
    with pytest.raises(BadImage, match="changed since it was packed"):
        part.read(60)


def test_opening_shards_takes_16_bytes_an_image(tmp_path: Path) -> None:
    """3,000 images of 1.2 kB: what a part holds does not grow with what they weigh."""
    writer = shards.ShardWriter(tmp_path, "train", None, 1_000_000)
    noise = np.random.default_rng(0)
    for index in range(3000):
        writer.add(noise.bytes(1200), f"{index}.jpg", -1)
    writer.finish()
    assert writer.shards == 4
    before = pa.total_allocated_bytes()
    part = open_source(str(tmp_path)).train
    assert isinstance(part, TablePart) and isinstance(part.rows, PlacedRows)
    held = part.rows._places_N2.nbytes + part.rows.first_rows.nbytes
    assert held == 16 * 3000 + 8 * 5
    for index in range(3000):
        assert len(part.rows.encoded(index) or b"") == 1200
    assert pa.total_allocated_bytes() - before < 100_000


# ---- images ----


def test_never_enlarged_turned_upright_and_gray_stays_gray(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "data" / "a.png", photograph(0, 10, 12))
    save(tmp_path / "data" / "b.jpg", photograph(1, 50, 100), exif=exif, quality=95)
    save(tmp_path / "data" / "c.png", photograph(2, 40, 60).convert("L"))
    save(tmp_path / "data" / "d.jpg", photograph(3, 900, 1200), quality=95)  # decoded smaller
    assert packed(tmp_path / "data", tmp_path / "out", "--size", "20", "--format", "png") == 0
    images = [opened(row) for row in table(tmp_path / "out")]
    assert [image.size for image in images] == [(12, 10), (20, 40), (30, 20), (27, 20)]
    assert [image.mode for image in images] == ["RGB", "RGB", "L", "RGB"]
    assert np.array_equal(np.asarray(images[0]), np.asarray(photograph(0, 10, 12)))
    upright = Image.open(tmp_path / "data" / "b.jpg").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(images[1]), np.asarray(upright.resize((20, 40), Image.Resampling.BICUBIC)))
    assert not images[1].getexif()
    full = Image.open(tmp_path / "data" / "d.jpg").resize((27, 20), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(full, np.int64) - np.asarray(images[3])).mean() < 1.5


def test_sixteen_bits_and_floats(tmp_path: Path) -> None:
    """16-bit gray is kept whole as PNG; JPEG, colour and floats are refused with a reason, and nothing is left."""
    gray = np.random.default_rng(0).integers(0, 65536, (12, 14, 1)).astype(np.uint16)
    for name, content in [
        ("gray", png16(gray)),
        ("colour", png16(np.repeat(gray, 3, 2) // np.array([1, 2, 3], np.uint16))),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(content)
    (tmp_path / "float").mkdir()
    tifffile.imwrite(tmp_path / "float" / "x.tif", np.linspace(-3, 5, 100, dtype=np.float32).reshape(10, 10))
    assert packed(tmp_path / "gray", tmp_path / "out", "--format", "png") == 0
    assert np.array_equal(np.asarray(opened(table(tmp_path / "out")[0])), gray[..., 0])
    part = open_source(str(tmp_path / "out")).train
    assert np.array_equal(part.read(0), open_source(str(tmp_path / "gray")).train.read(0))
    for name, form, words in [
        ("gray", "jpeg", "x.png: 16-bit gray.*--format png"),
        ("colour", "png", "x.png: 16-bit colour"),
        ("float", "png", "x.tif: float data"),
    ]:
        config = PackConfig(data=str(tmp_path / name), out=str(tmp_path / "no"), format=form, workers=0)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words):
            pack.main(config)
    assert {path.name for path in tmp_path.iterdir()} == {"gray", "colour", "float", "out"}


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(20):
        save(tmp_path / "data" / f"{index:02d}.png", photograph(index))
    (tmp_path / "data" / "07.png").write_bytes(b"")
    assert packed(tmp_path / "data", tmp_path / "no", "--max-bad-share", "0") == 2
    assert "so far 1 of 20 images cannot be read, and --max-bad-share 0 allows 0 (07.png: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert packed(tmp_path / "data", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "07.png: empty file" in said and "19 in 1 shards" in said
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"part": "train", "id": 7, "name": "07.png", "reason": "empty file"}
    ]
    assert len(open_source(str(tmp_path / "out")).train) == 19


def test_processes_write_what_one_writes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = folders
    flags = ["--size", "20", "--shard-size", "0.05", "--workers", "2"]
    assert cli.main(["pack", "--data", str(data), "--out", str(tmp_path / "again"), *flags]) == 0
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_packing_shards_again_keeps_paths_and_labels(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert packed(folders[1], tmp_path / "small", "--size", "10") == 0
    before, after = table(folders[1]), table(tmp_path / "small")
    assert [(row["image"]["path"], row["label"]) for row in after] == [
        (row["image"]["path"], row["label"]) for row in before
    ]


def test_what_the_images_took_before_is_told_for_files_archives_and_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 400, 300, 3), np.uint8)
    for index, image in enumerate(noise):
        save(tmp_path / "data" / f"{index}.png", Image.fromarray(image))
    taken = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "data").iterdir():
            archive.write(path, path.name)
    for number, data in enumerate(("data", "data.zip")):
        assert packed(tmp_path / data, tmp_path / f"shards-{number}", "--size", "64") == 0
        assert f"{taken / 1e6:,.1f} MB before" in capsys.readouterr().out
    stored = sum(len(row["image"]["bytes"]) for row in table(tmp_path / "shards-0"))
    part = open_source(str(tmp_path / "shards-0")).train
    assert isinstance(part, EncodedPart)
    assert sum(map(part.stored_bytes, range(3))) == stored


def test_small_images_of_one_size_are_told_to_gain_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        save(tmp_path / "data" / f"{index}.png", photograph(index, 32, 32))
    assert packed(tmp_path / "data", tmp_path / "out") == 0
    assert "32 x 32, not above --size 256" in capsys.readouterr().out


# ---- whole or not at all ----


@pytest.mark.parametrize("when", ["midway", "at the end"])
def test_a_stopped_pack_leaves_nothing(
    when: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal after the first shards, and by a full disk when the last is closed."""
    finish, add = shards.ShardWriter.finish, shards.ShardWriter.add

    def full(self: shards.ShardWriter) -> None:
        finish(self)
        raise OSError(28, "No space left on device")

    def interrupted(self: shards.ShardWriter, *row: Any) -> None:
        add(self, *row)
        if self.rows == 220:
            assert any((tmp_path / ".out.packing").iterdir())
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, *(("add", interrupted) if when == "midway" else ("finish", full)))
        assert packed(folders[0], tmp_path / "out", "--shard-size", "0.05") == (143 if when == "midway" else 2)
    assert list(tmp_path.iterdir()) == []
    assert packed(folders[0], tmp_path / "out", "--size", "20") == 0


def test_a_folder_that_is_not_free_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Not empty, a file, left over from a pack that was killed; and every other problem at the same time."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / ".killed.packing").mkdir()
    (tmp_path / "empty").mkdir()
    for name, words in [("full", "not empty"), ("full/x", "not empty"), ("killed", r"\.killed\.packing")]:
        with pytest.raises(UserError, match=words):
            pack.main(PackConfig(data=str(folders[0]), out=str(tmp_path / name), workers=0))
    with pytest.raises(UserError) as caught:
        pack.main(PackConfig(data="x", out="", size=0, quality=101, shard_size=0, max_bad_share=2, workers=-1))
    for flag in ("--size 0", "--quality 101", "--shard-size 0", "--max-bad-share 2", "--workers -1", "--out"):
        assert any(flag in problem for problem in caught.value.problems)
    assert packed(folders[0], tmp_path / "empty", "--size", "20") == 0
    assert (tmp_path / "full" / "x").exists()


def test_what_is_left_out_of_the_parts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "extra"):
        save(tmp_path / "data" / name / "a.png", photograph(1, 40, 30))
    assert packed(tmp_path / "data", tmp_path / "shards") == 0
    assert "left out, since" in capsys.readouterr().out
