"""Images that are there more than once, as `maekit check-data` tells them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_classes import write_images

from maekit import cli


def check(data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, int], str]:
    assert cli.main(["check-data", "--data", str(data), "--workers", "0", "--out", str(out)]) == 0
    return json.loads(out.read_text())["copies"], " ".join(capsys.readouterr().out.split())


def test_copies_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same pixels in the test part, in another file form, under another label; a part's own; no likeness."""
    data = tmp_path / "set"
    write_images(data / "train", {"cat": 4, "dog": 4, "hen": 1})
    write_images(tmp_path / "other", {"cat": 40, "dog": 3})
    for index in range(3):  # images of their own
        (data / "test" / "dog").mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "other" / "dog" / f"{index}.png", data / "test" / "dog")
    found, said = check(data, tmp_path / "before.json", capsys)
    assert found == {"within_a_part": 0, "in_another_part": 0, "of_another_class": 0}
    assert "copies:" not in said
    assert "2 classes" not in said
    assert "1 classes" in said  # of three class folders the test part has images in one

    Image.open(data / "train" / "cat" / "0.png").save(data / "test" / "dog" / "wrong.bmp")
    shutil.copy(data / "train" / "dog" / "1.png", data / "test" / "dog" / "same.png")
    shutil.copy(data / "train" / "dog" / "2.png", data / "train" / "dog" / "again.png")
    almost = Image.open(data / "train" / "dog" / "3.png")
    almost.putpixel((0, 0), 255 - int(np.asarray(almost)[0, 0]))
    almost.save(data / "test" / "dog" / "almost.png")
    found, said = check(data, tmp_path / "after.json", capsys)
    assert found == {"within_a_part": 1, "in_another_part": 2, "of_another_class": 1}
    assert (
        "copies: 2 images have the same pixels as one of another part, 1 as one before them in their own part; "
        "1 of them have another label than it, such as test/dog/wrong.bmp and train/cat/0.png; test/dog/same.png and "
        "train/dog/1.png; train/dog/again.png and train/dog/2.png"
    ) in said
