"""Files from strangers: none runs code, leaves its folder, opens a connection, or is believed before it is checked."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from image_files import problem
from safetensors.torch import save_file
from test_fuzz import MODEL, PASSPORT, SCRATCH, _scratch, bounded, check_passport, refused, spoil, write_weights

from maekit import cli
from maekit.config import PretrainConfig, UserError
from maekit.configfile import from_json
from maekit.data import known
from maekit.data.images import BadImage
from maekit.data.sources import open_source
from maekit.weights.passport import LIMITS
from maekit.weights.store import PICKLES, WEIGHTS_FILE, load

PROMISE = "files from strangers run nothing and leave their folder alone"

__all__ = ["_scratch"]

SIZES = [
    ("depth", 999), ("embed_dim", 60_000), ("decoder_depth", 900), ("decoder_dim", 60_000), ("patch_size", 8),
    ("in_chans", 4000), ("img_size", [4096]),
]  # fmt: skip
RUN = (
    "pretrain digits --steps 6 --batch-size 32 --log-every 2 --eval-every 1 --probe-every 0 --panel-every 0 "
    "--device cpu --precision fp32 --compile off --embed-dim 16 --depth 1 --num-heads 2 --decoder-dim 16 "
    "--decoder-depth 1 --decoder-heads 2 --warmup-epochs 0"
).split()


def command(*words: str) -> tuple[int, str]:
    """Exit code and stderr of one command; where it is 2, every line of stderr is an error of ours."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    if code == 2:
        lines = err.getvalue().splitlines()
        assert lines
        assert all(line.startswith("maekit: error: ") and len(line) < 2000 for line in lines), lines
    return code, err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that is finished."""
    out = tmp_path_factory.mktemp("untrusted") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*RUN, "--out", str(out)]) == 0
    return out


# ---- nothing of ours is a pickle, and none of a stranger's is read ----


def unsafe_calls(source: str) -> list[str]:
    """Everything in a source text that can run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in
                      ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml")]  # fmt: skip
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
        last = name.rsplit(".", 1)[-1]
        wrong = name in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "torch.save",
            "torch.jit.load",
            "os.system",
            "os.popen",
        )
        wrong |= name == "torch.load" and given.get("weights_only") != "True"
        wrong |= given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False"
        wrong |= last in ("extractall", "extract", "save_state", "load_state", "unpack_archive")
        if wrong:
            found.append(f"{name} at line {node.lineno}")
    return found


def test_no_code_of_ours_can_run_what_a_file_says() -> None:
    """By the source: no pickle, no eval, no torch.load but with weights_only, no unpacking of archives to disk."""
    paths = sorted((ROOT / "maekit").rglob("*.py"))
    assert len(paths) > 30
    found = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in paths}
    # The official code reads nothing but torch.save's files: `convert --to official` writes one, of tensors alone.
    (written,) = found.pop("convert.py")
    assert written.startswith("torch.save at line")
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(p)", "torch.load(p, weights_only=flag)", "eval(x)",
     "torch.save(x, p)", "np.load(p, allow_pickle=True)", "tar.extractall(d)", "subprocess.run(c, shell=True)"],
)  # fmt: skip
def test_the_reader_of_sources_sees_them(source: str) -> None:
    assert unsafe_calls(source)
    assert not unsafe_calls("torch.load(p, weights_only=True)\nnp.load(p)\nre.compile(x)")


def test_every_file_of_a_run_is_safetensors_json_or_png(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 11
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK")) or path.suffix == ".safetensors", path
        if path.suffix == ".safetensors":
            header = data[8 : 8 + int.from_bytes(data[:8], "little")]
            assert isinstance(json.loads(header), dict)
        elif path.suffix == ".png":
            assert data.startswith(b"\x89PNG\r\n\x1a\n")
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in data.splitlines())
        elif path.suffix == ".json":
            assert isinstance(json.loads(data), dict)
        else:
            assert path.name.endswith("lock"), path  # whose words are read by nobody as anything but text
            assert data.isascii()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.ckpt", "x.safetensors", "x", "model.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "raw"])
