"""Every form of `--data`: a known name, a folder, Parquet in the hub's schema, archives, a list or a table of paths, or
a data set of the hub, of one of these forms.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Protocol

from maekit.config import UserError, did_you_mean
from maekit.data.archive_names import archive_above, is_read
from maekit.data.archive_trees import find_archives, open_archive, open_archives
from maekit.data.columns import Columns
from maekit.data.folders import holds_images, open_folder
from maekit.data.groups import find_groups
from maekit.data.hub import hub_hint, is_hub, open_hub, pinned
from maekit.data.hub import short_name as hub_name
from maekit.data.images import IMAGE_SUFFIXES
from maekit.data.known import KNOWN, open_known
from maekit.data.lists import open_list, open_table
from maekit.data.parquet import TablePart, find_files, has_image_column, open_parquet
from maekit.data.parts import ArrayPart, FilePart, Part, Source, printable

__all__ = ["KNOWN", "ArrayPart", "FilePart", "Part", "Source", "TablePart", "open_source"]


def open_source(
    spec: str,
    *,
    in_chans: int = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    group_by: str | None = None,
) -> Source:
    """What `--data` names, opened: listed or read into memory, but no image decoded.

    A known name means the known data set even where a file of that name lies here; write ./cifar10 for the file.
    The columns are those of Parquet or a table; group_by is one too, or a pattern of the images' paths.

    Raises:
        UserError: nothing of that name, nothing readable in it, or a column or pattern that does not fit.
    """
    source = _open(spec, in_chans, Columns(image_column, label_column, group_by))
    if group_by is not None:
        source.notes += tuple(find_groups(source.named, group_by, printable(spec)))
    return source


class DataFields(Protocol):
    """The fields of a config that say which data, and in which groups."""

    data: str
    image_column: str | None
    label_column: str | None
    group_by: str | None


def open_configured(config: DataFields, in_chans: int) -> Source:
    """What a config says, opened; errors as of `open_source`."""
    return open_source(
        config.data,
        in_chans=in_chans,
        image_column=config.image_column,
        label_column=config.label_column,
        group_by=config.group_by,
    )


def _open(spec: str, in_chans: int, columns: Columns) -> Source:
    if not spec:
        raise UserError(
            "--data is empty: give a folder, a Parquet file, an archive, a list or table of paths, hub:OWNER/NAME, or "
            "a known name"
        )
    if spec in KNOWN:
        columns.refuse(spec)
        return open_known(spec, in_chans)
    if is_hub(spec):
        return open_hub(spec, in_chans, columns)
    path = os.path.expanduser(spec)
    shown = printable(spec)
    if archive_above(path) is not None:
        columns.refuse(shown)
        return open_archive(path, shown, short_name(path), in_chans)
    mode = _mode(path, shown)
    name = short_name(path)
    suffix = os.path.splitext(path)[1].lower()
    if stat.S_ISDIR(mode):
        return _open_directory(path, shown, name, in_chans, columns)
    if not stat.S_ISREG(mode):
        raise UserError(f"--data {shown}: neither a folder nor a regular file")
    if suffix == ".parquet":
        return open_parquet([path], shown, name, in_chans, columns)
    if suffix in (".csv", ".tsv"):
        return open_table(os.fsencode(path), shown, name, in_chans, columns)
    columns.refuse(shown)
    if suffix == ".txt":
        return open_list(os.fsencode(path), shown, name, in_chans)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"--data {shown}: one image; give its folder, or a .txt file with its path")
    raise UserError(
        f"--data {shown}: a {suffix or 'nameless'} file; folders, .parquet, .tar and .zip, .txt (paths), and .csv or "
        ".tsv (paths and labels) are read"
    )


def _open_directory(path: str, shown: str, name: str, in_chans: int, columns: Columns) -> Source:
    """A folder of Parquet files, of images, or of archives."""
    if is_run(path):
        raise UserError(f"--data {shown}: is the folder of a run, not of images; a run stands first, before --data")
    try:
        files = find_files(path, shown)
    except OSError as error:
        raise UserError(f"--data {shown}: the folder cannot be read ({error.strerror})") from None
    # A table of something else, such as features, may lie beside images.
    has_images = (not files or not has_image_column(files[0], columns.image)) and holds_images(os.fsencode(path))
    if files and not has_images:
        return open_parquet(files, shown, name, in_chans, columns)
    columns.refuse(shown)
    archives = [] if has_images else find_archives(path, shown)
    if archives:
        return open_archives(archives, path, shown, name, in_chans)
    source = open_folder(os.fsencode(path), shown, name, in_chans)
    beside = [os.path.relpath(one, path) for one in find_files(path, shown, is_read)] if has_images else []
    if beside:  # a picture of what is in them, or what the images were unpacked from
        left = ", ".join(map(printable, beside[:4])) + (", ..." if len(beside) > 4 else "")
        first = os.path.join(shown, printable(beside[0]))
        source.notes += (f"left out, since images lie beside: {left} (--data {first} takes it alone)",)
    return source


def is_run(folder: str) -> bool:
    """Whether a folder is that of a maekit run, whose panels are no images to train on."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "metrics.jsonl"))


def lasting(spec: str) -> str:
    """What `--data` must be where it is said again from another folder, or later: the same known name, an absolute
    path, or a data set of the hub at its commit."""
    if is_hub(spec):
        return pinned(spec)
    path = os.path.expanduser(spec)
    there = spec not in KNOWN and (os.path.exists(path) or archive_above(path) is not None)
    return os.path.abspath(path) if there else spec


def _mode(path: str, shown: str) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        known = ", ".join(KNOWN)
        guess = did_you_mean(shown, KNOWN)
        hint = f"; {guess}" if guess.startswith("did") else ""
        hint = hub_hint(shown) or hint
        above = next((one for one in map(str, Path(path).parents) if os.path.isfile(one)), None)
        if above is not None:
            hint = f"; {printable(above)} is a file: nothing lies below it"
        if re.search(r"[*?]|\{.*\.\..*\}|\{.*,.*\}|::", shown):
            hint = "; patterns of names are not read: give the folder that holds the files"
        raise UserError(f"--data {shown}: no such file or folder, and not a known name ({known}){hint}") from None
    except OSError as error:
        raise UserError(f"--data {shown}: cannot be read ({error.strerror})") from None


def short_name(path: str) -> str:
    """The last part of the path without a file's suffix, in characters that suit any folder's name."""
    if is_hub(path):
        return hub_name(path)
    path = os.path.realpath(path)
    base = os.path.basename(path)
    base = os.path.splitext(base)[0] if os.path.isfile(path) else base
    return re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-.") or "data"


def choose_parts(data: Source, part: str, spec: str) -> dict[str, Part]:
    """One part of the data by name, or with "all" every part that is there; `spec` names the data in messages.

    Raises:
        UserError: no such part; lists those that are there.
    """
    there = data.named
    if part == "all":
        return there
    if part not in there:
        raise UserError(f"--part {part}: --data {spec} has no such part; choose {', '.join(there)} or all")
    return {part: there[part]}
