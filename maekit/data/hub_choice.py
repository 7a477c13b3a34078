"""Which files of a data set on the hub are read, told from its list of files and the head of its README alone.

The hub's conventions: configurations and splits by `configs:` in the README's YAML head, else by the names of files and
folders (https://huggingface.co/docs/hub/datasets-manual-configuration, datasets-file-names-and-splits). Nothing is
downloaded here. Paths are relative to the repository, with slashes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from maekit.config import UserError, did_you_mean
from maekit.data.annotations import TABLES
from maekit.data.archive_names import SUFFIXES
from maekit.data.folders import METADATA
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.parquet import part_by_name
from maekit.data.parts import PART_WORDS, part_of, printable

Files = Mapping[str, int]
"""Path -> bytes."""
BESIDE = (os.fsdecode(METADATA), "classes.txt", *TABLES)
"""Small files that readers look for in a folder of images."""
_TABLES = (".csv", ".tsv", ".txt")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_SHARD = re.compile(r"(-\d+-of-\d+)?\.parquet$", re.IGNORECASE)
_PARTIAL = "partial-"
"""Before the name of a split of which the hub has converted the beginning only."""
_SHOWN = 12


@dataclass(frozen=True)
class Choice:
    """What is read: `parts` of Parquet files, `archives`, a `table` of paths, or the images below `root`."""

    files: tuple[str, ...]
    """All that is needed."""
    archives: bool = False
    """Whether the files are archives: WebDataset's shards, or one that was asked for by its name."""
    parts: dict[str, list[str]] | None = None
    table: str = ""
    root: str = ""
    """Of an archive that was asked for by its name: that name, and what stands behind it."""
    notes: tuple[str, ...] = ()
    partial: bool = False
    """Whether a split is there in part only."""


@dataclass(frozen=True)
class _Configuration:
    """What a README says of one: the files of each split, or a folder in which they are told by name."""

    name: str
    splits: dict[str, list[str]] = field(default_factory=dict)
    folder: str | None = None
    is_default: bool = False


def choose(files: Files, card: Mapping[str, Any], inside: str, shown: str) -> Choice | None:
    """The files that `shown` and what stands behind it, `inside`, name; None where nothing there can be read.

    inside: a configuration, a configuration and a split, a split, a folder, or a file; empty for the whole.

    Raises:
        UserError: several configurations and none named, nothing of that name, or no training part.
    """
    seen = {path: size for path, size in files.items() if not _is_hidden(path)}
    found = _configurations(card, seen)
    if inside:
        return _named(seen, found, inside, shown)
    if not found:
        return _by_names(seen, "", shown)
    chosen = _default(found)
    if chosen is None:
        raise _several([one.name for one in found], shown, "configurations")
    others = [one.name for one in found if one is not chosen]
    choice = _of(seen, chosen, shown)
    if others and choice is not None:
        note = f"the configuration {chosen.name}; there are others: {_listed(others)} (--data {shown}/{others[0]})"
        choice = replace(choice, notes=(note, *choice.notes))
    return choice


def what_is_there(files: Files) -> str:
    """The kinds of files and how many of each, for a message."""
    kinds = Counter(sorted(_suffix(path) or "without a suffix" for path in files if not _is_hidden(path)))
    return ", ".join(f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(6)) or "no file"


def _named(seen: Files, found: list[_Configuration], inside: str, shown: str) -> Choice | None:
    """A configuration, a split of one, a folder or a file by name."""
    by_name = {one.name: one for one in found}
    if inside in by_name:
        return _of(seen, by_name[inside], shown)
    head, _, tail = inside.rpartition("/")
    of = by_name.get(head) if head else _default(found)
    if of is not None and tail in of.splits:
        return _of(seen, _Configuration(inside, {"train": of.splits[tail]}), shown)
    folder = inside + "/"
    if any(path.startswith(folder) for path in seen):
        return _by_names(seen, folder, shown)
    shards = sorted(path for path in seen if _is_parquet(path) and _SHARD.sub("", path) == _SHARD.sub("", inside))
    shards = [inside] if inside in shards else shards
    if shards:
        return _sorted(seen, {"train": shards}, [], [], shown)
    if inside in seen and _suffix(inside) in _TABLES:
        images = _images_below(seen, head + "/" if head else "")
        return Choice(tuple({inside, *images}), table=inside)
    archive = next((path for path in seen if _suffix(path) in SUFFIXES and f"{inside}/".startswith(f"{path}/")), None)
    if archive is not None:
        return Choice((archive,), archives=True, root=inside)
    if inside in seen:
        kind = "one image; give its folder" if _is_image(inside) else f"a {_suffix(inside) or 'nameless'} file"
        raise UserError(
            f"--data {shown}/{printable(inside)}: {kind}; configurations, folders, Parquet and tables are read"
        )
    known = {*by_name, *(path.rpartition("/")[0] for path in seen if "/" in path)}
    known |= {f"{one.name}/{split}" for one in found for split in one.splits}
    hint = f"; {did_you_mean(inside, map(printable, known))}" if known else ""
    behind = f"; a revision stands behind the name: {shown}@REVISION/FOLDER" if "@" in inside else ""
    raise UserError(f"--data {shown}/{printable(inside)}: no such configuration, split, folder or file{behind or hint}")