def test_a_pickle_is_refused_and_not_run(name: str, kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    if kind == "zip":
        torch.save(Evil(marker), path)
    else:
        path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError, match=r"safetensors") as caught:
        load(path)
    refused(caught.value)
    if path.suffix in PICKLES:
        assert "looks like a pickle" in str(caught.value)
    source = str(tmp_path) if name == "model.safetensors" else str(path)
    for words in (["probe", source, "--data", "digits"], ["reconstruct", source, "--image", str(path)]):
        assert command(*words)[0] == 2
    assert not marker.exists()
    with contextlib.suppress(Exception):  # the trap is one: whoever unpickles it runs it
        pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


def test_a_header_whose_length_looks_like_a_pickle_is_read() -> None:
    """640 bytes are 0x0280, the first two bytes of a pickle of protocol 2."""
    data = write_weights(PASSPORT).read_bytes()
    length = int.from_bytes(data[:8], "little")
    wanted = next(size for size in range(length, 1 << 17) if size % 65_536 == 0x0280)
    path = SCRATCH / "w.safetensors"
    path.write_bytes(struct.pack("<Q", wanted) + data[8 : 8 + length].ljust(wanted) + data[8 + length :])
    assert path.read_bytes().startswith(b"\x80\x02")
    assert load(path).passport == MODEL.passport


def test_a_config_from_elsewhere_is_only_values(tmp_path: Path) -> None:
    """Code in any field stays text or is refused; no object is made by name."""
    marker = tmp_path / "executed"
    codes = [f"__import__('os').mkdir('{marker}')", f"$(mkdir {marker})", f"`mkdir {marker}`", "!!python/object:os"]
    for code in [*codes, {"py/object": "os.mkdir", "args": [str(marker)]}, {"__class__": "Path"}]:
        for field in vars(PretrainConfig(data="x")):
            try:
                found = from_json(PretrainConfig, json.dumps({field: code}), "c.json")
            except UserError as error:
                refused(error)
            else:
                assert getattr(found, field) == code
                assert type(getattr(found, field)) is str
    assert not marker.exists()


