"""Annotations that are pictures of colours: each colour stands for a class, as a table of the user's says.

Legend: H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from maekit.data.annotations import Colour
from maekit.data.images import open_pillow, quiet, raw_mode_of, reading
from maekit.data.pixels import BadImage

MOST_COLOURS = 64
"""So many colours that annotations may have; pictures have more."""


def read_colours(data: bytes | str) -> npt.NDArray[np.uint32]:
    """The colours of an encoded annotation, or of the file at a path, as 65536 red + 256 green + blue, [H, W].

    Raises:
        BadImage: not readable, a lossy format, transparency, or no picture of colours.
    """
    with reading(data) as file, quiet:
        file.seek(0)
        image = open_pillow(file)
        if image.format not in ("PNG", "TIFF", "BMP", "GIF"):
            raise BadImage(f"an annotation as {image.format}, which does not keep colours as they are; save it as PNG")
        image.info.pop("xmp", None)
        if image.mode not in ("RGB", "RGBA", "P") or ";16" in raw_mode_of(image):
            raise BadImage(f"mode {image.mode} where a picture of colours is expected")
        pixels = np.asarray(image.convert("RGBA"), np.uint32)
    if (pixels[..., 3] != 255).any():
        raise BadImage(f"mode {image.mode} with transparent pixels where colours stand for classes")
    return (pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]).astype(np.uint32)


def unpacked(colour: int) -> Colour:
    """Red, green and blue of a colour of `read_colours`."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def values_of_colours(data: bytes | str, colours: tuple[Colour, ...]) -> npt.NDArray[np.uint16]:
    """The place of each pixel's colour among `colours`, [H, W].

    Raises:
        BadImage: as of `read_colours`, or other colours, which are named with their pixels.
    """
    packed_HW = read_colours(data)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in colours], np.uint32)
    order = np.argsort(known)
    place_HW = np.minimum(np.searchsorted(known[order], packed_HW), len(known) - 1)
    wrong_HW = known[order][place_HW] != packed_HW
    if wrong_HW.any():
        others, counts = np.unique(packed_HW[wrong_HW], return_counts=True)
        most = np.argsort(-counts)[:6]
        listed = ", ".join(f"{unpacked(int(others[at]))} ({counts[at]:,} pixels)" for at in most)
        raise BadImage(f"{len(others):,} colours that the table does not have: {listed}")
    return order[place_HW].astype(np.uint16)


def how_to_convert(colours: Iterable[Colour]) -> tuple[str, ...]:
    """Lines for the user whose annotations are pictures of colours, with those that some of them hold."""
    found = sorted(colours)
    if len(found) > MOST_COLOURS:
        return (
            f"a few of them hold {len(found):,} colours, so they are pictures, or were saved or resized in a way that "
            "mixes colours: take them from where they were made, as PNG",
        )
    table = ", ".join(f"({', '.join(map(str, colour))}): {number}" for number, colour in enumerate(found, 1))
    return (
        "to read colours as classes, give --classes FILE.csv with the columns name, r, g, b and a line for each colour "
        "(one of the name void for pixels of no class);",
        "to convert an annotation from colours to numbers, with your own numbers for "
        f"colours = {{{table or '(128, 64, 128): 1'}}}:",
        "    rgb = numpy.array(Image.open(file).convert('RGB')); ids = numpy.zeros(rgb.shape[:2], 'uint8')",
        "    for colour, number in colours.items(): ids[(rgb == colour).all(axis=2)] = number",
        "    Image.fromarray(ids).save(new_file)  # a PNG; pixels of any other colour stay 0",
    )
