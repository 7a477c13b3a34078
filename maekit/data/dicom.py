"""DICOM, the images of medicine, by pydicom (the extra `maekit[dicom]`), which is imported when such a file is met.

What a file gives (part 3 of the standard, C.7.6.3 and C.11.1):

- Colours (RGB, YBR, palettes): as they are shown, uint8 where they have 8 bits; of a 16-bit palette the high bytes.
- Gray whose rescale or table changes the stored values: float32 in their unit, as float TIFFs are taken. CT and PET
  that state a rescale are in their unit even where it changes nothing: one folder should not hold two scales.
- Other gray: the stored value over the largest that its bits can hold; uint8 for 8 unsigned bits, else float32 in
  0..1, or -1..1 for signed values, which seldom are below 0.
- MONOCHROME1, where more is darker, is turned around: lowest + highest - value, of all that bits and rescale allow and
  not of this image, so that radiographs of both kinds look alike on one scale. CT and PET stay: Hounsfield units and
  activity are quantities, however a viewer paints them.

Windows (VOI) are not applied: they are made for looking, cut off the rest, and differ from file to file. Padding
(PixelPaddingValue) stays what it is. Of several frames the first is read. Messages repeat no word of a header, which
names a patient. Legend: H height, W width, C channels.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import IO, Any

import numpy as np

from maekit.data.pixels import BadImage, Pixels, check_size, to_pixels

SUFFIXES = (".dcm", ".dicom")
HEAD_BYTES = 132
"""Of a file's beginning, what `is_dicom` looks at."""
NEEDS = "DICOM files need pydicom: pip install 'maekit[dicom]'"
MAX_READS = 100_000
"""Of a header, whose elements are one or two reads each: 8 bytes of a file cost pydicom up to 40 us and 1.3 kB."""

