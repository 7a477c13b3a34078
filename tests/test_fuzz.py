"""Whatever is read from disk may hold anything: one clear UserError, never a traceback, a hang or a full memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from image_files import encoded, photograph
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import make_checkpoint

from maekit.config import ModelConfig, PretrainConfig, UserError
from maekit.configfile import from_json, read
from maekit.data.images import BadImage, decode, frames_left_out, probe_size
from maekit.data.sources import open_source
from maekit.training import checkpoint as checkpoints
from maekit.training.run import Position
from maekit.training.saving import position_of
from maekit.weights.passport import Passport
from maekit.weights.store import load, random_model

PROMISE = "files of any content: one clear line, no traceback, no hang"

set_hypothesis_home_dir(ROOT / ".pytest_cache" / "hypothesis")  # its tables of characters; `make clean` removes them

SECONDS = 20
"""One example may take so long; the slowest takes a tenth of it."""
MEMORY = 300 << 20
"""Bytes by which a test may raise the peak of this process."""


def _late(_number: int, _frame: object) -> None:
    raise TimeoutError(f"an example took more than {SECONDS} s")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of one example."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY


def refused(error: UserError) -> None:
    """Few lines, short ones, that a terminal can show."""
    assert 0 < len(error.problems) <= 40
    for problem in error.problems:
        said(problem, 1500)


def said(text: str, longest: int) -> None:
    """One line that a terminal can show."""
    assert 0 < len(text) < longest, len(text)
    assert text.isprintable(), text


# ---- what may stand anywhere ----

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**9, -(10**9), 2**31, 2**63, -(2**63) - 1, 10**400, 0]),
    st.floats(),
    st.sampled_from([1e308, 1e-320, 0.5, -0.0]),
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "\x1b[2J", "[/red]", "../..", "x" * 20_000, "\0"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


def changed(base: dict[str, Any], extra: st.SearchStrategy[str] = texts) -> st.SearchStrategy[dict[str, Any]]:
    """A good object with up to three fields of other values, without some, or with unknown ones."""
    names = st.one_of(st.sampled_from(sorted(base)), extra)
    return st.builds(
        lambda new, lost: {name: value for name, value in (base | new).items() if name not in lost},
        st.dictionaries(names, values, max_size=3),
        st.sets(st.sampled_from(sorted(base)), max_size=1),
    )


MODEL = random_model(tiny_config())
PASSPORT = json.loads(MODEL.passport.to_metadata()["maekit"])
SCRATCH = Path(tempfile.mkdtemp(prefix="maekit-fuzz-"))


@pytest.fixture(scope="module", autouse=True)
def _scratch() -> Iterator[None]:
    torch.set_num_threads(1)
    SCRATCH.mkdir(exist_ok=True)
    yield
    shutil.rmtree(SCRATCH, ignore_errors=True)


# ---- config JSON ----


def check_config_text(text: str) -> None:
    for kind in (PretrainConfig, ModelConfig, Passport):
        try:
            found = from_json(kind, text, "c.json")
        except UserError as error:
            refused(error)
        else:
            assert isinstance(found, kind)


def check_config_bytes(data: bytes) -> None:
    (SCRATCH / "c.json").write_bytes(data)
    try:
        read(PretrainConfig, SCRATCH / "c.json")
    except UserError as error:
        refused(error)


def check_pretrain_config(fields: dict[str, Any]) -> None:
    """What is read back can be checked too: no number is too long for the check or its message."""
    try:
        config = from_json(PretrainConfig, json.dumps(fields), "c.json")
    except UserError as error:
        refused(error)
        return
    problems = config.problems()
    assert all(isinstance(problem, str) for problem in problems)


# ---- passports ----


def write_weights(passport: Any, header: dict[str, str] | None = None) -> Path:
    path = SCRATCH / "w.safetensors"
    text = passport if isinstance(passport, str) else json.dumps(passport)
    metadata = {"maekit": text.encode(errors="replace").decode()}
    save_file(dict(MODEL.state_dict()), path, metadata=metadata if header is None else header)
    return path


def check_passport(passport: Any) -> None:
    path = write_weights(passport)
    try:
        found = load(path)
    except UserError as error:
        refused(error)
    else:
        found.encode(torch.zeros(1, 3, 16, 24))


def check_damaged_weights(damage: list[tuple[float, int]]) -> None:
    path = write_weights(PASSPORT)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place, value in damage:  # half of the places are in the header
        data[int(place * 2 * header) if place < 0.5 else int((place - 0.5) * 2 * (len(data) - 1))] = value
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        load(path)


damages = st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4)
passports = st.one_of(
    changed(PASSPORT),
    st.builds(lambda model, rest: rest | {"model": model}, changed(PASSPORT["model"]), changed(PASSPORT)),
    texts,
)


# ---- Parquet ----

PNG = encoded(photograph(1))
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 10**9, 10**9) + PNG[24:]
blobs = st.one_of(st.none(), st.binary(max_size=40), st.sampled_from([PNG, HUGE, PNG[:60], b""]))
paths = st.one_of(st.none(), st.sampled_from(["../x.png", "/etc/hostname", "a\0b", "", "x.parquet", "\u00e9"]))
images = st.one_of(st.none(), st.fixed_dictionaries({"bytes": blobs, "path": paths}))
label_columns = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-3, 12), st.sampled_from([2**40, -(2**40)])), min_size=4, max_size=4),
    st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=5)), min_size=4, max_size=4),
    st.lists(st.one_of(st.none(), st.floats()), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=4, max_size=4),
)
features = st.one_of(
    st.none(),
    values,
    st.builds(lambda names: {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}, values),
    st.just({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}),
)
tables = st.fixed_dictionaries(
    {"images": st.lists(images, min_size=4, max_size=4), "labels": label_columns, "features": features,
     "damage": st.one_of(st.just([]), st.just([]), damages)}
)  # fmt: skip


def check_table(table: dict[str, Any]) -> None:
    """A table opens or is refused; then each row is an image or has a reason, and the labels fit their names."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = pa.table({"image": pa.array(table["images"], kind), "label": table["labels"]})
    if table["features"] is not None:
        columns = columns.replace_schema_metadata({"huggingface": json.dumps(table["features"])})
    path = SCRATCH / "t.parquet"
    pq.write_table(columns, path, compression="NONE")
    data = bytearray(path.read_bytes())
    for place, value in table["damage"]:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    for label in (None, "label"):
        try:
            part = open_source(str(path), label_column=label).train
        except UserError as error:
            refused(error)
            continue
        assert len(part.fingerprint) == 64
        if part.labels is not None:
            assert part.class_names is not None
            assert -1 <= part.labels.min() <= part.labels.max() < len(part.class_names)
        for row in range(len(part)):
            for call in (part.read, part.size):
                try:
                    call(row)
                except BadImage as error:
                    said(str(error), 300)


