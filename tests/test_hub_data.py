"""--data hub:OWNER/NAME against the stand-in of fake_hub.py: what is downloaded, read, said, and kept exact."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_files import make_zip, shard
from fake_hub import Hub, stand_in
from PIL import Image

from maekit import cli
from maekit.config import UserError
from maekit.data import hub, hub_files
from maekit.data.pairs import open_pairs
from maekit.data.sources import lasting, open_source, short_name

__all__ = ["stand_in"]

huggingface_hub: Any = pytest.importorskip("huggingface_hub")

CARD = b"---\nlicense: cc-by-4.0\n---\n# Cats and dogs\n"


@pytest.fixture(autouse=True)
def _another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process has learned of a name does not reach the next test."""
    monkeypatch.setattr(hub, "_FOUND", {})


def forget() -> None:
    """As a new process begins."""
    hub._FOUND.clear()


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(count: int, first: int = 0, mask: bool = False) -> bytes:
    """Parquet in the hub's image schema: cats and dogs in turn, or with an image of two values for each image."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    columns: dict[str, Any] = {"image": [{"bytes": picture(first + i), "path": f"{i}.png"} for i in range(count)]}
    if mask:
        flat = io.BytesIO()
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2 + 1).save(flat, "PNG")
        columns["mask"] = [{"bytes": flat.getvalue(), "path": None}] * count
    else:
        columns["label"] = [i % 2 for i in range(count)]
    made = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(made, file)
    return file.getvalue()


def simple() -> dict[str, bytes]:
    return {
        "README.md": CARD, ".gitattributes": b"", "notes.pdf": b"1",
        "plain_text/train-00000-of-00002.parquet": table(10), "plain_text/train-00001-of-00002.parquet": table(8, 20),
        "plain_text/test-00000-of-00001.parquet": table(4, 40),
    }  # fmt: skip


def test_parquet_of_the_hub(stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = stand_in.push("them/pets", simple())
    source = open_source("hub:them/pets")
    assert (source.name, len(source.train), source.val) == ("pets", 18, None)
    assert source.test is not None
    assert (len(source.test), source.train.class_names) == (4, ["cat", "dog"])
    assert np.array_equal(source.train.read(10), np.asarray(Image.open(io.BytesIO(picture(20)))))
    said = capsys.readouterr().err
    size = sum(len(data) for path, data in simple().items() if path.endswith(".parquet"))
    assert (
        f"at commit {commit[:12]}, licence by its card: cc-by-4.0; downloading 3 of 3 files, {size / 1e3:.1f} kB"
        in said
    )
    assert stand_in.downloads() == [path for path in sorted(simple()) if path.endswith(".parquet")]


def test_what_the_cache_holds_needs_no_network(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = stand_in.push("them/pets", simple())
    fingerprint = open_source("hub:them/pets").train.fingerprint
    forget()
    stand_in.asked.clear()
    assert open_source(f"hub:them/pets@{commit}").train.fingerprint == fingerprint
    assert not stand_in.asked, "the commit is known, and all its files are there"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert open_source("hub:them/pets").train.fingerprint == fingerprint
    assert lasting("hub:them/pets") == f"hub:them/pets@{commit}"
    with pytest.raises(UserError, match="hub:them/others: the hub cannot be reached, and the cache does not hold it"):
        open_source("hub:them/others")


def test_without_our_list_the_cache_is_looked_through(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded by another tool; and by a client that keeps no list of files, as the older ones."""
    commit = stand_in.push("them/pets", simple())
    folder = Path(huggingface_hub.snapshot_download("them/pets", repo_type="dataset", endpoint=stand_in.address))
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", None, raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.read_tree_cache", lambda *_: None, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(open_source("hub:them/pets").train) == 18
    forget()
    (folder / "plain_text/train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="the cache does not hold it"):
        open_source(f"hub:them/pets@{commit}")


def test_one_commit_is_read_wherever_the_hub_has_moved_to(stand_in: Hub) -> None:
    first = stand_in.push("them/pets", simple())
    old = open_source("hub:them/pets").train.fingerprint
    second = stand_in.push("them/pets", {**simple(), "plain_text/train-00001-of-00002.parquet": table(2, 90)})
    assert lasting("hub:them/pets") == f"hub:them/pets@{first}", "one name means one commit within a process"
    forget()
    assert lasting("hub:them/pets") == f"hub:them/pets@{second}"
    assert len(open_source("hub:them/pets").train) == 12
    assert open_source(f"hub:them/pets@{first}").train.fingerprint == old
    stand_in.refs["them/pets"]["refs/pr/3"] = first
    assert lasting("hub:them/pets@refs/pr/3/plain_text") == f"hub:them/pets@{first}/plain_text"
    stand_in.refs["them/pets"]["more/cats"] = first
    assert lasting("hub:them/pets@more%2Fcats") == f"hub:them/pets@{first}"


def test_folders_of_images_are_the_same_as_on_a_disk(stand_in: Hub, tmp_path: Path) -> None:
    files = {
        f"{part}/{kind}/{i}.png": picture(i) for part in ("train", "test") for kind in ("a", "b") for i in range(3)
    }
    for path, data in files.items():
        (tmp_path / "disk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / path).write_bytes(data)
    stand_in.push(
        "me/shots", {**files, "README.md": CARD, "weights.bin": b"0" * 99, "metadata.csv": b"file_name,label\n"}
    )
    source, disk = open_source("hub:me/shots"), open_source(str(tmp_path / "disk"))
    assert source.train.fingerprint == disk.train.fingerprint
    assert source.train.class_names == ["a", "b"]
    assert source.test is not None
    assert [source.test.name(i) for i in range(6)] == [f"test/{kind}/{i}.png" for kind in "ab" for i in range(3)]
    assert "weights.bin" not in stand_in.downloads()
    assert source.notes == ("not read: metadata.csv (--data hub:me/shots/metadata.csv takes labels from it)",)
    assert len(open_source("hub:me/shots/test").train) == 6
    with pytest.raises(UserError, match="--label-column: only for Parquet and tables"):
        open_source("hub:me/shots", label_column="x")


def test_a_table_among_images(stand_in: Hub) -> None:
    rows = "file_name,label,split\n" + "".join(
        f"p/{i}.png,{'xy'[i % 2]},{'train' if i else 'test'}\n" for i in range(5)
    )
    stand_in.push(
        "me/listed", {"data/metadata.csv": rows.encode(), **{f"data/p/{i}.png": picture(i) for i in range(5)}}
    )
    source = open_source("hub:me/listed/data/metadata.csv")
    assert (source.name, len(source.train), source.train.class_names) == ("listed-data-metadata", 4, ["x", "y"])


def test_shards_of_webdataset(stand_in: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(i: int) -> tuple[str, dict[str, bytes]]:
        return f"{i:03d}", {"png": picture(i), "cls": b"%d" % (i % 2)}

    of = {"x-train-0.tar": range(4), "x-train-1.tar": range(4, 10), "x-test-0.tar": range(20, 23)}
    made = {name: shard(tmp_path / name, *map(sample, ids)).read_bytes() for name, ids in of.items()}
    stand_in.push("my/shards", {"README.md": CARD, "sample.png": picture(0), **made})
    source = open_source("hub:my/shards")
    assert source.test is not None
    assert source.train.labels is not None
    assert (len(source.train), len(source.test), source.train.labels[:4].tolist()) == (10, 3, [0, 1, 0, 1])
    assert (source.train.read(7) == np.array(Image.open(io.BytesIO(picture(7))))).all()
    assert sorted(stand_in.downloads()) == ["x-test-0.tar", "x-train-0.tar", "x-train-1.tar"]
    assert len(open_source("hub:my/shards/x-train-1.tar").train) == 6
    with pytest.raises(UserError, match="pairs of images and annotations are read from files on disk only"):
        open_pairs("hub:my/shards")


def test_a_folder_in_an_archive_of_the_hub(stand_in: Hub, tmp_path: Path) -> None:
    names = [f"all/{part}/{kind}/{i}.png" for part in ("train", "rest") for kind in "ab" for i in range(2)]
    whole = make_zip(tmp_path / "x.zip", [(name, picture(i)) for i, name in enumerate(names)]).read_bytes()
    stand_in.push("my/zip", {"x.zip": whole, "cut.zip": whole[:-40]})
    for way, words in {"x.zip": "give --data hub:my/zip/x.zip/all/train;", "cut.zip": "zip/cut.zip: cut short"}.items():
        with pytest.raises(UserError, match=words):
            open_source(f"hub:my/zip/{way}")
    source = open_source(lasting("hub:my/zip/x.zip/all/train"))
    assert (source.name, len(source.train), source.train.class_names) == ("zip-x.zip-all-train", 4, ["a", "b"])


def test_the_hubs_own_copy_of_other_forms(stand_in: Hub) -> None:
    stand_in.push("old/script", {"README.md": CARD, "script.py": b"evil()", "images.zip": b"zip"})
    with pytest.raises(UserError, match=r"1 \.zip; --data hub:old/script/images.zip reads one archive alone\), and"):
        open_source("hub:old/script")
    copy = {"default/train/0000.parquet": table(6), "default/test/0000.parquet": table(2, 9)}
    commit = stand_in.push("old/script", copy, "refs/convert/parquet")
    source = open_source("hub:old/script")
    assert len(source.train) == 6
    assert "the hub's own copy in Parquet is read" in source.notes[0]
    assert stand_in.downloads() == ["default/test/0000.parquet", "default/train/0000.parquet"], "no script, no archive"
    assert lasting("hub:old/script") == f"hub:old/script@{commit}"
    forget()
    assert open_source(f"hub:old/script@{commit}").train.fingerprint == source.train.fingerprint
    forget()
    stand_in.push("old/script", {"default/partial-train/0000.parquet": table(6)}, "refs/convert/parquet")
    with pytest.raises(UserError, match=r"only the beginning of it.*--data hub:old/script@refs/convert/parquet takes"):
        open_source("hub:old/script")
    assert "not all of the data" in open_source("hub:old/script@refs/convert/parquet").notes[0]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hub:them/nothing", "hub:them/nothing: no such data set, or a private one: hf auth login"),
        ("hub:them/pets@v9", "hub:them/pets@v9: no such revision"),
        ("hub:them/pets/plain", "no such configuration, split, folder or file; did you mean plain_text"),
        ("hub:them/secret", "no such data set, or a private one: hf auth login, or HF_TOKEN"),
        ("hub:them/gated", "open only to those who have accepted its conditions"),
        ("hub:", "write hub:OWNER/NAME, hub:OWNER/NAME@REVISION"),
        ("hub:them/pets/../../etc", "write hub:OWNER/NAME"),
        ("hub:a b/c", "no name of a repository"),
        ("hub:them/empty", "holds neither Parquet, WebDataset's shards nor folders of images (1 .md)"),
        ("them/pets", "no such file or folder, and not a known name"),
        ("them/pets", "a data set on the Hugging Face hub: --data hub:them/pets"),
        ("https://huggingface.co/datasets/them/pets/tree/main", "--data hub:them/pets"),
        ("hf://datasets/them/pets@main/x", "--data hub:them/pets"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_sentence(
    stand_in: Hub, name: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for repo in ("them/pets", "them/secret", "them/gated"):
        stand_in.push(repo, simple())
    stand_in.push("them/empty", {"README.md": CARD})
    stand_in.gated.add("them/gated")
    stand_in.private.add("them/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert cli.main(["check-data", "--data", name]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert len([line for line in said.splitlines() if line.startswith("maekit: error")]) == 1
    assert "Traceback" not in said


def test_without_the_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["check-data", "--data", "hub:them/pets"]) == 2
    assert "the hub needs huggingface_hub: pip install 'maekit[hub]'" in capsys.readouterr().err


def test_a_full_disk(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the download, or in it where something else fills the disk; what came whole is kept."""
    stand_in.push("them/pets", simple())
    with monkeypatch.context() as patch:
        patch.setattr(hub_files, "_ROOM", 1 << 60)
        with pytest.raises(UserError, match="are to be downloaded, and the disk of the hub's cache has"):
            open_source("hub:them/pets")
        assert not stand_in.downloads()
    real = huggingface_hub.hf_hub_download

    def full(repo: str, path: str, **given: Any) -> str:
        if "train-00001" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return str(real(repo, path, **given))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", full)
        patch.setattr(hub_files, "WORKERS", 1)
        with pytest.raises(UserError, match=r"the disk of the hub's cache is full .*; HF_HOME names another place"):
            open_source("hub:them/pets")
    assert len(open_source("hub:them/pets").train) == 18
    assert len(stand_in.downloads()) == len(set(stand_in.downloads())) == 3, "no file came twice"


def check(answer: Any) -> None:
    """What a user's process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs in the background ignore it
    answer.put(os.getpid())
    os._exit(cli.main(["check-data", "--data", "hub:them/pets"]))


def test_an_interrupted_download_ends_at_once_and_goes_on_with_what_is_missing(
    stand_in: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "WORKERS", 1)
    stand_in.push("them/pets", simple())
    stand_in.held = {"plain_text/train-00001-of-00002.parquet"}  # the last of three
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=check, args=(answer,))
    process.start()
    assert stand_in.half_sent.wait(60)
    os.kill(answer.get(), signal.SIGINT)
    process.join(25)
    assert process.exitcode == 130, "it did not wait for the rest of the file, which nobody sends"
    stand_in.held, stand_in.asked = set(), []
    assert len(open_source("hub:them/pets").train) == 18
    assert stand_in.downloads() == ["plain_text/train-00001-of-00002.parquet"]


def read_as(rank: str, answer: Any) -> None:
    """What a process of a run does, in a process of its own."""
    os.environ["LOCAL_RANK"] = rank
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        answer.put((open_source("hub:them/pets").train.fingerprint, said.getvalue()))


def test_two_processes_download_each_file_once(stand_in: Hub) -> None:
    """The client's lock: who comes second finds the file. The second process of a machine says nothing."""
    stand_in.push("them/pets", simple())
    stand_in.held = {path for path in simple() if path.endswith(".parquet")}
    context = multiprocessing.get_context("fork")
    answers = [context.SimpleQueue(), context.SimpleQueue()]
    both = [context.Process(target=read_as, args=(str(rank), answers[rank])) for rank in (0, 1)]
    for process in both:
        process.start()
    assert stand_in.half_sent.wait(60)
    while sum(line.startswith("HEAD plain") for line in stand_in.asked) < 4:  # both are at it
        assert all(process.is_alive() for process in both)
    threading.Timer(0.5, stand_in.go_on.set).start()
    told = [answer.get() for answer in answers]
    for process in both:
        process.join(20)
    assert told[0][0] == told[1][0]
    assert len(stand_in.downloads()) == 3
    assert "downloading" in told[0][1]
    assert told[1][1] == ""


def test_annotations_of_the_hub(stand_in: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.push(
        "me/masks", {"data/train-0.parquet": table(4, mask=True), "data/validation-0.parquet": table(2, 9, True)}
    )
    assert cli.main(["check-data", "--data", "hub:me/masks"]) == 0
    said = capsys.readouterr().out
    assert "annotations of train, 4, shares of the pixels: class 1 (value 1) 50.0%, class 2 (value 2) 50.0%" in said


RUN = (
    "--batch-size 8 --log-every 2 --eval-every 1 --probe-every 0 --panel-every 0 --device cpu --precision fp32 "
    "--compile off --img-size 8 --patch-size 4 --embed-dim 16 --depth 1 --num-heads 2 --decoder-dim 16 "
    "--decoder-depth 1 --decoder-heads 2 --warmup-epochs 0 --workers 0"
).split()


def test_a_run_goes_on_with_its_commit(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the hub has moved on, and without a network; the newer commit is refused as other images."""
    commit = stand_in.push("them/pets", simple())
    run = str(tmp_path / "run")
    words = ["pretrain", "folder", "--data", "hub:them/pets/plain_text", "--out", run, *RUN]
    assert cli.main([*words, "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == f"hub:them/pets@{commit}/plain_text"
    stand_in.push("them/pets", {"plain_text/train.parquet": table(18, 70)})
    forget()
    assert cli.main(["resume", run, "--epochs", "3", "--data", "hub:them/pets/plain_text"]) == 2
    assert "not the images that this run was trained on" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    forget()
    assert cli.main(["resume", run, "--epochs", "2"]) == 0
    out = str(tmp_path / "features.npz")
    part = f"hub:them/pets@{commit}/plain_text/test-00000-of-00001.parquet"
    assert cli.main(["embed", run, "--data", part, "--out", out, "--device", "cpu"]) == 0
    assert len(np.load(out)["features"]) == 4


def test_segmentation_of_the_hub(stand_in: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parquet with two columns of images, and folders of images beside folders of masks with names of classes."""
    commit = stand_in.push("me/masks", {"data/train-0.parquet": table(8, mask=True), "classes.txt": b"sky\nsea\n"})
    run = tmp_path / "segmented"
    words = ["--steps", "2", "--batch-size", "2", "--head", "linear", "--device", "cpu", "--workers", "0"]
    given = ["segment", "random:vit_tiny_patch16_224", "--data", "hub:me/masks", "--out", str(run), "--img-size", "32"]
    assert cli.main([*given, *words]) == 0, capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["data"] == f"hub:me/masks@{commit}"
    assert json.loads((run / "card.json").read_text())["data"] == "masks"
    files = {f"{side}/{i}.png": picture(i) for side in ("images",) for i in range(4)}
    flat = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2 + 1).save(flat, "PNG")
    files |= {f"masks/{i}.png": flat.getvalue() for i in range(4)}
    stand_in.push("me/folders", {**files, "classes.txt": b"sky\nsea\n"})
    pairs = open_pairs("hub:me/folders")
    assert (pairs.name, len(pairs.train), pairs.class_names) == ("folders", 4, ["sky", "sea"])
    assert len(open_source("hub:me/folders").train) == 4, "masks are no images to train on"


def test_names_for_folders() -> None:
    assert short_name("hub:them/pets") == short_name("hub:them/pets@refs/pr/1") == "pets"
    assert short_name(f"hub:them/pets@{'a' * 40}/big/test-0.parquet") == "pets-big-test-0"
    assert hub._parse("hub:mnist@main").repo == "mnist"