_QUANTITIES = ("CT", "PT")
_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1}
_SAMPLES |= dict.fromkeys(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"), 3)
_FRAMES = ["PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"]
_TABLES = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
_TAGS = [
    *"Modality SamplesPerPixel PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored".split(),
    *"PixelRepresentation RescaleIntercept RescaleSlope ModalityLUTSequence ExtendedOffsetTable".split(),
    "ExtendedOffsetTableLengths", *_FRAMES, *(table + part for table in _TABLES for part in ("Descriptor", "Data")),
]  # fmt: skip
"""What is read of a header; the rest is skipped."""


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM, whatever its name."""
    return head[128:132] == b"DICM"


def size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels, from the header; raises BadImage."""
    header = _header(file)
    return header.Rows, header.Columns


def frames_left_out(file: IO[bytes]) -> int:
    """How many frames `decode` leaves unread, by the header; raises BadImage."""
    return max(1, int(_header(file).get("NumberOfFrames") or 1)) - 1


def decode(file: IO[bytes]) -> Pixels:
    """The first frame H W C, C 1 or 3: uint8, or float32.

    Raises:
        BadImage: what is not read, a bomb, a missing decoder. Damage raises about everything.
    """
    header = _header(file)
    photometric, bits = header.PhotometricInterpretation, header.BitsAllocated
    if _SAMPLES.get(photometric) != header.SamplesPerPixel:
        raise BadImage("DICOM that is neither gray, RGB, YBR nor of a palette")
    if photometric.startswith("YBR") and bits != 8:
        raise BadImage(f"DICOM of YBR colours of {bits:d} bits; 8 are read")
    adobe = _is_adobe(file, header)
    try:
        values = _pydicom().pixels.pixel_array(file, index=0, raw=adobe, decoding_plugin="pillow" if adobe else "")
    except RuntimeError as error:  # from all decoders that are there
        if re.search("not support|cannot decode", str(error)):  # Pillow: JPEG of 12 bits, colours of more than 8
            raise _undecoded(header) from error
        raise
    if photometric == "PALETTE COLOR":
        return _coloured(values, header)
    if values.ndim == 2:
        return _gray(values, header)[..., None]
    return _unit(values.astype(np.float32), 0, (1 << header.BitsStored) - 1)


@functools.cache
def _pydicom() -> Any:
    try:
        import pydicom.encaps
        import pydicom.pixels
    except ImportError:
        raise BadImage(NEEDS) from None
    # It reports damage to its logger and goes on, with words of the header; importing it sets a level of its own.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return pydicom


class _Bounded:
    """The file as pydicom reads its header: in so many steps at most, and not inflated."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._reads = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise BadImage(f"DICOM whose header takes more than {MAX_READS:,} steps to read (a bomb?)")
        if count < 0:  # all that follows is wanted for nothing but inflating it, however large that is
            raise BadImage("deflated DICOM, which is not read; dcmconv +te of DCMTK writes it uncompressed")
        return self._file.read(count)


def _header(file: IO[bytes]) -> Any:
    """The elements of _TAGS, with the file at its pixels; the size and the way of storing are checked."""
    header = _pydicom().dcmread(_Bounded(file), stop_before_pixels=True, specific_tags=_TAGS)
    if any(len(one.value or b"") > 8 * MAX_READS for one in header.elements() if isinstance(one.value, bytes | None)):
        raise BadImage(f"DICOM of a header with more than {8 * MAX_READS:,} bytes to parse (a bomb?)")
    if not file.read(1):
        raise BadImage("DICOM without pixels, or truncated before them")
    file.seek(-1, 1)
    check_size(int(header.Rows), int(header.Columns))
    syntax = header.file_meta.TransferSyntaxUID
    try:
        there = _pydicom().pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        raise BadImage(f"DICOM of transfer syntax {_name(header)}, which is not read") from None
    if not there:
        raise _undecoded(header)
    return header


def _name(header: Any) -> str:
    """The transfer syntax in words, or its number where nobody knows it."""
    syntax = header.file_meta.TransferSyntaxUID
    return syntax.name if syntax.name != syntax or re.fullmatch("[0-9.]{1,64}", syntax) else "that is no number"


def _undecoded(header: Any) -> BadImage:
    return BadImage(
        f"DICOM in {_name(header)} of {header.BitsStored:d} bits needs a decoder: pip install 'pylibjpeg[all]'"
    )


def _is_adobe(file: IO[bytes], header: Any) -> bool:
    """Whether Pillow makes RGB of the first frame by a JPEG's Adobe marker; pydicom would take that for YBR still.

    Raises:
        BadImage: run lengths that are too few for the frame's size, or so many that they would fill the memory.
    """
    syntax = header.file_meta.TransferSyntaxUID.name
    if syntax not in ("RLE Lossless", "JPEG Baseline (Process 1)"):
        return False
    options = _pydicom().pixels.as_pixel_options(header)
    file.seek(12, 1)  # behind tag, type and length of the pixels
    frame = _pydicom().encaps.get_frame(
        file, 0, number_of_frames=options["number_of_frames"], extended_offsets=options.get("extended_offsets")
    )
    if syntax != "RLE Lossless":
        return b"\xff\xee\0\x0eAdobe" in frame
    whole = header.Rows * header.Columns * header.SamplesPerPixel * (header.BitsAllocated // 8)
    if not whole // 64 <= len(frame) <= 2 * whole + 1024:  # 2 bytes stand for 128 at most; 1 needs 2 at worst
        raise BadImage("truncated DICOM, or a bomb: run lengths that cannot be of its size")
    return False


def _coloured(values_HW: Pixels, header: Any) -> Pixels:
    """A palette's colours H W 3, uint8."""
    if "RedPaletteColorLookupTableData" not in header:
        raise BadImage("DICOM of a palette that is missing or in segments, which is not read")
    colours_HWC: Pixels = _pydicom().pixels.apply_color_lut(values_HW, header)
    bits = header.RedPaletteColorLookupTableDescriptor[2]
    return (colours_HWC >> 8 if bits > 8 else colours_HWC).astype(np.uint8)


def _gray(values_HW: Pixels, header: Any) -> Pixels:
    """Gray H W in the unit of the modality, or of the stored values' range."""
    if values_HW.dtype.kind == "f":  # Float Pixel Data: in their unit already
        return to_pixels(values_HW)
    lowest = -(1 << header.BitsStored - 1) if values_HW.dtype.kind == "i" else 0
    highest = lowest + (1 << header.BitsStored) - 1
    turned = header.PhotometricInterpretation == "MONOCHROME1" and header.get("Modality") not in _QUANTITIES
    holder = _rescale(header)
    if holder is None:
        stored_HW = values_HW.astype(np.float32)
        return _unit(highest - stored_HW, 0, highest - lowest) if turned else _unit(stored_HW, lowest, highest)
    rescaled = _pydicom().pixels.apply_modality_lut
    unit_HW = rescaled(values_HW.astype(np.int64), holder).astype(np.float64)
    ends = rescaled(np.array([lowest, highest]), holder).astype(np.float64)
    return to_pixels(ends.sum() - unit_HW if turned else unit_HW)


def _rescale(header: Any) -> Any:
    """The part of a header with the table or rescale that changes stored values or makes a quantity of them, if any."""
    groups = [group for name in _FRAMES for group in list(header.get(name) or [])[:1]]
    frames = [one for group in groups for one in list(group.get("PixelValueTransformationSequence") or [])[:1]]
    for one in (header, *frames):
        if one.get("ModalityLUTSequence"):
            return one
        quantity = header.get("Modality") in _QUANTITIES
        if "RescaleSlope" in one and (quantity or (one.RescaleSlope, one.RescaleIntercept) != (1, 0)):
            return one
    return None


def _unit(stored: Pixels, lowest: int, highest: int) -> Pixels:
    """Stored values over the highest of their range; uint8 where this is 0 to 255."""
    if stored.min() < lowest or stored.max() > highest:
        raise BadImage(f"DICOM with values beyond its bits, {lowest} to {highest}")
    return stored.astype(np.uint8) if (lowest, highest) == (0, 255) else stored / np.float32(highest)
