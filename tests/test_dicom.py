"""maekit/data/dicom.py: DICOM files become images, each against values worked out by hand; every fault is a line."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from dicom_files import GRAY, PIXELS, RGB, TABLE, WIDE, dicom, gray, pydicom, run_lengths, sequence
from image_files import encoded, reason
from PIL import Image
from pydicom import uid

from maekit.data.images import decode, frames_left_out

# ---- values ----


def floats(values: Any) -> Any:
    return np.asarray(values, np.float32)


def test_gray_is_the_share_of_what_its_bits_can_hold() -> None:
    np.testing.assert_array_equal(gray(dicom(GRAY)), GRAY)
    assert gray(dicom(GRAY)).dtype == np.uint8
    wide16 = (WIDE * 16).astype(np.uint16)
    np.testing.assert_array_equal(gray(dicom(wide16)), wide16.astype(np.float32) / np.float32(65535))
    np.testing.assert_array_equal(gray(dicom(WIDE, bits=12)), WIDE.astype(np.float32) / np.float32(4095))
    np.testing.assert_array_equal(gray(dicom(GRAY.astype(np.uint16), bits=8)), GRAY)
    deep = np.array([[0, 2**32 - 1, 2**31]], np.uint32)
    np.testing.assert_allclose(gray(dicom(deep)), [[0, 1, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(decode(dicom(GRAY), 3), GRAY[..., None].repeat(3, axis=2))


def test_bits_above_those_stored_do_not_count() -> None:
    """Old files keep an overlay there."""
    np.testing.assert_array_equal(gray(dicom(WIDE | 0x8000, bits=12)), gray(dicom(WIDE, bits=12)))


def test_signed_values_keep_their_zero() -> None:
    """So that a scanner's files of both kinds, none of them below 0, have a black that is 0."""
    np.testing.assert_array_equal(
        gray(dicom(np.array([[-2048, 0, 2047]], np.int16), bits=12)), floats([[-2048 / 2047, 0, 1]])
    )
    np.testing.assert_array_equal(gray(dicom(np.array([[-128, 0, 127]], np.int8))), floats([[-128 / 127, 0, 1]]))


def test_a_rescale_gives_the_unit() -> None:
    stored = np.array([[-24, 0, 1000]], np.int16)
    found = gray(dicom(stored, bits=12, Modality="CT", RescaleSlope="2", RescaleIntercept="-1024"))
    np.testing.assert_array_equal(found, floats([[-1072, -1024, 976]]))
    assert found.dtype == np.float32
    found = gray(dicom(GRAY, Modality="MR", RescaleSlope="0.5", RescaleIntercept="0"))
    np.testing.assert_array_equal(found, GRAY.astype(np.float32) / 2)


def test_a_rescale_that_changes_nothing_makes_a_quantity_of_ct_and_pet_only() -> None:
    same: dict[str, Any] = {"RescaleSlope": "1.0", "RescaleIntercept": "0"}
    stored = np.array([[-1000, 0, 40]], np.int16)
    np.testing.assert_array_equal(gray(dicom(stored, Modality="CT", **same)), floats([[-1000, 0, 40]]))
    np.testing.assert_array_equal(gray(dicom(stored, Modality="PT", **same)), floats([[-1000, 0, 40]]))
    np.testing.assert_array_equal(gray(dicom(GRAY, Modality="DX", **same)), GRAY)
    np.testing.assert_array_equal(gray(dicom(GRAY, Modality="CT")), GRAY)


def test_a_rescale_of_frames_is_found_where_they_keep_it() -> None:
    def groups(slope: str) -> Any:
        return sequence(PixelValueTransformationSequence=sequence(RescaleSlope=slope, RescaleIntercept="-5"))

    shared = dicom(GRAY, SharedFunctionalGroupsSequence=groups("3"))
    np.testing.assert_array_equal(gray(shared), GRAY.astype(np.float32) * 3 - 5)
    both = dicom(GRAY, SharedFunctionalGroupsSequence=sequence(), PerFrameFunctionalGroupsSequence=groups("2"))
    np.testing.assert_array_equal(gray(both), GRAY.astype(np.float32) * 2 - 5)


