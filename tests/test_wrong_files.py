"""Files that are no weights, whatever they are called: one line that says so, exit code 2, and nothing is allocated."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from image_files import encoded, photograph
from test_fuzz import bounded

from maekit import cli

TERABYTE = 1 << 40


def claims(shape: list[int]) -> bytes:
    """A well-formed header of one tensor of that shape, and no numbers behind it."""
    size = 4
    for side in shape:
        size *= side
    header = json.dumps({"cls_token": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header


WRONG = {
    "a photograph": encoded(photograph(0), "JPEG"),
    "nothing": b"",
    "ten bytes": b"0123456789",
    "zeros": bytes(10),
    "a header of a terabyte": struct.pack("<Q", TERABYTE) + b"{}",
    "a tensor of a terabyte": claims([1, 1, TERABYTE // 4]),
    "half of a header": claims([1, 1, 192])[:20],
    "text": b"these are no weights\n" * 9,
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
@pytest.mark.parametrize("name", WRONG)
def test_no_weights(name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"mae_pretrain_vit_base.{suffix}"
    path.write_bytes(WRONG[name])
    out = str(tmp_path / "out")
    for words in (["info", str(path)], ["convert", str(path), "--to", "timm", "--out", out],
                  ["pretrain", "digits", "--init", str(path), "--out", out]):  # fmt: skip
        with bounded():
            assert cli.main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"maekit: error: {path}: ")
        assert len(lines[0]) < 600
    assert not (tmp_path / "out").exists()
