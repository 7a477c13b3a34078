"""`--data hub:OWNER/NAME`: data sets of the Hugging Face hub, downloaded by its own client into its own cache.

The form is that of the hub's own addresses: hub:OWNER/NAME@REVISION/INSIDE, where INSIDE is a configuration, a split of
one (CONFIGURATION/SPLIT), a folder or a file. What is read is chosen from the list of files (hub_choice.py); only those
are downloaded, and what the cache holds is not asked for again. A name is turned into one commit, which stands in a
run's config, so that a resumed run reads the same files whatever has become of the data set.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from maekit.config import UserError
from maekit.data.archive_names import archive_above, is_read
from maekit.data.archive_trees import open_archive, open_archives
from maekit.data.columns import Columns
from maekit.data.folders import open_folder
from maekit.data.hub_choice import Choice, choose, what_is_there
from maekit.data.hub_files import download
from maekit.data.known import cache_folder
from maekit.data.lists import open_list, open_table
from maekit.data.parquet import open_parquet
from maekit.data.parts import Source, printable
from maekit.hub import PREFIX, cannot_be_reached, client, endpoint, explained, offline_at_once
from maekit.terminal import short_size

CONVERTED = "refs/convert/parquet"
"""Where the hub keeps its own copy in Parquet of data sets in other forms."""
_ADDRESS = re.compile(
    r"hub:(?P<repo>[^/@]+/[^/@]+|[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/@]+|[^/@]+))?(/(?P<inside>.*))?", re.DOTALL
)
_COMMIT = re.compile("[0-9a-f]{40}")
_CARD = "README.md"


@dataclass(frozen=True)
class Address:
    """What stands behind hub: in its pieces."""

    repo: str
    revision: str = ""
    inside: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f"/{self.inside}" if self.inside else "")

    @property
    def whole(self) -> str:
        """Without what is inside."""
        return str(replace(self, inside=""))


@dataclass(frozen=True)
class Found:
    """A data set of the hub at one commit."""

    address: Address
    """With the commit as its revision."""
    sizes: dict[str, int]
    """All its files -> bytes."""
    choice: Choice
    licence: str
    """What its card states; empty for nothing."""

    @property
    def name(self) -> str:
        return short_name(str(self.address))


@dataclass(frozen=True)
class Local:
    """Data on this machine; of a data set of the hub, which of its files they are."""

    root: str
    """The folder of the images, the table, an archive or a folder in it, or the folder of all there is."""
    parts: dict[str, list[str]] | None
    """Parquet files of each part, if it is Parquet."""
    archives: list[str]
    """Archives, if it is these."""
    name: str
    """Short, of a data set of the hub; empty otherwise."""
    notes: tuple[str, ...]


_FOUND: dict[tuple[str, str | None], Found] = {}
"""By what was asked for and of whom: within a process one name means one commit."""


def is_hub(spec: str) -> bool:
    """Whether `--data` names a data set of the hub."""
    return spec.startswith(PREFIX)


def hub_hint(shown: str) -> str:
    """The end of a message about what is no path here but may be a data set of the hub: OWNER/NAME, or its address."""
    address = re.fullmatch(r"(?:hf://|https?://huggingface\.co/)datasets/([\w.-]+/[\w.-]+)(?:[@/].*)?", shown)
    name = address[1] if address else shown if re.fullmatch(r"\w[\w.-]*/[\w.-]+", shown) else None
    return f"; a data set on the Hugging Face hub: --data {PREFIX}{name}" if name else ""


def short_name(spec: str) -> str:
    """The data set's name, and what is read of it, in characters that suit any folder's name."""
    address = _parse(spec)
    name = address.repo.rpartition("/")[2] + (f"-{os.path.splitext(address.inside)[0]}" if address.inside else "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def pinned(spec: str) -> str:
    """The same data set at the commit that the name means now (in this process: meant when it was first used)."""
    return str(_find(_parse(spec)).address)


def open_hub(spec: str, in_chans: int, columns: Columns) -> Source:
    """A data set of the hub, downloaded where the cache does not hold it, as its form is opened from a disk.

    Raises:
        UserError: no such data set, revision, or configuration; no right to it, no connection, no room for it; or
            nothing in it that can be read.
    """
    local = fetch(spec)
    shown = printable(spec)
    root = os.fsencode(local.root)
    if local.parts is not None:
        source = open_parquet(local.parts, shown, local.name, in_chans, columns)
    elif local.root.lower().endswith((".csv", ".tsv")) and not os.path.isdir(root):
        source = open_table(root, shown, local.name, in_chans, columns)
    else:
        columns.refuse(shown)
        source = _open_files(local, shown, in_chans)
    return replace(source, notes=(*local.notes, *source.notes))


def _open_files(local: Local, shown: str, in_chans: int) -> Source:
    """Data without columns."""
    root = os.fsencode(local.root)
    if archive_above(local.root) is not None:
        return open_archive(local.root, shown, local.name, in_chans)
    if local.archives:
        return open_archives(local.archives, local.root, shown, local.name, in_chans)
    if os.path.isdir(root):
        return open_folder(root, shown, local.name, in_chans)
    return open_list(root, shown, local.name, in_chans)


def fetch(spec: str) -> Local:
    """The files that `spec` names, downloaded where the cache does not hold them; errors as of `open_hub`."""
    asked = _parse(spec)
    found = _find(asked)
    address, choice = found.address, found.choice
    files = {path: found.sizes[path] for path in choice.files}
    with offline_at_once(), explained(f"--data {asked}", "all of its files that are needed", "data set"):
        folder = download(address.repo, address.revision, files, _saying(found))

    def local(path: str) -> str:
        return os.path.join(folder, *path.split("/")) if path else str(folder)

    parts = choice.parts and {part: [local(path) for path in paths] for part, paths in choice.parts.items()}
    archives = [local(path) for path in choice.files] if choice.archives else []
    return Local(local(choice.table or choice.root), parts, archives, found.name, choice.notes)


def located(spec: str) -> Local:
    """What `--data` names on this machine: of the hub, downloaded where the cache does not hold it, or as it is."""
    return fetch(spec) if is_hub(spec) else Local(os.path.expanduser(spec), None, [], "", ())


def _saying(found: Found) -> Any:
    """Says which commit is read and how much is downloaded, in one process of each machine."""
    address, size = found.address, sum(found.sizes[path] for path in found.choice.files)

    def say(missing: dict[str, int], place: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        licence = f", licence by its card: {printable(found.licence)}" if found.licence else ""
        what = f"{PREFIX}{address.repo} at commit {address.revision[:12]}{licence}"
        if missing:
            count = f"{len(missing):,} of {len(found.choice.files):,} files"
            line = f"{what}; downloading {count}, {short_size(sum(missing.values()))} of {short_size(size)}, to {place}"
        else:
            line = f"{what}; {short_size(size)}, in the hub's cache"
        Console(stderr=True, highlight=False, soft_wrap=True).print(line, style="dim", markup=False)

    return say


def _parse(spec: str) -> Address:
    """Raises UserError where the form is another."""
    match = _ADDRESS.fullmatch(spec.rstrip("/"))
    inside = [piece for piece in (match["inside"] or "").split("/") if piece not in ("", ".")] if match else []
    if match is None or ".." in inside:
        raise UserError(
            f"--data {printable(spec)}: write hub:OWNER/NAME, hub:OWNER/NAME@REVISION, or either with /FOLDER behind"
        )
    revision = urllib.parse.unquote(match["revision"] or "")  # a branch a/b is written a%2Fb, as in the hub's addresses
    return Address(match["repo"], revision, "/".join(inside))


def _find(address: Address) -> Found:
    """The data set at one commit; of several processes of a run the first asks, and the others take what it found."""
    key = (str(address), endpoint())
    if key not in _FOUND:
        if _COMMIT.fullmatch(address.revision):
            found = _locate(address)
        else:
            found = _agreed(address)
        _FOUND[key] = _FOUND[str(found.address), endpoint()] = found
    return _FOUND[key]


def _agreed(address: Address) -> Found:
    """As the first process found it: a data set may change between the questions of two processes."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return _locate(address)
    from maekit.stopping import host_group

    told: list[Any] = [None, ()]
    found = None
    if distributed.get_rank() == 0:
        try:
            found = _locate(address)
            told = [found.address.revision, ()]
        except UserError as error:
            told = [None, error.problems]
    distributed.broadcast_object_list(told, src=0, group=host_group())
    if told[1]:
        raise UserError(*told[1])
    return found or _locate(replace(address, revision=told[0]))


