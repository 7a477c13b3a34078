"""The data sets that are known by name: photos, digits, cifar10, cifar100.

CIFAR (Krizhevsky 2009) comes from the authors' binary archives, whose fixed records need no unpickling:
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import os
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from maekit.config import UserError
from maekit.data.parts import ArrayPart, Source
from maekit.data.photos import open_photos

_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A binary archive: records of `label_bytes` labels, then 3 x side x side bytes (planes red, green, blue)."""

    url: str
    md5: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    names_file: str
    rows: tuple[int, int]
    """Records in each training file and in each test file."""
    label_bytes: int = 1
    """Labels before each image; the last one is used (CIFAR-100: coarse, fine)."""
    side: int = 32

    @property
    def file_name(self) -> str:
        """The archive's name in the cache folder."""
        return self.url.rsplit("/", 1)[-1]


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        train_files=tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
        test_files=("cifar-10-batches-bin/test_batch.bin",),
        names_file="cifar-10-batches-bin/batches.meta.txt",
        rows=(10_000, 10_000),
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        train_files=("cifar-100-binary/train.bin",),
        test_files=("cifar-100-binary/test.bin",),
        names_file="cifar-100-binary/fine_label_names.txt",
        rows=(50_000, 10_000),
        label_bytes=2,
    ),
}

KNOWN = ("photos", "digits", *ARCHIVES)
"""The names that `--data` knows."""


def open_known(name: str, in_chans: int) -> Source:
    """A known data set; in_chans is 1 or 3 (any number for digits, which are gray).

    Raises:
        UserError: unfit channels, a package or an archive that cannot be had.
    """
    if name == "digits":
        return _open_digits(in_chans)
    if in_chans not in (1, 3):
        raise UserError(f"--in-chans {in_chans}: {name} has 3 channels (1 also works: luminance)")
    return open_photos(in_chans) if name == "photos" else _open_archive(name, ARCHIVES[name], in_chans)


def cache_folder() -> Path:
    """Where downloads are kept: MAEKIT_CACHE, else ~/.cache/maekit."""
    return Path(os.environ.get("MAEKIT_CACHE") or "~/.cache/maekit").expanduser()


def _open_digits(in_chans: int) -> Source:
    """scikit-learn's 8 x 8 digits, 0..16 scaled to 0..255; every fifth sample (index % 5 == 4) is for testing."""
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images_NHW1 = ((digits.images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    names = [str(digit) for digit in range(10)]
    test = np.arange(len(labels)) % 5 == 4
    train, held = (ArrayPart(images_NHW1[rows], labels[rows], names, in_chans) for rows in (~test, test))
    return Source("digits", train, test=held)


def _open_archive(name: str, archive: Archive, in_chans: int) -> Source:
    path = cache_folder() / archive.file_name
    if not path.exists():
        _download(name, archive, path)
    else:
        _check_md5(name, archive, path)
    wanted = {*archive.train_files, *archive.test_files, archive.names_file}
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = {member.name: _read_member(tar, member, wanted) for member in tar}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"--data {name}: {path} cannot be unpacked ({error}); delete it to fetch it again") from None
    missing = sorted(wanted - members.keys())
    if missing:
        raise UserError(f"--data {name}: {path} lacks {', '.join(missing)}; delete it to fetch it again")
    names = [line.strip() for line in members[archive.names_file].decode().splitlines() if line.strip()]
    parts = []
    for files, rows in zip((archive.train_files, archive.test_files), archive.rows, strict=True):
        parsed = [_records(members[file], archive, rows, f"--data {name}: {file} in {path}") for file in files]
        images_NHWC = np.concatenate([images for images, _ in parsed])
        labels = np.concatenate([labels for _, labels in parsed])
        if labels.max(initial=0) >= len(names):
            raise UserError(f"--data {name}: {path} has label {labels.max()} but {len(names)} class names")
        parts.append(ArrayPart(images_NHWC, labels, names, in_chans))
    return Source(name, parts[0], test=parts[1])


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, wanted: set[str]) -> bytes:
    """A wanted member's content, empty for others. Nothing goes to disk; unsafe names are refused all the same."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise tarfile.TarError(f"unsafe member name {member.name!r}")
    if member.name not in wanted:
        return b""
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise tarfile.TarError(f"{member.name} is not a file")
    return content.read()


def _records(
    data: bytes, archive: Archive, rows: int, where: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images N H W 3 and labels N of a file of fixed records."""
    pixels = 3 * archive.side**2
    record = archive.label_bytes + pixels
    if len(data) != rows * record:
        raise UserError(f"{where}: {len(data)} bytes, expected {rows} records of {record}")
    table = np.frombuffer(data, np.uint8).reshape(rows, record)
    planes_NCHW = table[:, archive.label_bytes :].reshape(rows, 3, archive.side, archive.side)
    images_NHWC = np.ascontiguousarray(planes_NCHW.transpose(0, 2, 3, 1))
    return images_NHWC, table[:, archive.label_bytes - 1].astype(np.int64)


def _check_md5(name: str, archive: Archive, path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise UserError(f"--data {name}: {path} cannot be read ({error.strerror})") from None
    if found != archive.md5:
        raise UserError(f"--data {name}: {path} has md5 {found}, expected {archive.md5}; delete it to fetch it again")


def _download(name: str, archive: Archive, path: Path) -> None:
    """Fetch the archive; it appears in the cache whole and checked, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # each process its own: the last rename wins
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response, partial.open("wb") as file:
            found = _copy(response, file, name)
        if found != archive.md5:
            raise OSError(f"md5 {found}, expected {archive.md5}")
        os.replace(partial, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise UserError(
            f"--data {name}: the download from {archive.url} failed ({error}). Fetch that file on another machine "
            f"and put it at {path}, or give a folder of images or Parquet files as --data DIR"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _copy(response: IO[bytes], file: IO[bytes], name: str) -> str:
    """Copy with a progress bar; the md5 of what was copied."""
    length = getattr(response, "headers", {}).get("Content-Length")
    digest = hashlib.md5(usedforsecurity=False)
    columns = (TextColumn("downloading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=int(length) if length else None)
        while block := response.read(_BLOCK):
            digest.update(block)
            file.write(block)
            progress.advance(task, len(block))
    return digest.hexdigest()