def test_a_table_of_modality_values_is_applied() -> None:
    table = sequence(**TABLE)
    stored = np.array([[0, 10, 11, 12, 200, 13]], np.uint8)
    found = gray(dicom(stored, ModalityLUTSequence=table))
    np.testing.assert_array_equal(found, floats([[100, 100, 250, 900, 900, 900]]))
    turned = gray(dicom(stored, ModalityLUTSequence=table, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned, 1000 - found)


def test_monochrome1_is_turned_around_within_what_the_file_can_hold() -> None:
    one: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1"}
    np.testing.assert_array_equal(gray(dicom(GRAY, **one)), 255 - GRAY)
    np.testing.assert_array_equal(
        gray(dicom(WIDE, bits=12, **one)), (4095 - WIDE.astype(np.float32)) / np.float32(4095)
    )
    np.testing.assert_array_equal(gray(dicom(np.array([[-128, 0, 127]], np.int8), **one)), [[255, 127, 0]])
    # 4095 stored is 8090, 0 is -100: together 7990
    scaled = gray(dicom(WIDE, bits=12, RescaleSlope="2", RescaleIntercept="-100", **one))
    np.testing.assert_array_equal(scaled, 7990 - (2 * WIDE.astype(np.float32) - 100))
    assert scaled.min() >= -100
    quantity = gray(dicom(WIDE, bits=12, Modality="PT", RescaleSlope="2", RescaleIntercept="0", **one))
    np.testing.assert_array_equal(quantity, 2 * WIDE.astype(np.float32))


def test_window_and_padding_are_not_applied() -> None:
    data = dicom(GRAY, WindowCenter="40", WindowWidth="10", PixelPaddingValue=int(GRAY[0, 0]))
    np.testing.assert_array_equal(gray(data), GRAY)


def test_colours_are_as_they_are_shown() -> None:
    np.testing.assert_array_equal(decode(dicom(RGB), 3), RGB)
    planes = dicom(RGB, PlanarConfiguration=1, PixelData=np.ascontiguousarray(RGB.transpose(2, 0, 1)).tobytes())
    np.testing.assert_array_equal(decode(planes, 3), RGB)
    wide = RGB.astype(np.uint16) * 257
    np.testing.assert_allclose(decode(dicom(wide), 3), RGB / 255, rtol=1e-6)
    ybr = np.array([[[76, 85, 255], [128, 128, 128], [255, 128, 128]]], np.uint8)  # JFIF: red, gray, white
    found = decode(dicom(ybr, PhotometricInterpretation="YBR_FULL"), 3)
    np.testing.assert_allclose(found, [[[254, 0, 0], [128, 128, 128], [255, 255, 255]]], atol=1)
    # two pixels share their colour: Y Y B R
    half = np.zeros((1, 2, 3), np.uint8)
    found = decode(dicom(half, PhotometricInterpretation="YBR_FULL_422", PixelData=bytes([76, 76, 85, 255])), 3)
    np.testing.assert_allclose(found, [[[254, 0, 0], [254, 0, 0]]], atol=1)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_applied(bits: int) -> None:
    stored = np.array([[0, 5, 6, 7, 200, 8]], np.uint8)
    colours = np.array([[255, 0, 9], [1, 2, 3], [10, 20, 30], [200, 100, 50]], np.uint8)  # of 5, 6, 7, 8
    tables: dict[str, Any] = {}
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        entries = column.tobytes() if bits == 8 else (column.astype("<u2") << 8).tobytes()
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [4, 5, bits]
        tables[f"{name}PaletteColorLookupTableData"] = entries
    found = decode(dicom(stored, PhotometricInterpretation="PALETTE COLOR", **tables), 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, colours[[0, 0, 1, 2, 3, 3]][None])
    without: Any = dict.fromkeys(name for name in tables if name.endswith("Descriptor"))
    missing = {name: value for name, value in tables.items() if name not in without and "Data" not in name}
    assert "palette" in reason(dicom(stored, PhotometricInterpretation="PALETTE COLOR", **missing))


def test_floats_and_single_bits() -> None:
    values = floats([[-1.5, 0, 3e5]])
    data = dicom(np.zeros((1, 3), np.uint32), PixelData=None, FloatPixelData=values.tobytes())
    np.testing.assert_array_equal(gray(data), values)
    bits = dicom(np.zeros((2, 8), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\x01\x80")
    np.testing.assert_array_equal(gray(bits), floats(np.eye(8)[[0, 7]]))


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_other_ways_to_write_numbers(syntax: str) -> None:
    order = WIDE.astype(">u2") if syntax == uid.ExplicitVRBigEndian else WIDE
    header = pydicom.dcmread(io.BytesIO(dicom(WIDE, bits=12)))
    header.PixelData = order.tobytes()
    header.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header, implicit_vr=syntax == uid.ImplicitVRLittleEndian,
                     little_endian=syntax != uid.ExplicitVRBigEndian, enforce_file_format=True)  # fmt: skip
    np.testing.assert_array_equal(gray(buffer.getvalue()), gray(dicom(WIDE, bits=12)))


# ---- compressed ----


def test_run_lengths() -> None:
    np.testing.assert_array_equal(gray(run_lengths(WIDE, bits=12)), gray(dicom(WIDE, bits=12)))
    np.testing.assert_array_equal(decode(run_lengths(RGB), 3), RGB)
    np.testing.assert_array_equal(gray(run_lengths(np.zeros((500, 400), np.uint16))), np.zeros((500, 400)))


def test_jpeg_baseline() -> None:
    one = encoded(Image.fromarray(GRAY), "JPEG")
    data = dicom(GRAY, syntax=uid.JPEGBaseline8Bit, frames=[one])
    np.testing.assert_array_equal(gray(data), np.asarray(Image.open(io.BytesIO(one))))
    smooth = np.asarray(Image.fromarray(RGB).resize((64, 48), Image.Resampling.BICUBIC))
    whole = encoded(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0)
    bare = whole[:2] + whole[4 + int.from_bytes(whole[4:6]) :]  # without the JFIF marker
    adobe = whole[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1" + bare[2:]
    for one, photometric in (
        (whole, "YBR_FULL_422"),
        (encoded(Image.fromarray(smooth), "JPEG", quality=95), "YBR_FULL_422"),
        (encoded(Image.fromarray(smooth), "JPEG", quality=95, keep_rgb=True), "RGB"),
        (bare, "YBR_FULL"),
        (adobe, "YBR_FULL_422"),
        (adobe, "RGB"),
    ):
        data = dicom(smooth, syntax=uid.JPEGBaseline8Bit, frames=[one], PhotometricInterpretation=photometric)
        shown = np.asarray(Image.open(io.BytesIO(one)).convert("RGB"))
        np.testing.assert_allclose(decode(data, 3).astype(int), shown, atol=2)


def test_jpeg_2000() -> None:
    one = encoded(Image.fromarray(GRAY), "JPEG2000", no_jp2=True)
    np.testing.assert_array_equal(gray(dicom(GRAY, syntax=uid.JPEG2000Lossless, frames=[one])), GRAY)
    wide16 = (WIDE * 16).astype(np.uint16)
    one = encoded(Image.fromarray(wide16), "JPEG2000", no_jp2=True)
    np.testing.assert_array_equal(gray(dicom(wide16, syntax=uid.JPEG2000Lossless, frames=[one])), gray(dicom(wide16)))
    one = encoded(Image.fromarray(RGB), "JPEG2000", no_jp2=True, mct=1)
    data = dicom(RGB, syntax=uid.JPEG2000Lossless, frames=[one], PhotometricInterpretation="YBR_RCT")
    np.testing.assert_array_equal(decode(data, 3), RGB)


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        (uid.JPEGLosslessSV1, "JPEG Lossless"),
        (uid.JPEGLSLossless, "JPEG-LS Lossless"),
        (uid.HTJ2KLossless, "High-Throughput JPEG 2000"),
        (uid.JPEGExtended12Bit, "JPEG Extended"),
    ],
)
def test_a_decoder_that_is_missing_is_named(syntax: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here; Pillow takes JPEG of 12 bits on, and refuses it when it decodes."""
    if syntax != uid.JPEGExtended12Bit:
        decoder = type(pydicom.pixels.get_decoder(syntax))
        monkeypatch.setattr(decoder, "is_available", property(lambda _: False))
    found = reason(dicom(WIDE, bits=12, syntax=syntax, frames=[encoded(Image.fromarray(GRAY), "JPEG")]))
    assert words in found and "pip install 'pylibjpeg[all]'" in found


# ---- frames ----


def test_only_the_first_frame_is_read() -> None:
    stack = np.stack([WIDE, WIDE[::-1], WIDE[:, ::-1]])
    plain = dicom(WIDE, bits=12, NumberOfFrames="3", PixelData=stack.tobytes())
    np.testing.assert_array_equal(gray(plain), gray(dicom(WIDE, bits=12)))
    assert frames_left_out(plain, 1) == 2
    assert frames_left_out(dicom(WIDE), 1) == 0
    cut = plain[: plain.index(PIXELS) + 12 + WIDE.nbytes]
    np.testing.assert_array_equal(gray(cut), gray(plain))  # nothing behind the first frame is touched
    first, junk = encoded(Image.fromarray(GRAY), "JPEG2000", no_jp2=True), b"no image"
    packed = dicom(GRAY, syntax=uid.JPEG2000Lossless, frames=[first, junk, junk], NumberOfFrames="3")
    np.testing.assert_array_equal(gray(packed), GRAY)
    assert frames_left_out(packed, 3) == 2
    assert frames_left_out(dicom(WIDE, NumberOfFrames="-4"), 1) == 0
