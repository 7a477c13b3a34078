"""Labels that lie beside the images in an archive, as WebDataset has them: KEY.jpg, KEY.cls, KEY.json.

A key is the path of such a file without its suffix; of an image, its path without its suffix, or else up to the first
dot of its last component (KEY.left.jpg). A .cls file holds the class: its number as text
(-1: none), or its name. Where there are none, the .json files are asked for "label", then "class": a number or a name.
Other files beside images (.txt captions) are not read. Memory: 12 bytes for each label while archives are listed.
"""

from __future__ import annotations

import contextlib
import json
import re
from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from maekit.data.parquet import MAX_CLASSES
from maekit.data.parts import Labels, class_order, printable
from maekit.data.pixels import BadImage

CLASS, RECORD = b".cls", b".json"
SIDES = (CLASS, RECORD)
_LARGEST = {CLASS: 256, RECORD: 1 << 16}
"""Bytes of a file beside an image that is read."""
_TRIED = 100
"""Files without a label after which no more are read: captions and sizes of a million images tell no class."""
_NUMBER = re.compile(r"-1|[0-9]{1,7}")
_LONGEST = 200


class SideLabels:
    """What the files of one suffix say, by keys' digests of 64 bits."""

    def __init__(self) -> None:
        self._values: dict[str, int] = {}
        self._keys, self._codes = array("Q"), array("i")
        self._in_vain = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, number: int, path: bytes, size: int, read: Callable[[], bytes]) -> None:
        """A file of an archive of this number; one that says no label is passed over."""
        suffix = path[path.rfind(b".") :].lower()
        if size > _LARGEST[suffix] or self._in_vain >= _TRIED:
            return
        value = None
        with contextlib.suppress(BadImage, ValueError, RecursionError):
            value = _value(suffix, read())
        if value is not None and len(self._values) < MAX_CLASSES:
            self._keys.append(_key(number, path[: -len(suffix)]))
            self._codes.append(self._values.setdefault(value, len(self._values)))
        elif not self._keys:
            self._in_vain += 1

    def of(self, members: Iterable[tuple[int, bytes]], count: int) -> tuple[npt.NDArray[np.int64], list[str]]:
        """For so many images (archive's number, path) the place of what is said of each, -1 for nothing; and what is
        said, in places.
        """
        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        wanted = np.fromiter((key for one in members for key in _keys_of(*one)), np.uint64, 2 * count)
        at = np.searchsorted(keys[order], wanted, side="right") - 1  # of several files of one key, the last
        codes = np.array(self._codes, np.int64)[order]
        found = (at >= 0) & (keys[order][at] == wanted) if len(keys) else np.zeros(2 * count, np.bool_)
        own, of_all = np.where(found, codes[at] if len(keys) else -1, -1).reshape(count, 2).T
        return np.where(own >= 0, own, of_all), list(self._values)


def _keys_of(number: int, path: bytes) -> tuple[int, int]:
    stem = path[: path.rindex(b".")]
    folder, slash, name = stem.rpartition(b"/")
    key = _key(number, stem)
    return key, _key(number, folder + slash + name.split(b".", 1)[0]) if b"." in name else key


def _key(number: int, key: bytes) -> int:
    return int.from_bytes(blake2b(b"%d/" % number + key, digest_size=8).digest(), "little")


def _value(suffix: bytes, data: bytes) -> str | None:
    """The label that a file states; raises ValueError where it cannot be read."""
    value = data.decode() if suffix == CLASS else None
    if suffix == RECORD:
        record = json.loads(data)
        values = (record.get(key) for key in ("label", "class")) if isinstance(record, dict) else ()
        value = next((str(one) for one in values if isinstance(one, int | str) and not isinstance(one, bool)), None)
    value = (value or "").strip()
    return value if value and len(value) <= _LONGEST else None


def classes_of(
    said: dict[str, tuple[npt.NDArray[np.int64], list[str]]], folders: dict[str, tuple[Labels | None, list[str] | None]]
) -> tuple[dict[str, Labels], list[str]] | None:
    """Class ids of each part and the classes' names; None where what is said are no classes.

    Numbers are ids, 0 to 999,999; classes are called by their numbers, or by folders where each class is one folder.
    Names are classes in their order; where most of them stand only once, they are captions.

    said: of each part what `SideLabels.of` finds. folders: ids and names of each part by the folders of its images.
    """
    values = {values[code] for codes, values in said.values() for code in np.unique(codes[codes >= 0]).tolist()}
    labelled = sum(int((codes >= 0).sum()) for codes, _ in said.values())
    if all(map(_NUMBER.fullmatch, values)):
        number = {value: int(value) for value in values}
        highest = max(number.values(), default=-1)
        if not 0 <= highest < MAX_CLASSES:
            return None
        ids = {part: _translated(codes, values, number) for part, (codes, values) in said.items()}
        return ids, _named(ids, folders, highest + 1)
    if 2 * len(values) > labelled:
        return None
    names = class_order(values)
    rank = {value: index for index, value in enumerate(names)}
    return {part: _translated(codes, values, rank) for part, (codes, values) in said.items()}, [*map(printable, names)]


def _translated(codes: npt.NDArray[np.int64], values: list[str], ids: dict[str, int]) -> Labels:
    table = np.array([*(ids.get(value, -1) for value in values), -1], np.int64)
    return table[codes]


def _named(ids: dict[str, Labels], folders: dict[str, tuple[Labels | None, list[str] | None]], count: int) -> list[str]:
    """Names for so many numbers: of the folders, where each number has one of its own, else the numbers."""
    names = [str(number) for number in range(count)]
    pairs: set[tuple[int, int]] = set()
    folder_names: list[str] = []
    for part, part_ids in ids.items():
        of_folders, part_names = folders[part]
        if of_folders is None or part_names is None:
            return names
        folder_names = part_names
        both = np.unique(np.stack([part_ids, of_folders])[:, part_ids >= 0], axis=1)
        pairs |= set(map(tuple, both.T.tolist()))
    if len({one for one, _ in pairs}) == len({folder for _, folder in pairs}) == len(pairs):
        for one, folder in pairs:
            names[one] = folder_names[folder]
    return names