# ---- archives ----


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("../out.bin", tarfile.REGTYPE, "unsafe"), ("/out.bin", tarfile.REGTYPE, "unsafe"),
     ("c/../../out.bin", tarfile.REGTYPE, "unsafe"), ("c/1.bin", tarfile.SYMTYPE, "not a file"),
     ("c/1.bin", tarfile.LNKTYPE, "not a file"), ("c/1.bin", tarfile.FIFOTYPE, "not a file"),
     ("c/1.bin", tarfile.CHRTYPE, "not a file"), ("c/1.bin", tarfile.DIRTYPE, "not a file")],
)  # fmt: skip
def test_members_of_archives_stay_inside(
    name: str, kind: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the checksum is right: no path out, no link, no device; and nothing at all is written to disk."""
    path = tmp_path / "cache" / "set.tar.gz"
    path.parent.mkdir()
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, str(tmp_path / "secret")
        tar.addfile(info, io.BytesIO(b""))
    archive = known.Archive(
        url="http://localhost/set.tar.gz", md5=hashlib.md5(path.read_bytes()).hexdigest(), train_files=("c/1.bin",),
        test_files=("c/2.bin",), names_file="c/n.txt", rows=(1, 1),
    )  # fmt: skip
    monkeypatch.setitem(known.ARCHIVES, "cifar100", archive)
    monkeypatch.setenv("MAEKIT_CACHE", str(path.parent))
    assert words in problem("cifar100")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["cache", "secret", "set.tar.gz"]


# ---- cases that deserve a name ----


@pytest.mark.parametrize("field", sorted(LIMITS))
@pytest.mark.parametrize("value", [10**9, 2**62, -(10**9), 10**400])
def test_huge_sizes_are_refused_before_anything_is_built(
    field: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size of a passport by itself; the model's class must not even be called."""
    monkeypatch.setattr("maekit.weights.store.MaskedAutoencoder", lambda *_: pytest.fail("a model was built"))
    given_value = [value] if field == "img_size" else value
    path = write_weights(PASSPORT | {"model": PASSPORT["model"] | {field: given_value}})
    began = time.monotonic()
    with pytest.raises(UserError, match="passport") as caught:
        load(path)
    assert time.monotonic() - began < 2
    refused(caught.value)
    assert field.replace("_", "-") in str(caught.value) or field in str(caught.value)


@pytest.mark.parametrize(("field", "value"), SIZES)  # fmt: skip
def test_sizes_that_the_tensors_do_not_have_are_refused_too(
    field: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allowed by themselves, but no such weights lie beside them."""
    monkeypatch.setattr("maekit.weights.store.MaskedAutoencoder", lambda *_: pytest.fail("a model was built"))
    path = write_weights(PASSPORT | {"model": PASSPORT["model"] | {field: value}})
    with pytest.raises(UserError, match="passport"):
        load(path)


@pytest.mark.parametrize("field", sorted(PASSPORT["model"]))
@pytest.mark.parametrize("null", [True, False])
def test_a_setting_that_is_missing_is_a_default_or_an_error(field: str, null: bool) -> None:
    """Long fuzzing found that a passport without a patch size ended in an assertion."""
    model = {name: value for name, value in PASSPORT["model"].items() if name != field}
    check_passport(PASSPORT | {"model": model | ({field: None} if null else {})})


def test_headers_without_a_passport_and_tensors_of_other_types() -> None:
    with pytest.raises(UserError, match="no maekit passport"):
        load(write_weights("", header={}))
    with pytest.raises(UserError, match="not JSON"):
        load(write_weights("{"))
    path = write_weights(PASSPORT)
    for kind in (torch.int64, torch.float64):
        save_file({name: value.to(kind) for name, value in MODEL.state_dict().items()}, path,
                  metadata={"maekit": json.dumps(PASSPORT)})  # fmt: skip
        with pytest.raises(UserError, match=f"type {str(kind)[6:]}, expected float32"):
            load(path)
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match="header of 4,611,686"):
        load(path)
    path.unlink()
    os.mkfifo(path)
    with bounded(), pytest.raises(UserError, match="not a plain file"):
        load(path)
    path.unlink()


def test_strings_of_a_table_that_are_not_utf8() -> None:
    """Labels and paths with bytes that no decoder takes: refused, or a bad row."""
    wild = pa.Array.from_buffers(pa.string(), 4, pa.array([b"\xff\xfe", b"a", b"\xc3(", b"b"], pa.binary()).buffers())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images_of = pa.StructArray.from_arrays([pa.nulls(4, pa.binary()), wild], fields=list(kind))
    pq.write_table(pa.table({"image": images_of, "label": wild}), SCRATCH / "wild.parquet")
    part = open_source(str(SCRATCH / "wild.parquet")).train
    assert len(part.fingerprint) == 64
    for row in range(4):
        with pytest.raises(BadImage, match="no such file"):
            part.read(row)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(str(SCRATCH / "wild.parquet"), label_column="label")


# ---- the folder of a run ----


HOSTILE: dict[str, tuple[str, str, float]] = {
    "weights flipped in the header": (WEIGHTS_FILE, "flip", 0.0004),
    "weights cut": (WEIGHTS_FILE, "cut", 0.7),
    "weights are text": (WEIGHTS_FILE, "text", 0.0),
    "weights are a pipe": (WEIGHTS_FILE, "pipe", 0.0),
    "weights are a folder": (WEIGHTS_FILE, "folder", 0.0),
    "weights are a link to themselves": (WEIGHTS_FILE, "link", 0.0),
    "weights are endless": (WEIGHTS_FILE, "link", 0.9),
    "weights are the config": (WEIGHTS_FILE, "swap", 0.0),
    "weights are gone": (WEIGHTS_FILE, "gone", 0.0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_commands_refuse_a_damaged_run(name: str, run: Path, tmp_path: Path) -> None:
    """`probe` and `reconstruct` of what is no whole run: code 2, and no line that is not an error of ours."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    file, how, place = HOSTILE[name]
    spoil(copy / file, how, place, "words", copy / "config.json")
    np.save(tmp_path / "image.npy", np.zeros((8, 8), np.uint8))
    for words in (
        ["probe", str(copy), "--data", "digits"],
        ["reconstruct", str(copy), "--image", str(tmp_path / "image.npy"), "--out", str(tmp_path / "p.png")],
    ):
        with bounded():
            code, error = command(*words)
        assert code == 2, (words[0], error)
