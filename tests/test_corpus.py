"""A folder with everything that can be wrong: the run goes on, names each bad file, and nobody else is disturbed."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NEEDS_FORK
from image_files import encoded, make_corpus, photograph, reason, tiff
from PIL import Image

from maekit import cli
from maekit.config import PretrainConfig, UserError
from maekit.data import folders, images, sources
from maekit.data.loader import MemoryPool, StreamPool, split_heldout
from maekit.data.parts import FilePart
from maekit.data.quarantine import Quarantine
from maekit.data.sources import open_source
from maekit.data.transforms import apply_to_batch, apply_to_image, centre_crops, random_crops
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import Choice

PROMISE = "bad images: each is named, the others keep their order and masks"

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")

TINY = (
    "--img-size 16 24 --patch-size 8 --embed-dim 16 --depth 1 --num-heads 2 --decoder-dim 16 --decoder-depth 1 "
    "--decoder-heads 2 --batch-size 10 --epochs 1 --log-every 100 --probe-every 0 --device cpu --precision fp32 "
    "--mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 --in-memory no"
).split()
PEAK = 400 << 20
"""Bytes that a run on the corpus may take more than the process that it was forked from (or a worker, than it)."""


def in_child(work: Callable[[], Any], report: Path) -> Any:
    """What `work` returns in a forked process, whose peak memory is its own; a failure there is one here."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            report.write_bytes(pickle.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "see the traceback above"
    return pickle.loads(report.read_bytes())  # our own, just written


def make_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file vanishes after the folder was listed; one may not be read (for root nothing is forbidden: simulated)."""
    listed, opened = folders.open_folder, images._open_regular

    def list_and_delete(root: bytes, *rest: Any) -> Any:
        found = listed(root, *rest)
        os.unlink(os.path.join(root, b"deleted.png"))
        return found

    def refuse(path: Any) -> Any:
        if str(path).endswith("denied.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path)

    monkeypatch.setattr(sources, "open_folder", list_and_delete)
    monkeypatch.setattr(images, "_open_regular", refuse)


def pretrain(data: Path, out: Path, workers: int, *flags: str, damaged: bool = True) -> dict[str, Any]:
    """A whole run, in this process: exit code, what each batch held, every mask, and the peak of memory in bytes."""
    batches: list[tuple[list[int], Any]] = []
    masks: list[tuple[list[int], list[list[int]]]] = []
    stream, draw = StreamPool.train_batches, MaskedAutoencoder.draw_masks

    def watched(self: StreamPool, shares: Any) -> Any:
        for batch in stream(self, shares):
            batches.append((batch.sample_ids.tolist(), batch.images.numpy().copy()))
            yield batch

    def drawn(self: MaskedAutoencoder, ids: Any, **key: Any) -> Any:
        found = draw(self, ids, **key)
        masks.append((np.asarray(ids).tolist(), found.ids_keep_BV.tolist()))
        return found

    start = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with pytest.MonkeyPatch.context() as patch:
        if damaged:
            make_bad(patch)
        patch.setattr(StreamPool, "train_batches", watched)
        patch.setattr(MaskedAutoencoder, "draw_masks", drawn)
        words = ["pretrain", "folder", "--data", str(data), "--out", str(out), *TINY, "--workers", str(workers), *flags]
        code = cli.main(words)
    peaks = [1024 * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"code": code, "batches": batches, "masks": masks, "grown": max(peaks) - start}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs on the corpus with 0 and 2 workers, and on the same folder with nothing wrong."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("corpus")
    found: dict[str, Any] = {"base": base}
    for name, workers, whole in (("damaged-0", 0, False), ("damaged-2", 2, False), ("whole", 0, True)):
        folder = base / name / "images"
        found["bad"] = make_corpus(folder, whole=whole)
        out = base / name / "run"
        work = partial(pretrain, folder, out, workers, "--max-bad-share", "0.6", damaged=not whole)
        found[name] = in_child(work, base / f"{name}.pickle")
    return found


def quarantined(run: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["name"]: record["reason"] for record in records}


@pytest.mark.parametrize("name", ["damaged-0", pytest.param("damaged-2", marks=NEEDS_FORK)])
def test_the_run_goes_on_and_names_each_bad_file(
    runs: dict[str, Any], name: str, record_property: Callable[[str, Any], None]
) -> None:
    record_property("faults", len(runs["bad"]))
    assert runs[name]["code"] == 0
    named = quarantined(runs["base"] / name / "run")
    assert named.keys() == runs["bad"].keys()
    wrong = {file: (reason, runs["bad"][file]) for file, reason in named.items() if runs["bad"][file] not in reason
             and not (file.startswith("cut1.") and "broken" in reason)}  # fmt: skip
    assert not wrong
    assert (runs["base"] / name / "run" / "model.safetensors").exists()
    assert not (runs["base"] / "whole" / "run" / "quarantine.jsonl").exists()


@pytest.mark.parametrize("name", ["damaged-0", "damaged-2"])
def test_the_other_samples_keep_order_masks_and_pixels(runs: dict[str, Any], name: str) -> None:
    """Against the folder with nothing wrong: ids and masks of every step are equal, and so are readable pixels."""
    damaged, whole = runs[name], runs["whole"]
    assert whole["code"] == 0
    assert damaged["masks"] == whole["masks"]
    assert [ids for ids, _ in damaged["batches"]] == [ids for ids, _ in whole["batches"]]
    part = open_source(str(runs["base"] / "whole" / "images")).train
    bad = {index for index in range(len(part)) if part.name(index) in runs["bad"]}
    assert len(bad) == len(runs["bad"]) > 20
    compared = replaced = 0
    for (ids, one), (_, other) in zip(damaged["batches"], whole["batches"], strict=True):
        one, other = (x / 255 if x.dtype == np.uint8 else x for x in (one, other))  # a 16-bit image makes floats
        for row, index in enumerate(ids):
            same = np.array_equal(one[row].astype(np.float32), other[row].astype(np.float32))
            assert same or index in bad, part.name(index)
            compared, replaced = compared + (index not in bad), replaced + (index in bad and not same)
    assert compared > 40
    assert replaced > 20


@pytest.mark.parametrize("name", ["damaged-0", "damaged-2", "whole"])
def test_memory_stays_bounded(runs: dict[str, Any], name: str) -> None:
    """A bomb of 10 gigapixels and images of 1 x 20,000, which resized whole would take gigabytes."""
    assert runs[name]["grown"] < PEAK, f"{runs[name]['grown'] / 2**20:.0f} MiB"


def test_above_the_stated_share_the_run_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "images")
    found = pretrain(tmp_path / "images", tmp_path / "run", 0, "--max-bad-share", "0.05")
    assert found["code"] == 2
    error = capsys.readouterr().err
    assert "--max-bad-share 0.05" in error
    assert error.count("\n") == 1


# ---- the pieces ----


def folder_of_equals(root: Path, count: int, bad: set[int]) -> FilePart:
    root.mkdir()
    for index in range(count):
        (root / f"{index:03d}.png").write_bytes(b"" if index in bad else encoded(photograph(index, 16, 24)))
    part = open_source(str(root)).train
    assert isinstance(part, FilePart)
    return part


def test_a_stand_in_never_crosses_between_training_and_held_out(tmp_path: Path) -> None:
    """In memory and streamed: the slot's own side, the next readable id."""
    train, held = (set(ids.tolist()) for ids in split_heldout(60, 0.02))
    # a training image that is followed by a held-out one, and a held-out one that is followed by a training image
    lost = {next(i for i in train if i + 1 in held), next(i for i in held if i + 1 in train)}
    part = folder_of_equals(tmp_path / "set", 60, lost)
    config = PretrainConfig(data="x", img_size=(16, 24), crop="none", flip=False)
    memory = MemoryPool(part, config, torch.device("cpu"), (16, 24))
    stream = StreamPool(part, config, torch.device("cpu"), 0)
    assert [index for index, _ in memory.bad] == sorted(lost)
    for index in lost:
        side = train if index in train else held
        expected = next(k % 60 for k in range(index + 1, 200) if k % 60 in side - lost)
        truth = torch.from_numpy(part.read(expected)).permute(2, 0, 1)
        ids = np.array([index])
        assert torch.equal(next(stream.eval_batches(ids, 1)).images[0], truth)
        torch.testing.assert_close(next(memory.eval_batches(ids, 1)).images[0], truth / 255)