def _locate(address: Address) -> Found:
    """Commit, list of files and what of them is read."""
    shown = address.whole
    with offline_at_once(), _quietly(), explained(f"--data {shown}", "it", "data set"):
        commit = _commit_of(address.repo, address.revision)
        here = replace(address, revision=commit)
        sizes = _list_files(address.repo, commit)
        card = _read_card(address.repo, commit, sizes)
    choice = choose(sizes, card, address.inside, shown)
    licence = card.get("license")
    told = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "")
    if choice is not None:
        notes = choice.notes
        if choice.partial:
            notes += ("the hub has converted only the beginning of a split into Parquet; this is not all of the data",)
        return Found(here, sizes, replace(choice, notes=notes), told)
    return _converted(address, sizes, told)


def _converted(address: Address, sizes: dict[str, int], licence: str) -> Found:
    """The hub's own copy in Parquet of a data set that holds neither Parquet, shards nor folders of images."""
    archives = [path for path in sizes if is_read(path) and path.startswith(address.inside)]
    alone = f"; --data {address.whole}/{printable(archives[0])} reads one archive alone" if archives else ""
    there = (
        f"--data {address}: holds neither Parquet, WebDataset's shards nor folders of images ({what_is_there(sizes)}"
        f"{alone})"
    )
    copy = replace(address, revision=CONVERTED)
    with offline_at_once(), _quietly(), explained(f"--data {copy.whole}", "it", "data set"):
        try:
            commit = _commit_of(address.repo, CONVERTED)
        except client().errors.RevisionNotFoundError:
            raise UserError(
                f"{there}, and the hub has made no Parquet of it ({CONVERTED}): hf download {address.repo} --repo-type "
                "dataset --local-dir DIR, unpack it, and give --data DIR"
            ) from None
        listed = _list_files(address.repo, commit)
    choice = choose(listed, {}, address.inside, copy.whole)
    if choice is None:
        raise UserError(f"{there}, and the hub's copy at {CONVERTED} holds {what_is_there(listed)}")
    if choice.partial:
        raise UserError(
            f"{there}; the hub has converted only the beginning of it into Parquet: --data {copy} takes that part"
        )
    note = f"{PREFIX}{address.repo} holds {what_is_there(sizes)}: the hub's own copy in Parquet is read ({CONVERTED})"
    choice = replace(choice, notes=(note, *choice.notes))
    return Found(replace(address, revision=commit), listed, choice, licence)