# ---- DICOM ----


@functools.cache
def dicom_files() -> list[bytes]:
    """A scan with a table of values, colours in run lengths, a gray JPEG 2000 of two frames; few bytes are pixels."""
    pytest.importorskip("pydicom", reason="pydicom is not installed: maekit[dicom]")
    import dicom_files as made

    table = made.sequence(**made.TABLE)
    frame = encoded(Image.fromarray(made.GRAY), "JPEG2000", no_jp2=True)
    return [
        made.dicom(made.WIDE[:4], bits=12, ModalityLUTSequence=table, Modality="CT"),
        made.run_lengths(made.RGB),
        made.dicom(made.GRAY, syntax=made.uid.JPEG2000, frames=[frame, frame], NumberOfFrames="2"),
    ]


def check_dicom(damage: tuple[int, list[tuple[float, int]], float]) -> None:
    """A damaged or cut file is an image or has a reason, and so is its size and the number of its frames."""
    which, changes, kept = damage
    data = bytearray(dicom_files()[which])
    for place, value in changes:
        data[132 + int(place * (len(data) - 132))] = value
    for call in (lambda d: decode(d, 3), probe_size, lambda d: frames_left_out(d, 3)):
        try:
            call(bytes(data[: 132 + int(kept * len(data))]))
        except BadImage as error:
            said(str(error), 200)


# ---- checkpoints ----

CHECKPOINT = SCRATCH / "good"
SWAPS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")
checkpoint_damages = st.tuples(st.sampled_from(SWAPS), st.sampled_from(
    ["flip", "cut", "grow", "swap", "link", "pipe", "folder", "gone", "json", "text"]), st.floats(0, 0.999), values,
    st.sampled_from(SWAPS), st.booleans())  # fmt: skip


