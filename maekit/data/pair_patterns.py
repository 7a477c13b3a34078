"""Pairs of image and annotation by two patterns of paths: {} is the name that both share, {part} train, val or test."""

from __future__ import annotations

import os
import re

from maekit.config import UserError
from maekit.data.folders import walk
from maekit.data.pair_files import PATTERNS_HELP, Listing, match_pairs
from maekit.data.pair_parts import PairPart
from maekit.data.parts import PART_WORDS, part_of, printable

_PART = b"(?P<part>(?i:" + "|".join(sorted(PART_WORDS, key=len, reverse=True)).encode() + b"))"
_PIECES = {b"{}": b"(?P<name>.+)", b"{part}": _PART, b"*": b"[^/]*"}


def by_pattern(
    root: str, shown: str, patterns: tuple[str | None, str | None], in_chans: int, notes: list[str]
) -> dict[str, PairPart]:
    """Parts of a folder by two patterns of paths relative to it.

    Raises:
        UserError: patterns that match nothing or cannot be, images of parts beside others; as `match_pairs`.
    """
    image_pattern, annotation_pattern = patterns
    if image_pattern is None or annotation_pattern is None:
        raise UserError(f"--image-pattern and --annotation-pattern: only one of them is given; {PATTERNS_HELP}")
    if not os.path.isdir(root):
        raise UserError(f"--data {shown}: patterns are relative to a folder, and this is none")
    found = {
        "--image-pattern": _list_pattern(root, "--image-pattern", image_pattern, shown),
        "--annotation-pattern": _list_pattern(root, "--annotation-pattern", annotation_pattern, shown),
    }
    images, annotations = found.values()
    # One pattern may match the other's files too, as {}.png does {}_mask.png's: they are the more exact one's.
    general, exact = (images, annotations) if len(image_pattern) <= len(annotation_pattern) else (annotations, images)
    taken = set(exact.files.values())
    general.files = {name: path for name, path in general.files.items() if path not in taken}
    for flag, listing in found.items():
        if not listing.files:
            raise UserError(f"{flag} {printable(listing.where)}: no file below {shown} matches it")
    if _has_parts(images, shown):
        sides = {part: (_of_part(images, part), _of_part(annotations, part)) for part in ("train", "val")}
        return {
            part: match_pairs(root, shown, some, others, in_chans, notes)
            for part, (some, others) in sides.items()
            if some.files
        }
    return {"train": match_pairs(root, shown, images, annotations, in_chans, notes)}


def _list_pattern(root: str, flag: str, pattern: str, shown: str) -> Listing:
    """The files that a pattern matches: {} is the name, {part} that of a part (which the names then begin with), * any
    characters but a slash."""
    if pattern.count("{}") != 1 or pattern.count("{part}") > 1:
        raise UserError(
            f"{flag} {printable(pattern)}: needs one {{}}, which stands for the name that both files share, "
            "and may have one {part}, which stands for train, val or test"
        )
    raw = os.fsencode(os.path.normpath(pattern))
    folder = re.split(rb"[*{]", raw)[0].rpartition(b"/")[0]
    expression = b"".join(_PIECES.get(piece, re.escape(piece)) for piece in re.split(rb"(\{\}|\{part\}|\*)", raw))
    matcher = re.compile(expression, re.DOTALL)
    found = Listing(pattern, {})
    start = os.path.join(os.fsencode(root), folder)
    if not os.path.isdir(start):
        raise UserError(f"{flag} {printable(pattern)}: no folder {printable(folder)} in {shown}")
    for below, _ in walk(start):
        path = folder + b"/" + below if folder else below
        match = matcher.fullmatch(path)
        if match is not None:
            part = part_of(os.fsdecode(match.groupdict().get("part") or b""))
            found.add(match["name"] if part is None else part.encode() + b"/" + match["name"], path, shown)
    return found


def _has_parts(listing: Listing, shown: str) -> bool:
    """Whether names begin with the folders of parts.

    Raises:
        UserError: some begin with a part's folder, and others do not, so that what is to be trained on is not clear.
    """
    by_part: dict[str | None, bytes] = {_part_of(name): path for name, path in listing.files.items()}
    if "train" not in by_part:
        return False
    if None in by_part:
        raise UserError(
            f"--data {shown}: {printable(listing.where)} finds {printable(by_part['train'])} of the training part, but "
            f"{printable(by_part[None])} of no part (train, val, test): move it away, or write a narrower pattern"
        )
    return True


def _part_of(name: bytes) -> str | None:
    """The part whose folder a name begins with."""
    folder, slash, _ = name.partition(b"/")
    return part_of(os.fsdecode(folder)) if slash else None


def _of_part(listing: Listing, part: str) -> Listing:
    some = {name: path for name, path in listing.files.items() if _part_of(name) == part}
    return Listing(f"{printable(listing.where)} ({part})", some)
