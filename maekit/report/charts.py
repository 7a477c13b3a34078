"""Axes of maekit's pictures as SVG inside of a page, in the page's own colours and letters."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from maekit.report.html import Html, esc, figure
from maekit.report.style import COLOURS
from maekit.viz.plots import LOOK, PALE, Drawing

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"font: ((?:(?:bold|italic|\d{3}) )*[\d.]+px) [^;\"]*")
LOOKS: list[Any] = ["default", LOOK, {"svg.fonttype": "none", "figure.facecolor": "none", "axes.facecolor": "none",
                                       "savefig.facecolor": "none"}]  # fmt: skip


def chart(drawing: Drawing, prefix: str) -> Html:
    """One axes with its title as a caption; a line of words where it cannot be drawn. prefix: unique on the page."""
    with matplotlib.style.context(LOOKS):
        picture = Figure(figsize=(5.4, 3.1), dpi=100)
        picture.set_layout_engine("constrained", w_pad=0.04, h_pad=0.06)
        axes = picture.subplots()
        try:
            drawing.draw(axes)
            axes.set_xlabel(drawing.along, color=PALE)
            inner = svg(picture, prefix, drawing.title)
        except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            inner = esc(f"cannot be drawn: {str(error)[:200]}")
    return figure(inner, drawing.title)


def charts(drawings: Sequence[Drawing], prefix: str) -> Html:
    """Several of them side by side, as many as there is room for."""
    inner = "".join(chart(one, f"{prefix}{number}") for number, one in enumerate(drawings))
    return Html(f'<div class="charts">{inner}</div>')


def svg(picture: Figure, prefix: str, label: str, own_colours: bool = False) -> Html:
    """A figure as an <svg> element: without metadata, its ids unique on the page, its words as text.

    own_colours: keep them as they are drawn, for a picture that stands on white. Otherwise the page's are taken, which
    differ in a dark room.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        warnings.simplefilter("ignore")  # letters that the font lacks are the reader's font's business
        picture.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
    wanted = set()
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if (link := element.attrib.pop(f"{_XLINK}href", None)) is not None:
            element.set("href", link)
            wanted.add(link.removeprefix("#"))
        for value in element.attrib.values():
            wanted.update(_REFERENCE.findall(value))
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in wanted:
            element.set("id", f"{prefix}-{name}")
        if element.get("href", "").startswith("#"):
            element.set("href", f"#{prefix}-{element.attrib['href'][1:]}")
        for key, value in element.attrib.items():
            element.set(key, styled(_REFERENCE.sub(rf"url(#{prefix}-\1)", value), key, own_colours))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Html(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def styled(value: str, key: str, own_colours: bool) -> str:
    """An attribute with the page's letters, and with its colours."""
    if key != "style":
        return value
    value = _FONT.sub(r"font-size: \1", value).replace("font-size: bold ", "font-weight: 700; font-size: ")
    if not own_colours:
        for name, (light, _) in COLOURS.items():
            value = value.replace(light, f"var(--{name})")
    return value