def spoil(path: Path, how: str, place: float, value: Any, other: Path) -> None:
    """Damage one file of a folder in the named way."""
    data = path.read_bytes()
    at = int(place * len(data))
    if how in ("flip", "cut", "grow", "text"):
        new = {"flip": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "cut": data[:at], "grow": data + data[:9],
               "text": str(value).encode(errors="replace")}[how]  # fmt: skip
        path.write_bytes(new)
    elif how == "swap":
        path.write_bytes(other.read_bytes())
    elif how == "json":
        try:
            found = json.loads(data)
            name = sorted(found)[at % len(found)]
            path.write_text(json.dumps(found | {name: value}))
        except (ValueError, TypeError):
            path.write_text(json.dumps(value))
    else:
        path.unlink()
        if how == "link":
            path.symlink_to(path.name if place < 0.5 else "/dev/zero")
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()


def check_checkpoint(damage: Any) -> None:
    name, how, place, value, other, reseal = damage
    if not CHECKPOINT.exists():
        checkpoints.save(CHECKPOINT, 1, make_checkpoint(), keep=1)
    shutil.rmtree(SCRATCH / "bad", ignore_errors=True)
    shutil.copytree(CHECKPOINT, SCRATCH / "bad")
    path = SCRATCH / "bad" / "step-000001"
    spoil(path / name, how, place, value, path / other)
    if reseal and name != "manifest.json":  # the manifest agrees, as an attacker would make it
        with contextlib.suppress(OSError):
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["files"] = {file: checkpoints._entry(path / file) for file in SWAPS[:-1]}
            (path / "manifest.json").write_text(json.dumps(manifest))
    found, messages = checkpoints.latest(SCRATCH / "bad")
    assert (found is None) == bool(messages)
    try:
        checkpoints.load(path)
    except UserError as error:
        for problem in error.problems:
            said(problem.replace("\x1b", ""), 1500)  # a manifest's own words are shown


# ---- a position with good checksums and impossible numbers ----

positions = changed(dataclasses.asdict(Position(8, step=4, fingerprint="f" * 64)))


def check_position(state: dict[str, Any]) -> None:
    state = json.loads(json.dumps(state))
    try:
        found = position_of(checkpoints.Checkpoint({}, {}, {}, state), SCRATCH / "step-000004")
    except UserError as error:
        refused(error)
        return
    assert 0 <= found.watched <= found.step
    assert found.metrics_bytes >= 0
    assert 0 < found.train_trivial < float("inf")
    assert 0 < found.lr_scale < float("inf")


# ---- all of them, a few examples each; by the thousand under `slow` ----

texts_of_json = st.one_of(st.text(), values.map(json.dumps), changed(PASSPORT).map(json.dumps))
PROPERTIES: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any], int]] = {
    "config text": (check_config_text, texts_of_json, 60),
    "config bytes": (check_config_bytes, st.binary(), 50),
    "config fields": (check_pretrain_config, changed(dataclasses.asdict(PretrainConfig(data="x"))), 80),
    "passport": (check_passport, passports, 50),
    "damaged weights": (check_damaged_weights, damages, 40),
    "table": (check_table, tables, 60),
    "DICOM": (check_dicom, st.tuples(st.integers(0, 2), damages, st.one_of(st.just(1.0), st.floats(0, 1))), 60),
    "checkpoint": (check_checkpoint, checkpoint_damages, 40),
    "position": (check_position, positions, 100),
}  # fmt: skip


def fuzz(name: str, examples: int, stable: bool) -> None:
    check, strategy, _ = PROPERTIES[name]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=stable, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def prop(value: Any) -> None:
        with bounded():
            check(value)

    prop()


@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz(name: str, record_property: Callable[[str, Any], None]) -> None:
    record_property("faults", PROPERTIES[name][2])
    fuzz(name, PROPERTIES[name][2], stable=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz_for_long(name: str, record_property: Callable[[str, Any], None]) -> None:
    record_property("faults", 100 * PROPERTIES[name][2])
    fuzz(name, 100 * PROPERTIES[name][2], stable=False)