def _of(seen: Files, one: _Configuration, shown: str) -> Choice | None:
    """A README's configuration."""
    if one.folder is not None:
        return _by_names(seen, one.folder, shown)
    tables = {split: [path for path in paths if _is_parquet(path)] for split, paths in one.splits.items()}
    tables = {split: paths for split, paths in tables.items() if paths}
    if tables:
        parts: dict[str, list[str]] = {}
        for split in tables:
            if part := _part(split):
                parts.setdefault(part, tables[split])
        if len(tables) == 1:
            parts = parts or {"train": next(iter(tables.values()))}
        ways = {split: f"{one.name}/{split}" for split in tables}
        left = [ways[split] for split, paths in tables.items() if paths not in parts.values()]
        return _sorted(seen, parts, list(ways.values()), left, shown)
    images = [path for paths in one.splits.values() for path in paths if _is_image(path)]
    if not images:
        return None
    root = os.path.commonpath([path.rpartition("/")[0] for path in images])
    return _images(seen, root + "/" if root else "")


def _by_names(seen: Files, base: str, shown: str) -> Choice | None:
    """The files below a folder (with its slash) by the usual names."""
    paths = [path for path in seen if path.startswith(base)]
    images = [path for path in paths if _is_image(path)]
    tables, archives = [path for path in paths if _is_parquet(path)], [path for path in paths if _is_archive(path)]
    in_tables, in_images, in_archives = (sum(seen[path] for path in some) for some in (tables, images, archives))
    tables = _shards_below(tables, base, shown, "Parquet files") if in_tables >= in_images else []
    if tables:
        parts: dict[str, list[str]] = {}
        for path in tables:
            parts.setdefault(_part_of_file(path), []).append(path)
        unnamed = parts.pop("", [])
        if unnamed and not parts:
            parts, unnamed = {"train": unnamed}, []
        if len(parts) == 1 and not unnamed and _word(_base(base.rstrip("/"))):  # a split's folder was asked for
            parts = {"train": next(iter(parts.values()))}
        stems, left = (list(dict.fromkeys(map(_stem, some))) for some in (tables, unnamed))
        return _sorted(seen, parts, stems, left, shown)
    # A few pictures beside archives, as in a README, are no data set; nor are those of a script that fetches others.
    script = not base and any(_suffix(path) == ".py" and "/" not in path for path in seen)
    if images and (base or not (in_archives > in_images or script)):
        return _images(seen, base)
    # Tars are WebDataset's shards; a zip is as likely what a script unpacks, or the annotations.
    if archives and not script and all(_suffix(path) == ".tar" for path in archives):
        return Choice(tuple(_shards_below(archives, base, shown, "archives")), archives=True)
    return None


def _shards_below(tables: list[str], base: str, shown: str, what: str) -> list[str]:
    """Files (`what` in words) in a folder itself, in its data/, in folders named by split, or in one other folder.

    Raises:
        UserError: several other folders, each a configuration.
    """
    tables = sorted((path for path in tables if path.startswith(base)), key=os.fsencode)
    tops = {path: path[len(base) :].partition("/")[0] if "/" in path[len(base) :] else "" for path in tables}
    deep = {path for path in tables if "/" in path[len(base) + len(tops[path]) + 1 :] and tops[path]}
    splits = {top for top in tops.values() if top and _word(top)}
    for places in ({""}, {"data"}, splits):
        found = [path for path in tables if tops[path] in places and path not in deep]
        if found:
            return found
    others = sorted({top for top in tops.values() if top not in splits})
    if len(others) > 1:
        raise _several([base + other for other in others], shown, f"folders of {what}, each a configuration")
    return _shards_below(tables, f"{base}{others[0]}/", shown, what) if others else []


def _sorted(seen: Files, parts: dict[str, list[str]], ways: list[str], left: list[str], shown: str) -> Choice:
    """Parquet files of parts. ways: how each split is named. left: those that are no part."""
    if "train" not in parts:
        said = " or ".join(f"--data {_join(shown, way)}" for way in ways[:_SHOWN])
        raise UserError(f"--data {shown}: has no training split; to train on another one, choose {said}")
    notes = (f"left out: {_listed(left)} (--data {_join(shown, left[0])} takes it alone)",) if left else ()
    files = [path for paths in parts.values() for path in paths]
    beside = [path for path in BESIDE if path in seen]  # names of classes, for maekit segment
    return Choice((*files, *beside), parts=parts, notes=notes, partial=any(map(_is_partial, files)))


