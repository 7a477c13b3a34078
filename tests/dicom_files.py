"""DICOM files for the tests, written by pydicom."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest

pydicom: Any = pytest.importorskip("pydicom", minversion="3.0.1", reason="pydicom is not installed: maekit[dicom]")

from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402

from maekit.data.images import decode, probe_size  # noqa: E402

PLAIN = uid.ExplicitVRLittleEndian
NAME = "DOE^JANE"
"""Of a patient; no message may repeat it."""
PIXELS = struct.pack("<HH", 0x7FE0, 0x0010)
"""The tag before the pixels."""
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (13, 18), dtype=np.uint8)
WIDE = RNG.integers(0, 4096, (13, 18), dtype=np.uint16)
RGB = RNG.integers(0, 256, (13, 18, 3), dtype=np.uint8)
TABLE: dict[str, Any] = {
    "LUTDescriptor": [3, 10, 16],
    "LUTData": np.array([100, 250, 900], "<u2").tobytes(),
    "ModalityLUTType": "US",
}
"""Of modality values: the stored ones 10, 11, 12 stand for 100, 250, 900."""


def dicom(
    pixels: Any, *, bits: int | None = None, syntax: str = PLAIN, frames: list[bytes] | None = None, **elements: Any
) -> bytes:  # fmt: skip
    """An array H W (C) as a file, or encoded `frames` of its shape and type; an element of None is left out."""
    pixels = np.asarray(pixels)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = uid.UID(syntax)
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    header.PatientName, header.PatientID = NAME, NAME
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    header.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored = bits or header.BitsAllocated
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2) if frames is None else encapsulate(frames)
    header["PixelData"].VR = "OB" if frames is not None or pixels.dtype.itemsize == 1 else "OW"
    if frames is not None:
        header["PixelData"].is_undefined_length = True
    for name, value in elements.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def run_lengths(values: Any, **elements: Any) -> bytes:
    """The same in run lengths."""
    header = pydicom.dcmread(io.BytesIO(dicom(values, **elements)))
    header.compress(uid.RLELossless)
    buffer = io.BytesIO()
    header.save_as(buffer)
    return buffer.getvalue()


def sequence(**elements: Any) -> Any:
    """A sequence of one item."""
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


def gray(data: bytes) -> Any:
    """The one channel of a gray file; its size from the header agrees."""
    found = decode(data, 1)
    assert found.shape == (*probe_size(data), 1)
    return found[..., 0]


RUN = (
    "--model vit_tiny_patch16_224 --depth 1 --img-size 16 --patch-size 8 --decoder-dim 16 --decoder-depth 1 "
    "--decoder-heads 2 --steps 2 --batch-size 4 --probe-every 0 --device cpu --precision fp32"
).split()
