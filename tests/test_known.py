"""maekit/data/known.py and photos.py: the data sets known by name."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import problem

from maekit.data import known, photos
from maekit.data.known import Archive
from maekit.data.sources import Source, open_source


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = open_source("digits")
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.test.read(1).shape == (8, 8, 3)
    np.testing.assert_allclose(source.test.read(1)[..., 0], digits.images[9] * 255 / 16, atol=0.5)
    np.testing.assert_allclose(source.train.read(4)[..., 0], digits.images[5] * 255 / 16, atol=0.5)
    assert source.train.labels is not None
    assert source.train.labels[4] == digits.target[5]
    assert open_source("digits", in_chans=1).train.read(0).shape == (8, 8, 1)


def test_photos() -> None:
    pytest.importorskip("skimage")
    source = open_source("photos")
    assert source.test is not None
    classes = len(photos.PHOTOS)
    assert (len(source.train), len(source.test)) == (384 * classes, 64 * classes)
    assert source.train.class_names == list(photos.PHOTOS)
    assert source.train.labels is not None
    assert np.bincount(source.train.labels).tolist() == [384] * classes
    assert source.train.read(0).shape == (32, 32, 3)
    again = open_source("photos")
    assert (again.train.fingerprint, source.name) == (source.train.fingerprint, "photos")
    # the first training crop of the second photograph is what its corner says
    photo = photos._load("skimage/brick.png")
    row, column = photos.crop_corners(1, "train", *photo.shape[:2])[0]
    np.testing.assert_array_equal(source.train.read(384), photo[row : row + 32, column : column + 32])
    assert "--in-chans 5" in problem("photos", in_chans=5)


@pytest.mark.parametrize("width", [256, 257, 324, 384])
def test_no_pixel_of_a_photo_is_in_both_parts(width: int) -> None:
    for photo in range(len(photos.PHOTOS)):
        used = {part: np.zeros((256, width), bool) for part in ("train", "test")}
        for part, pixels in used.items():
            corners = photos.crop_corners(photo, part, 256, width)
            assert corners.min() >= 0
            assert (corners + photos.CROP <= (256, width)).all()
            for row, column in corners:
                pixels[row : row + photos.CROP, column : column + photos.CROP] = True
        assert not (used["train"] & used["test"]).any()
        last, first = (np.flatnonzero(used[part].any(axis=0)) for part in ("train", "test"))
        assert first[0] - last[-1] > photos.GAP
        assert used["train"].mean() > 0.55
        assert used["test"].mean() > 0.15


def test_photos_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'maekit[demo]'" in problem("photos")


def records(rows: int, label_bytes: int, seed: int) -> tuple[bytes, Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (rows, label_bytes), dtype=np.uint8)
    images_NCHW = rng.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
    table = np.concatenate([labels, images_NCHW.reshape(rows, -1)], axis=1)
    return table.tobytes(), images_NCHW.transpose(0, 2, 3, 1), labels[:, -1]


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def fake_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """Register a tiny archive as cifar100; gives its origin and its place in the cache."""

    def make(members: dict[str, bytes], md5: str | None = None, label_bytes: int = 2) -> tuple[Path, Path]:
        origin = tmp_path / "origin" / "tiny.tar.gz"
        origin.parent.mkdir(exist_ok=True)
        origin.write_bytes(tar_gz(members))
        found = hashlib.md5(origin.read_bytes()).hexdigest()
        archive = Archive(
            url=origin.as_uri(), md5=md5 or found, train_files=("c/1.bin", "c/2.bin"), test_files=("c/test.bin",),
            names_file="c/names.txt", rows=(3, 2), label_bytes=label_bytes,
        )  # fmt: skip
        monkeypatch.setitem(known.ARCHIVES, "cifar100", archive)
        monkeypatch.setenv("MAEKIT_CACHE", str(tmp_path / "cache"))
        return origin, tmp_path / "cache" / "tiny.tar.gz"

    return make


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_archives_are_fetched_once_and_parsed(fake_archive: Any, label_bytes: int) -> None:
    files = {name: records(rows, label_bytes, rows + at) for at, (name, rows) in enumerate(
        (("c/1.bin", 3), ("c/2.bin", 3), ("c/test.bin", 2)))}  # fmt: skip
    members = {name: content for name, (content, _, _) in files.items()}
    origin, cached = fake_archive({**members, "c/names.txt": b"apple\nbee\n\n"}, label_bytes=label_bytes)
    source = open_source("cifar100")
    origin.unlink()
    again: Source = open_source("cifar100")  # from the cache
    assert [path.name for path in cached.parent.iterdir()] == ["tiny.tar.gz"]
    assert again.train.fingerprint == source.train.fingerprint
    assert source.test is not None
    assert (len(source.train), len(source.test), source.train.class_names) == (6, 2, ["apple", "bee"])
    np.testing.assert_array_equal(source.train.read(4), files["c/2.bin"][1][1])
    np.testing.assert_array_equal(source.test.read(0), files["c/test.bin"][1][0])
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [*files["c/1.bin"][2], *files["c/2.bin"][2]]
    cached.write_bytes(b"cut")
    assert "md5" in problem("cifar100")


def test_archives_that_are_wrong(fake_archive: Any, tmp_path: Path) -> None:
    good = {name: records(rows, 2, 0)[0] for name, rows in (("c/1.bin", 3), ("c/2.bin", 3), ("c/test.bin", 2))}
    good["c/names.txt"] = b"a\nb\n"
    wrong: list[tuple[dict[str, bytes], str]] = [
        ({**good, "c/1.bin": good["c/1.bin"][:-1]}, "expected 3 records"),
        ({**good, "../evil.bin": b"x"}, "unsafe member"),
        ({**good, "/evil.bin": b"x"}, "unsafe member"),
        ({name: good[name] for name in list(good)[:-1]}, "lacks c/names.txt"),
        ({**good, "c/names.txt": b"a\n"}, "class names"),
    ]
    for members, words in wrong:
        _, cached = fake_archive(members)
        assert words in problem("cifar100")
        cached.unlink()
    assert not (tmp_path / "evil.bin").exists()
    _, cached = fake_archive(good, md5="0" * 32)
    assert "md5" in problem("cifar100")
    assert list(cached.parent.iterdir()) == []  # nothing half-fetched stays


def test_without_internet_the_error_says_what_to_do(fake_archive: Any) -> None:
    origin, cached = fake_archive({})
    origin.unlink()
    message = problem("cifar100")
    for words in (origin.as_uri(), str(cached), "--data DIR"):
        assert words in message