def test_what_evaluation_meets_is_told_in_training(tmp_path: Path) -> None:
    """The held-out pass reports nothing itself; a bad held-out file is named all the same."""
    held = int(split_heldout(40, 0.02)[1][0])
    part = folder_of_equals(tmp_path / "set", 40, {held})
    stream = StreamPool(part, PretrainConfig(data="x", img_size=(16, 24)), torch.device("cpu"), 0)
    list(stream.eval_batches(split_heldout(40, 0.02)[1], 8))
    ids = split_heldout(40, 0.02)[0]
    batches = list(stream.train_batches([(0, ids[:4]), (0, ids[4:8])]))
    assert [batch.bad for batch in batches] == [[(held, "empty file")], []]


def test_many_bad_files_in_a_row_are_judged_by_their_share(tmp_path: Path) -> None:
    """A broken folder of 120 among 200 is below a share of 0.7, and above one of 0.1."""
    part = folder_of_equals(tmp_path / "set", 200, set(range(20, 140)))
    slot = next(i for i in split_heldout(200, 0.02)[0].tolist() if i >= 20)
    config = PretrainConfig(data="x", img_size=(16, 24), max_bad_share=0.7)
    batch = next(StreamPool(part, config, torch.device("cpu"), 0).train_batches([(0, np.array([slot]))]))
    assert len(batch.bad) > 100
    config.max_bad_share = 0.1
    with pytest.raises(UserError, match=r"100 images in a row cannot be read.*--max-bad-share 0.1.* --data x names"):
        next(StreamPool(part, config, torch.device("cpu"), 0).train_batches([(0, np.array([slot]))]))
    config.in_chans = 6  # which check-data would find nothing wrong with at its own default
    with pytest.raises(UserError, match="maekit check-data --data x --in-chans 6 names them"):
        next(StreamPool(part, config, torch.device("cpu"), 0).train_batches([(0, np.array([slot]))]))