def _images(seen: Files, base: str) -> Choice:
    """All images below a folder, so that what is read does not depend on what else lies in the cache."""
    return Choice(tuple(_images_below(seen, base)), root=base.rstrip("/"))


def _images_below(seen: Files, base: str) -> list[str]:
    """And what readers look for beside them, the lists of Pascal VOC too."""
    found = {path for path in seen if _is_image(path) or _base(path) in BESIDE or "ImageSets/Segmentation/" in path}
    return sorted(path for path in found if path.startswith(base))


def _configurations(card: Mapping[str, Any], seen: Files) -> list[_Configuration]:
    """Those of the README's head whose files are Parquet or images; what is not of the usual form is passed over."""
    entries = card.get("configs")
    found = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        name = str(entry.get("config_name") or "default")
        folder = str(entry.get("data_dir") or "").strip("/.")
        base = folder + "/" if folder else ""
        splits = {
            split: [path for path in _matching(patterns, base, seen) if _is_parquet(path) or _is_image(path)]
            for split, patterns in _patterns(entry.get("data_files")).items()
        }
        splits = {split: paths for split, paths in splits.items() if paths}
        is_default = entry.get("default") is True
        if splits:
            found.append(_Configuration(name, splits, None, is_default))
        elif folder and entry.get("data_files") is None and any(path.startswith(base) for path in seen):
            found.append(_Configuration(name, {}, base, is_default))
    return found


def _patterns(value: Any) -> dict[str, list[str]]:
    """Split -> patterns of a README's `data_files`: a pattern, several, or a list or mapping of splits with theirs."""
    if isinstance(value, dict):
        return {str(split): _texts(paths) for split, paths in value.items()}
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        found: dict[str, list[str]] = {}
        for one in value:
            if isinstance(one, dict):
                found.setdefault(str(one.get("split") or "train"), []).extend(_texts(one.get("path")))
        return found
    return {"train": _texts(value)}


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _matching(patterns: Iterable[str], base: str, seen: Files) -> list[str]:
    found = set()
    for pattern in patterns:
        rule = _expression(base + pattern.removeprefix("./"))
        found |= {path for path in seen if rule.fullmatch(path)}
    return sorted(found, key=os.fsencode)


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern of the hub's as an expression: ** is any folders, * and ? stay within one, [ab] is a choice."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    rule = "".join(rules.get(one) or (one.replace("[!", "[^") if one[:1] == "[" and one[-1:] == "]" else re.escape(one))
                   for one in pieces)  # fmt: skip
    try:
        return re.compile(rule)
    except re.error:
        return re.compile(re.escape(pattern))


def _default(found: list[_Configuration]) -> _Configuration | None:
    """The one that is read where none is named, as `datasets` has it."""
    marked = [one for one in found if one.is_default] or [one for one in found if one.name == "default"]
    return found[0] if len(found) == 1 else next(iter(marked), None)


def _several(names: list[str], shown: str, what: str) -> UserError:
    ways = " or ".join(f"--data {_join(shown, name)}" for name in names[:_SHOWN])
    more = f" ({len(names)} in all)" if len(names) > _SHOWN else ""
    return UserError(f"--data {shown}: several {what}; choose {ways}{more}")


def _join(shown: str, name: str) -> str:
    return f"{shown}/{printable(name)}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _part(split: str) -> str:
    """The part that a split's name stands for; empty for none."""
    return part_of(split.removeprefix(_PARTIAL)) or ""


def _word(folder: str) -> str:
    return PART_WORDS.get(folder.lower().removeprefix(_PARTIAL), "")


def _part_of_file(path: str) -> str:
    return part_by_name(path.replace("/" + _PARTIAL, "/"))


def _is_partial(path: str) -> bool:
    return f"/{_PARTIAL}" in path


def _stem(path: str) -> str:
    """What the shards of one split share: their path without number and suffix, or their folder."""
    stem = _SHARD.sub("", path)
    return stem.rpartition("/")[0] if "/" in stem and _base(stem).isdigit() else stem


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_parquet(path: str) -> bool:
    return _suffix(path) == ".parquet"


def _is_archive(path: str) -> bool:
    return _suffix(path) in _ARCHIVES


def _is_image(path: str) -> bool:
    return _suffix(path) in IMAGE_SUFFIXES


def _is_hidden(path: str) -> bool:
    return any(piece.startswith(".") for piece in path.split("/"))
