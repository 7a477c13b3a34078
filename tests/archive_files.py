"""Archives for the tests: written by the standard library, name by name."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any


def entries(root: Path, top: str = "") -> list[tuple[bytes, bytes]]:
    """Names below a folder and bytes, in no order that means anything."""
    found = []
    for folder, _, files in os.walk(os.fsencode(root)):
        for file in files:
            path = os.path.join(folder, file)
            found.append(
                (os.fsencode(top) + os.path.relpath(path, os.fsencode(root)), Path(os.fsdecode(path)).read_bytes())
            )
    return sorted(found, key=lambda entry: entry[0][::-1])


def add(tar: tarfile.TarFile, name: str | bytes, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, files: list[tuple[Any, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for name, data in files:
            add(tar, name, data)
    return path


def make_zip(path: Path, files: list[tuple[Any, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """By the standard library, but with names as they are: it has no way to write names that are not UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files:
            archive.writestr(os.fsdecode(name).encode("ascii", "replace").decode(), data)
    raw = path.read_bytes()
    for name, _ in files:
        plain, real = os.fsdecode(name).encode("ascii", "replace"), os.fsencode(name)
        assert plain == real or len(plain) == len(real)
        raw = raw.replace(plain, real)
    path.write_bytes(raw)
    return path


def shard(path: Path, *samples: tuple[str, dict[str, bytes]]) -> Path:
    return make_tar(path, [(f"{key}.{form}", data) for key, files in samples for form, data in files.items()])
