"""PNGs of a run inside of the page: checked, decoded, made smaller, and written anew; never passed on as they are."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from maekit.report.folder import RunFolder, is_inside
from maekit.report.html import Html, figure, join, paragraph, tag

MOST_BYTES = 64 << 20
MOST_PIXELS = 100_000_000
"""Of a PNG that is decoded: a sheet of eight images of 1,000 px has 32 million."""
WIDTHS = (1400, 1000, 700, 500)
"""Widest picture in pixels, and what is tried next where the page would be too large."""
_QUALITY = 82


@dataclass(frozen=True)
class Encoded:
    """A picture as it stands on the page."""

    data: bytes
    kind: str
    width: int
    height: int

    @property
    def cost(self) -> int:
        """Bytes on the page."""
        return len(self.data) * 4 // 3 + 400


def encoded(path: Path, root: Path, width: int) -> Encoded | str:
    """A picture of at most so many pixels across, as PNG or JPEG, whichever is smaller; or why it cannot be shown."""
    if not is_inside(path, root) or not path.is_file():
        return "not a plain file of this folder"
    try:
        if path.stat().st_size > MOST_BYTES:
            return f"larger than {MOST_BYTES >> 20} MiB"
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            return "not a PNG"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    return f"{picture.width:,} x {picture.height:,} px: too large"
                image = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError, OverflowError, Image.DecompressionBombError) as error:
        return f"a damaged PNG ({str(error)[:80]})"
    if image.width > width:
        height = max(1, round(image.height * width / image.width))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    forms = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": _QUALITY, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **settings)
        forms.append(Encoded(buffer.getvalue(), kind, image.width, image.height))
    return min(forms, key=lambda one: len(one.data))


def spaced(count: int, most: int) -> list[int]:
    """So many of `count` places at most, evenly, the last among them."""
    if most <= 0 or not count:
        return []
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(number * (count - 1) / (most - 1)) for number in range(most)})


def image(one: Encoded, words: str) -> Html:
    """The picture itself."""
    source = f"data:image/{one.kind};base64,{base64.b64encode(one.data).decode()}"
    return tag("img", src=source, alt=words, width=one.width, height=one.height)


def panels(run: RunFolder, most: int, budget: int) -> tuple[Html, int]:
    """The panels with a slider, within so many bytes; what they take. Without its script the last one is seen."""
    if not run.panels or not most:
        return Html(""), 0
    shown: list[tuple[str, Encoded]] = []
    problems: list[str] = []
    chosen: list[int] = []
    for width in WIDTHS:
        last = encoded(run.panels[-1][1], run.path, width)
        room = budget if isinstance(last, str) else budget // max(1, last.cost)
        if room >= min(6, most, len(run.panels)) or width == WIDTHS[-1]:
            chosen = spaced(len(run.panels), min(most, room if isinstance(last, Encoded) else most))
            break
    left = budget
    for number in reversed(chosen):  # the last one first: it is the one that must be there
        words, path = run.panels[number]
        found = encoded(path, run.path, width)
        if isinstance(found, str):
            problems.append(f"{path.name}: {found}")
        elif found.cost <= left:
            left -= found.cost
            shown.insert(0, (words, found))
    if not shown:
        return join([paragraph("No panel can be shown. ", "; ".join(problems[:3]), class_="note")]), 0
    figures = [
        tag("figure", image(one, f"original, masked, reconstruction and pasted, {words}"), data_when=words,
            hidden=number < len(shown) - 1)
        for number, (words, one) in enumerate(shown)
    ]  # fmt: skip
    slider = tag(
        "label", "after ", tag("output", shown[-1][0]),
        tag("input", type="range", min=0, max=len(shown) - 1, step=1, value=len(shown) - 1),
        class_="slide", hidden=True,
    )  # fmt: skip
    note = f"{len(shown)} of {len(run.panels)} panels" if len(shown) < len(run.panels) else f"{len(shown)} panels"
    if len(shown) == 1:
        note = f"The panel after {shown[0][0]}" + (f", one of {len(run.panels)}" if len(run.panels) > 1 else "")
    note += f"; the same held-out images and masks every time. {run.shown_path}/panels has them in full quality."
    notes = [paragraph(note, class_="note")]
    notes += [paragraph("Left out: ", "; ".join(problems[:3]), class_="note")] if problems else []
    return join([tag("div", slider if len(shown) > 1 else "", *figures, class_="slider"), *notes]), budget - left


def sheets(run: RunFolder, names: Sequence[tuple[str, str]], budget: int) -> tuple[Html, int]:
    """Single pictures of a run's folder by name, each with a caption, within so many bytes; what they take."""
    parts, left = [], budget
    for name, words in names:
        path = run.path / name
        if not path.exists():
            continue
        for width in WIDTHS:
            found = encoded(path, run.path, width)
            if isinstance(found, str) or found.cost <= left:
                break
        if isinstance(found, str):
            parts.append(paragraph(f"{name}: {found}", class_="note"))
        elif found.cost <= left:
            left -= found.cost
            parts.append(figure(image(found, words), words))
        else:
            parts.append(paragraph(f"{name} is left out: the page would grow beyond --max-mb", class_="note"))
    return join(parts), budget - left