def _commit_of(repo: str, revision: str) -> str:
    """The commit that a revision means now; without a connection, when it was last asked for."""
    if _COMMIT.fullmatch(revision):
        return revision
    errors = client().errors
    try:
        folder = client().snapshot_download(
            repo, repo_type="dataset", revision=revision or None, endpoint=endpoint(),
            allow_patterns=[_CARD, ".gitattributes"],
        )  # fmt: skip
    except errors.LocalEntryNotFoundError as error:
        folder = getattr(error, "snapshot_path", None)  # the commit is known, only its card is not there
        if folder is None:
            raise
    return Path(folder).name


def _list_files(repo: str, commit: str) -> dict[str, int]:
    """All files of a commit and their bytes: as noted before (by the client, where it does, and by us), or asked for.

    Without a note and a connection it is what the cache holds, which may not be all.
    """
    note = cache_folder() / "hub" / f"datasets--{repo.replace('/', '--')}" / f"{commit}.json"
    with suppress(OSError, ValueError):
        noted = json.loads(note.read_text(encoding="utf-8"))
        return {str(path): int(size) for path, size in noted.items()}
    cached = getattr(client(), "get_cached_repo_tree", None)
    if cached is not None:
        with suppress(client().errors.CachedRepoTreeNotFoundError):
            return {one.path: one.size for one in cached(repo, repo_type="dataset", revision=commit)}
    api = client().HfApi(endpoint=endpoint())
    try:
        listed = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        sizes = {one.path: int(one.size) for one in listed if hasattr(one, "size")}
    except Exception as error:
        if not cannot_be_reached(error):
            raise
        return _held(repo, commit)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(sizes), encoding="utf-8")
        os.replace(partial, note)
    return sizes


def _held(repo: str, commit: str) -> dict[str, int]:
    """The files of a commit that the cache holds.

    Raises:
        LocalEntryNotFoundError: none, or numbered shards of which some are missing.
    """
    errors = client().errors
    folder = Path(client().snapshot_download(repo, repo_type="dataset", revision=commit, local_files_only=True))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path in sizes:
        shard = re.fullmatch(r"(.*)-\d+-of-(\d+)(\.\w+)", path)
        if shard is not None:
            there = [one for one in sizes if re.fullmatch(rf"{re.escape(shard[1])}-\d+-of-{shard[2]}\{shard[3]}", one)]
            if len(there) < int(shard[2]):
                raise errors.LocalEntryNotFoundError(f"{path}: {len(there)} of {shard[2]} are in the cache")
    return sizes


def _read_card(repo: str, commit: str, sizes: dict[str, int]) -> dict[str, Any]:
    """The YAML head of the README; empty where there is none, or none that can be read."""
    if _CARD not in sizes:
        return {}
    path = client().hf_hub_download(repo, _CARD, repo_type="dataset", revision=commit, endpoint=endpoint())
    try:
        head = client().repocard.metadata_load(path)
    except Exception as error:  # the parser's own errors; what the README says is nobody's promise
        if isinstance(error, OSError):
            raise
        print(f"{PREFIX}{repo}: the head of its README cannot be read, so files go by their names", file=sys.stderr)
        return {}
    return head if isinstance(head, dict) else {}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the client's bars and warnings about a file or two."""
    utils = client().utils
    barred, verbosity = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if not barred:
            utils.enable_progress_bars()
