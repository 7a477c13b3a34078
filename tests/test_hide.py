"""`maekit reconstruct --hide`: which patches a black and white picture hides, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

import maekit
from maekit import cli
from maekit.config import UserError
from maekit.data.centres import read_hidden
from maekit.models.mae import MaskedAutoencoder

MODEL = MaskedAutoencoder(tiny_config(), (0.5,) * 3, (0.2,) * 3)  # 16 x 24 px in patches of 4: a grid of 4 x 6


def picture(path: Path, height: int, width: int, *white: tuple[int, int, int, int]) -> str:
    """Black, with white boxes (top, left, bottom, right)."""
    values = np.zeros((height, width), np.uint8)
    for top, left, bottom, right in white:
        values[top:bottom, left:right] = 255
    Image.fromarray(values).save(path)
    return str(path)


def hidden(names: list[str], images: list[str], crop_pct: float = 1.0) -> list[list[int]]:
    masks = read_hidden(names, images, MODEL.config, crop_pct)
    return [one.ids_masked_BM[0].tolist() for one in masks]


def test_a_patch_is_hidden_where_white_touches_it(tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png", 16, 24)
    corner = picture(tmp_path / "corner.png", 16, 24, (3, 7, 5, 9))  # one pixel of each of four patches
    assert hidden([corner], [image]) == [[1, 2, 7, 8]]
    (masks,) = read_hidden([corner], [image], MODEL.config, 1.0)
    assert masks.ids_keep_BV[0].tolist() == [n for n in range(24) if n not in (1, 2, 7, 8)]


def test_pictures_are_framed_as_their_images_are(tmp_path: Path) -> None:
    """Four times as large; wider than the input, whose middle is taken; and the share of it that is scored."""
    large = picture(tmp_path / "large.png", 64, 96, (0, 0, 16, 16))
    image = picture(tmp_path / "image.png", 16, 24)
    assert hidden([large], [image]) == [[0]]
    wide, boxed = picture(tmp_path / "wide.png", 16, 32), picture(tmp_path / "boxed.png", 16, 32, (0, 4, 4, 8))
    assert hidden([boxed], [wide]) == [[0]]  # 4 px are cut off at either side
    edge = picture(tmp_path / "edge.png", 32, 48, (0, 0, 4, 48), (8, 8, 16, 16))
    assert hidden([edge], [image], crop_pct=0.5) == [[0, 6]]  # of 32 x 48 px the middle 16 x 24: no edge


def test_one_picture_for_all_or_one_for_each(tmp_path: Path) -> None:
    images = [picture(tmp_path / f"image{n}.png", 16, 24) for n in range(2)]
    first = picture(tmp_path / "first.png", 16, 24, (0, 0, 1, 1))
    last = picture(tmp_path / "last.png", 16, 24, (8, 0, 16, 24))
    assert hidden([first], images) == [[0], [0]]
    assert hidden([first, last], images) == [[0], list(range(12, 24))]
    with pytest.raises(UserError, match="3 pictures for 2 images; give one for all, or one for each"):
        hidden([first] * 3, images)


def test_what_cannot_hide_is_named_all_at_once(tmp_path: Path) -> None:
    images = [picture(tmp_path / f"image{n}.png", 16, 24) for n in range(4)]
    names = [
        picture(tmp_path / "nothing.png", 16, 24),
        picture(tmp_path / "everything.png", 16, 24, (0, 0, 16, 24)),
        picture(tmp_path / "square.png", 24, 24, (0, 0, 4, 4)),
        str(tmp_path / "absent.png"),
    ]
    with pytest.raises(UserError) as caught:
        hidden(names, images)
    lines = caught.value.problems
    assert [Path(line.split(": ")[0].removeprefix("--hide ")).name for line in lines] == [Path(n).name for n in names]
    assert "hides 0 of 24 patches" in lines[0] and "hides 24 of 24" in lines[1]
    assert "24 x 24 pixels have other proportions" in lines[2] and "no such file" in lines[3]


def test_the_command_hides_other_patches_of_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    maekit.save(MODEL, "mae.safetensors")
    picture(Path("a.png"), 16, 24), picture(Path("b.png"), 16, 24)
    picture(Path("one.png"), 16, 24, (0, 0, 4, 4)), picture(Path("half.png"), 16, 24, (8, 0, 16, 24))
    words = ["reconstruct", "mae.safetensors", "--image", "a.png", "b.png", "--device", "cpu"]
    drawn = []
    monkeypatch.setattr("maekit.tasks.reconstruct.draw", lambda rows, path, **_: drawn.extend(rows))
    assert cli.main([*words, "--hide", "one.png", "half.png"]) == 0
    assert [row.masked_share for row in drawn] == [1 / 24, 0.5]
    assert cli.main([*words, "--hide", "one.png", "--mask-ratio", "0.5"]) == 2
    assert "--hide says which patches are hidden: leave out --mask, --mask-ratio and --seed" in capsys.readouterr().err
