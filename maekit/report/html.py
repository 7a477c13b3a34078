"""Pieces of a page. Whatever is not `Html` already is somebody's text, and is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from maekit.config.base import printable

_VOID = ("img", "input", "meta")
"""Elements without an end."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def esc(value: object) -> Html:
    """Any text as HTML: nothing in it can be a tag, end an attribute, or turn the line around."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value)), quote=True))


def tag(name: str, /, *inner: object, **attributes: object) -> Html:
    """An element; `class_` is class, `aria_label` is aria-label, True an attribute without a value, None none."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{esc(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if name in _VOID else f"{''.join(esc(one) for one in inner)}</{name}>"
    return Html(f"<{name}{shown}>{end}")


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Pieces one after the other; what stands between them is no text of anybody's."""
    return Html(between.join(esc(part) for part in parts))


def paragraph(*inner: object, class_: str | None = None) -> Html:
    """A paragraph."""
    return tag("p", *inner, class_=class_)


def heading(level: int, words: object, id_: str | None = None) -> Html:
    """A heading."""
    return tag(f"h{level}", words, id_=id_)


def bullets(lines: Iterable[object]) -> Html:
    """A list; nothing where there are no lines."""
    found = [tag("li", line) for line in lines]
    return tag("ul", *found) if found else Html("")


def pairs(rows: Iterable[tuple[object, object]]) -> Html:
    """Names and values, one under the other."""
    found = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows]
    return tag("dl", *found, class_="pairs") if found else Html("")


def code(words: object) -> Html:
    """A command or a name, as it is typed."""
    return tag("code", words)


def details(summary: object, *inner: object) -> Html:
    """What is seen when it is asked for; in print it is as it stands."""
    return tag("details", tag("summary", summary), *inner)


def table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: object = "",
    words: Sequence[int] = (0,),
    class_: str | None = None,
) -> Html:
    """A table whose first cells name the rows; it scrolls by itself where it is too wide.

    words: the columns that hold words; the others hold numbers and are aligned at the right.
    """
    head = "".join(
        tag("th", one, scope="col", class_=None if number in words else "n") for number, one in enumerate(headings)
    )
    body = "".join(
        tag("tr", *(
            tag("th", cell, scope="row") if number == 0 else tag("td", cell, class_=None if number in words else "n")
            for number, cell in enumerate(row)
        ))
        for row in rows
    )  # fmt: skip
    title = tag("caption", caption) if caption else Html("")
    inner = tag("table", title, Html(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"), class_=class_)
    label = esc(caption) if isinstance(caption, str) and caption and not isinstance(caption, Html) else "table"
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label=label)


def figure(inner: object, caption: object = "", class_: str | None = None) -> Html:
    """A picture with its caption."""
    return tag("figure", tag("figcaption", caption) if caption else "", inner, class_=class_)
