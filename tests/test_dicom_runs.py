"""maekit/data/dicom.py: whatever is wrong with a DICOM file is one line that names no patient; whole runs on scans."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from dicom_files import GRAY, NAME, PIXELS, RGB, RUN, TABLE, WIDE, dicom, gray, pydicom, run_lengths, sequence
from image_files import encoded, png, reason
from PIL import Image
from pydicom import uid

from maekit import cli
from maekit.data import dicom as reader
from maekit.data.annotations import orientation
from maekit.data.images import IMAGE_SUFFIXES, BadImage, decode, frames_left_out, probe_size
from maekit.data.sources import open_source

# ---- faults ----

CUT = "broken or truncated DICOM"


def test_truncated_files_are_bad(capfd: pytest.CaptureFixture[str]) -> None:
    jpeg = encoded(Image.fromarray(RGB), "JPEG")
    files = [dicom(WIDE, bits=12), run_lengths(WIDE), dicom(RGB, syntax=uid.JPEGBaseline8Bit, frames=[jpeg])]
    files.append(dicom(GRAY, syntax=uid.JPEG2000, frames=[encoded(Image.fromarray(GRAY), "JPEG2000", no_jp2=True)]))
    for data in files:
        decode(data, 3)
        pixels = data.index(PIXELS)
        for end in (133, 150, 200, pixels - 9, pixels, pixels + 6, pixels + 12, pixels + 30, len(data) - 60):
            assert "truncated" in reason(data[:end]), end
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image_says_so() -> None:
    assert "without pixels" in reason(dicom(GRAY, PixelData=None))
    assert reason(dicom(GRAY, Rows=None)) == CUT
    assert "neither gray" in reason(dicom(RGB, PhotometricInterpretation="HSV"))
    assert "neither gray" in reason(dicom(GRAY, PhotometricInterpretation="RGB"))
    assert "YBR colours of 16 bits" in reason(dicom(RGB.astype(np.uint16), PhotometricInterpretation="YBR_FULL"))
    assert reason(dicom(GRAY, RescaleSlope="1e999", RescaleIntercept="0")) == "values that are not finite"
    assert reason(dicom(GRAY, BitsStored=12)) == CUT
    unknown = dicom(WIDE).replace(uid.ExplicitVRLittleEndian.encode(), b"1.2.3.4.5.6.7.8.901")
    assert reason(unknown) == "DICOM of transfer syntax 1.2.3.4.5.6.7.8.901, which is not read"
    assert "MPEG2" in reason(dicom(WIDE, syntax=uid.MPEG2MPML, frames=[b"film"]))
    beyond = encoded(Image.fromarray((WIDE * 16).astype(np.uint16)), "JPEG2000", no_jp2=True)
    assert "beyond" in reason(dicom(WIDE, bits=12, syntax=uid.JPEG2000Lossless, frames=[beyond]))


def test_content_is_known_by_its_preamble(tmp_path: Path) -> None:
    assert {".dcm", ".dicom"} <= IMAGE_SUFFIXES
    (tmp_path / "x.png").write_bytes(dicom(GRAY))
    (tmp_path / "x.dcm").write_bytes(png(7))
    np.testing.assert_array_equal(decode(tmp_path / "x.png", 1)[..., 0], GRAY)
    assert decode(tmp_path / "x.dcm", 1).max() == 7
    both = b"II*\0" + dicom(GRAY)[4:]  # a TIFF too, as some slides are
    np.testing.assert_array_equal(decode(both, 1)[..., 0], GRAY)
    assert orientation(dicom(GRAY)) == 1


def test_bombs_are_refused() -> None:
    with pytest.raises(BadImage, match="bomb"):
        probe_size(dicom(GRAY, Rows=60_000, Columns=60_000))
    assert "bomb" in reason(dicom(GRAY, Rows=60_000, Columns=60_000))
    header = pydicom.dcmread(io.BytesIO(dicom(np.zeros((2000, 2000), np.uint8))))
    header.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    header.save_as(buffer)
    assert "deflated" in reason(buffer.getvalue())
    with pytest.raises(BadImage, match="deflated"):
        probe_size(buffer.getvalue())
    # run lengths: 128 bytes of every two, for an image of 13 x 18; and next to none for a large one
    many = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 500_000
    assert "bomb" in reason(dicom(GRAY, syntax=uid.RLELossless, frames=[many]))
    few = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0"
    assert "bomb" in reason(dicom(GRAY, syntax=uid.RLELossless, frames=[few], Rows=9000, Columns=9000))
    offsets, lengths = struct.pack("<Q", 0), struct.pack("<Q", len(many))
    hidden = dicom(GRAY, syntax=uid.RLELossless, frames=[many], ExtendedOffsetTable=offsets,
                   ExtendedOffsetTableLengths=lengths)  # fmt: skip
    assert "bomb" in reason(hidden)


def spliced(before: bytes) -> bytes:
    """A file with more bytes before its pixels."""
    data = dicom(GRAY)
    at = data.index(PIXELS)
    return data[:at] + before + data[at:]


def test_headers_that_would_fill_memory_or_stack_are_refused() -> None:
    endless = struct.pack("<HH2sHL", 0x0040, 0x0100, b"SQ", 0, 0xFFFFFFFF)
    item, end = struct.pack("<HHL", 0xFFFE, 0xE000, 0), struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    np.testing.assert_array_equal(gray(spliced(endless + item * 1000 + end)), GRAY)
    assert "bomb" in reason(spliced(endless + item * (reader.MAX_READS + 1) + end))
    nested = endless + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    assert "DICOM" in reason(spliced(nested * 100_000))
    items = item * (reader.MAX_READS + 1)
    table = struct.pack("<HH2sHL", 0x0028, 0x3000, b"SQ", 0, len(items)) + items
    assert "bomb" in reason(spliced(table))


def test_noise_raises_nothing_but_bad_image_and_names_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    jpeg = encoded(Image.fromarray(RGB), "JPEG")
    table = sequence(**TABLE)
    files = [dicom(WIDE, bits=12, ModalityLUTSequence=table), run_lengths(RGB), dicom(GRAY, NumberOfFrames="1")]
    files.append(dicom(RGB, syntax=uid.JPEGBaseline8Bit, frames=[jpeg], PhotometricInterpretation="YBR_FULL_422"))
    reasons: list[str] = []
    for data in files:
        for _ in range(150):
            noisy = bytearray(data)
            for at in rng.integers(132, len(data), 4):
                noisy[at] = rng.integers(0, 256)
            for call in (lambda d: decode(d, 3), probe_size, lambda d: frames_left_out(d, 3)):
                try:
                    call(bytes(noisy))
                except BadImage as error:
                    reasons.append(str(error))
    assert len(reasons) > 100
    assert all(0 < len(text) < 200 and text.isprintable() and NAME[:4] not in text for text in reasons)
    assert capfd.readouterr() == ("", "")


def test_nothing_of_a_header_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A number that is a name, damage that pydicom logs or warns of: only our own words come out."""
    one, other = (b"\x28\0\x08\0IS" + struct.pack("<H", len(text)) + text for text in (b"1 ", NAME.encode()))
    files = [dicom(GRAY, NumberOfFrames="1").replace(one, other)]
    files.append(dicom(GRAY, PhotometricInterpretation=NAME[:3]))
    files.append(dicom(GRAY, syntax=uid.JPEG2000, frames=[b"\xff\x4f\xff\x51" + NAME.encode()]))
    files.append(dicom(GRAY).replace(uid.ExplicitVRLittleEndian.encode(), b"DOE^JANE, 12345.678"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with caplog.at_level(logging.DEBUG):
            for data in files:
                assert "DOE" not in reason(data), reason(data)
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


# ---- as data ----


def test_every_form_of_data_reads_it(tmp_path: Path) -> None:
    scan = dicom(WIDE, bits=12, Modality="CT", RescaleSlope="1", RescaleIntercept="-1024")
    (tmp_path / "scans").mkdir()
    for name in ("a.dcm", "b.DICOM"):
        (tmp_path / "scans" / name).write_bytes(scan)
    (tmp_path / "scans" / "IM000001").write_bytes(scan)  # as many archives name them: by a list only
    (tmp_path / "list.txt").write_text("scans/IM000001\nscans/a.dcm\n")
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        for name in ("a.dcm", "b.dcm"):
            archive.writestr(name, scan)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([{"bytes": scan, "path": None}] * 2, kind)}), tmp_path / "x.parquet")
    for spec in ("scans", "list.txt", "scans.zip", "x.parquet"):
        part = open_source(str(tmp_path / spec)).train
        assert len(part) == 2
        for index in range(2):
            assert part.size(index) == WIDE.shape
            np.testing.assert_array_equal(part.read(index)[..., 0], WIDE.astype(np.float32) - 1024)