def test_huge_images_among_small_ones_are_not_decoded_by_the_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sampled sizes agree and the others do not, reading ends at the first that differs."""
    part = folder_of_equals(tmp_path / "set", 300, set())
    reads: list[int] = []

    def read(index: int) -> Any:
        reads.append(index)
        return np.zeros((16, 24) if index % 2 == 0 else (160, 240), np.uint8)[..., None].repeat(3, 2)

    monkeypatch.setattr(part, "read", read)
    monkeypatch.setattr("maekit.data.loader.common_size", lambda part: ((16, 24), "all are"))
    from maekit.data.loader import open_pool

    config = PretrainConfig(data="x", img_size=(16, 24))
    pool, choice = open_pool(part, config, torch.device("cpu"), Choice(0, "asked"))
    assert isinstance(pool, StreamPool)
    assert "160 x 240" in choice.reason
    assert len(reads) < 100


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(20, 3000, 3), (4000, 30, 3), (1, 700, 1)])
def test_long_thin_images_are_cut_before_they_are_scaled(shape: tuple[int, ...], dtype: Any) -> None:
    """The same pixels as when the whole image is resized, for centre crops and for crops at a random place."""
    image: Any = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    image = image if dtype == np.uint8 else image.astype(np.float32) / 255
    sizes = np.array([shape[:2]], np.int64)
    config = PretrainConfig(data="x", img_size=(16, 24), crop="resize-crop", resize_to=28)
    whole = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    for crops in (centre_crops(sizes, (16, 24)), random_crops(config, sizes, [5], epoch=1)):
        found = apply_to_image(image, crops, 0, (16, 24))
        assert found.shape == (shape[2], 16, 24)
        assert found.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        expected = apply_to_batch(whole, crops, (16, 24))[0]
        unit = found / 255 if dtype == np.uint8 else found
        torch.testing.assert_close(unit, expected, rtol=0, atol=0.6 / 255 if dtype == np.uint8 else 1e-4)
        resized_hw = [int(side) for side in np.rint(crops.length[0] / crops.scale[0])]
        options: Any = {"mode": "bicubic", "align_corners": False, "antialias": True}
        scaled = torch.nn.functional.interpolate(whole.float(), size=resized_hw, **options)
        y, x = crops.offset[0]
        cut = scaled[0, :, y : y + 16, x : x + 24]
        cut = cut.flip(2) if crops.flip[0] else cut
        limit = 255 if dtype == np.uint8 else 1
        torch.testing.assert_close(
            found.float(), cut.clamp(0, limit) if limit == 255 else cut, rtol=0, atol=limit / 200
        )


def test_a_torn_or_foreign_quarantine_is_read_past(tmp_path: Path) -> None:
    """Lines of any bytes; ids that cannot be; a pipe; and what follows a torn line is not lost with it."""
    part = folder_of_equals(tmp_path / "set", 50, set())
    path = tmp_path / "quarantine.jsonl"
    lines = [b"\xff\xfe", b'{"id": 1e999}', b"[" * 5000, b'{"id": 99}', b'{"id": -1}', b'{"id": 3}', b'{"id": 4, "na']
    path.write_bytes(b"\n".join(lines))
    quarantine = Quarantine(path, part, 0.1)
    assert quarantine.add([(3, "again")]) == []
    assert quarantine.add([(7, "new")]) == ["007.png: new"]
    assert Quarantine(path, part, 0.1).add([(7, "again"), (8, "new")]) == ["008.png: new"]
    os.unlink(path)
    os.mkfifo(path)
    Quarantine(path, part, 0.1)


def test_link_loops_and_pipes_are_no_folders_and_no_tables(tmp_path: Path) -> None:
    """Neither ends the listing, and a pipe called .parquet is not waited for."""
    part = folder_of_equals(tmp_path / "set", 10, set())
    (tmp_path / "set" / "around").symlink_to("around")
    (tmp_path / "set" / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "set" / "x.parquet")
    again = open_source(str(tmp_path / "set")).train
    assert len(again) == len(part) + 1
    assert again.name(10) == "loop.png"


def test_a_tiff_of_few_pixels_and_many_bytes_is_refused() -> None:
    """Few pixels, many samples: what it decodes to is bounded, whatever the file says."""
    bomb = tiff(np.zeros((4, 4, 3), np.uint8), photometric="rgb", compression="zlib", tile=(16, 16))
    assert Image.open(io.BytesIO(bomb)).size == (4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maekit.data.tiff.MAX_PIXELS", 40)  # 640 bytes: less than one tile
        assert "bomb" in reason(bomb)
