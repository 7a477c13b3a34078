"""Pages and frames that nothing reads are told once at the start of every command, at the cost of a few headers; and
pictures of more than three channels say which ones they show."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tiny_classes
import tiny_runs
from PIL import Image

import maekit
from maekit import cli
from maekit.data import tiff
from maekit.data.images import decode, frames_left_out
from maekit.data.parts import left_out_remark, loose_files
from maekit.data.sources import open_source
from maekit.tasks import finetune
from maekit.training import finetuning, prepare
from maekit.viz.shown import channels_note

SAID = "only the first page or frame of a file is read"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    patch = pytest.MonkeyPatch()
    tiny_runs.without_pictures(patch)
    patch.setattr(finetune, "draw_training", lambda *_, **__: None)
    yield
    patch.undo()


def stacks(folder: Path, count: int = 20, pages: int = 4) -> Path:
    random = np.random.default_rng(1)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            values = random.integers(0, 256, (pages, 8, 8), np.uint8)
            tifffile.imwrite(folder / name / f"{index:02d}.tif", values, photometric="minisblack")
    return folder


def test_a_few_headers_tell_what_nothing_reads(tmp_path: Path) -> None:
    source = open_source(str(stacks(tmp_path / "data")), in_chans=1)
    (line,) = source.remarks()
    assert line.startswith(f"{SAID}, and 16 of 16 files that were looked at have more, such as a/00.tif (4, of which 1")
    assert open_source(str(tmp_path / "data"), in_chans=4).remarks() == [], "pages that are channels are read"
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 90, 200)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.png")
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    paths = [str(tmp_path / name) for name in ("one.png", "film.gif", "broken.tif")]
    (line,) = left_out_remark([loose_files(paths, 3)])
    assert "1 of 2 files" in line and "film.gif (3, of which 1 is read)" in line
    assert left_out_remark([loose_files(paths[:1], 3)]) == []


def test_a_slow_disk_delays_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits half a second for a header looks at one file."""
    part = open_source(str(stacks(tmp_path / "data")), in_chans=1).train
    clock = iter(range(100))
    monkeypatch.setattr("maekit.data.parts.time.monotonic", lambda: 0.3 * next(clock))
    (line,) = left_out_remark([part])
    assert "1 of 1 files" in line


@pytest.mark.parametrize("written", ["at once", "one by one"])
def test_many_pages_are_ordered_quickly_and_alike(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tifffile's own notes, which take it seconds, and without them: the same channels, the same count."""
    values = np.random.default_rng(0).integers(0, 256, (9, 8, 10), np.uint8)
    file = io.BytesIO()
    if written == "at once":
        tifffile.imwrite(file, values, photometric="minisblack")
    else:
        with tifffile.TiffWriter(file) as writer:
            for page in values:
                writer.write(page, contiguous=False)
    for most in (256, 3):
        monkeypatch.setattr(tiff, "MANY_PAGES", most)
        assert np.array_equal(decode(file.getvalue(), 9), values.transpose(1, 2, 0))
        assert np.array_equal(decode(file.getvalue(), 1), values[0][..., None])
        assert [frames_left_out(file.getvalue(), chans) for chans in (1, 9)] == [8, 0]
    asked: list[str] = []
    monkeypatch.setattr(tiff, "_is_loose", lambda *_: asked.append("notes"))
    frames_left_out(file.getvalue(), 1)
    assert not asked


def test_commands_say_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(stacks(tmp_path / "data"))
    source, run = str(tiny_classes.write_encoder(tmp_path / "source")), str(tmp_path / "run")
    tiny = [*tiny_runs.SMALLEST, "--in-chans", "1", "--img-size", "8", "--patch-size", "4", "--batch-size", "8"]
    device = ["--device", "cpu", "--workers", "0"]
    training = [*device, "--batch-size", "8", "--steps", "2", "--warmup-steps", "1", "--compile", "off"]
    commands: dict[str, list[str]] = {
        "pretrain": ["pretrain", "folder", "--data", data, *tiny, "--steps", "2", "--out", str(tmp_path / "pre")],
        "finetune": ["finetune", source, "--data", data, *training, "--out", run],
        "predict": ["predict", run, "--data", data, "--out", str(tmp_path / "p.csv"), *device],
        "embed": ["embed", source, "--data", data, "--out", str(tmp_path / "f.parquet"), "--device", "cpu"],
    }  # fmt: skip
    for name, words in commands.items():
        assert cli.main(words) == 0, (name, capsys.readouterr().err)
        assert " ".join(capsys.readouterr().out.split()).count(SAID) == 1, name


def test_no_command_that_opens_data_forgets_it() -> None:
    """check-data alone prints the notes without, since it counts what is left out in all files."""
    places = [*(Path(maekit.__file__).parent / "tasks").glob("*.py"), Path(prepare.__file__), Path(finetuning.__file__)]
    texts = {path.stem: path.read_text() for path in places}
    openers = {name for name, text in texts.items() if re.search(r"= open_(source|configured)\(", text)}
    assert openers >= {"prepare", "finetuning", "plan", "probe", "embed", "predict", "pack", "reconstruct"}
    said = r"remark\(console, ([\w\[\]]+\.remarks\(\)|remarks_for\()"
    assert {name for name in openers if not re.search(said, texts[name])} == {"check_data"}


def test_which_channels_a_picture_shows() -> None:
    notes = [channels_note(np.zeros((2, 2, channels))) for channels in (1, 2, 3, 13)]
    assert notes[::2] == ["", ""]
    assert "2 channels, shown as red and green" in notes[1]
    assert "13 channels: 1, 2 and 3 are shown" in notes[3]