@pytest.mark.parametrize("reading", [["--in-memory", "yes"], ["--in-memory", "no", "--workers", "1"]])
def test_a_whole_run(tmp_path: Path, reading: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """check-data, pretrain and embed on a folder of scans of which one is cut; no name of a patient comes out."""
    scans, run = tmp_path / "scans", tmp_path / "run"
    scans.mkdir()
    for index in range(20):
        stored = (WIDE // 2 + 100 * index).astype(np.uint16)
        data = dicom(stored, bits=12, Modality="CT", RescaleSlope="1", RescaleIntercept="-1024", NumberOfFrames="1")
        (scans / f"{index:02d}.dcm").write_bytes(data[:-50] if index == 3 else data)
    assert cli.main(["check-data", "--data", str(scans), "--out", str(tmp_path / "report.json"), "--workers", "0"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(one["name"], one["reason"]) for one in report["bad"]] == [("03.dcm", CUT)]
    assert report["parts"]["train"]["sixteen_bit_or_float"] == 19
    assert cli.main(["pretrain", "folder", "--data", str(scans), "--out", str(run), *RUN, *reading]) == 0
    assert [json.loads(line)["name"] for line in (run / "quarantine.jsonl").read_text().splitlines()] == ["03.dcm"]
    assert list((run / "panels").iterdir())
    features = str(tmp_path / "features.parquet")
    assert cli.main(["embed", str(run), "--data", str(scans), "--out", features, "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    assert NAME not in out + err and "Traceback" not in out + err
    assert not any(NAME.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


# ---- without the library ----


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pydicom is not installed."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    reader._pydicom.cache_clear()


def test_without_pydicom_a_file_says_what_to_install(
    missing: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, words = b"\0" * 128 + b"DICM" + b"\0" * 100, "DICOM files need pydicom: pip install 'maekit[dicom]'"
    assert reason(data) == words
    with pytest.raises(BadImage, match="pip install"):
        probe_size(data)
    for index in range(20):
        (tmp_path / f"{index:02d}.dcm").write_bytes(data)
    assert cli.main(["pretrain", "folder", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *RUN]) == 2
    found = capsys.readouterr().err
    assert words in found.replace("\n", " ") and found.count("pydicom") == 1
    assert not (tmp_path / "run").exists()


def test_pydicom_is_imported_when_a_file_is_met_and_asks_no_network() -> None:
    code = (
        "import socket, sys; from maekit.data.images import decode; from image_files import png; decode(png(3), 1); "
        "assert 'pydicom' not in sys.modules; socket.getaddrinfo = socket.socket.connect = None; "
        "decode(sys.stdin.buffer.read(), 1); assert 'pydicom' in sys.modules"
    )
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, input=dicom(GRAY), env=paths,
                          capture_output=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
