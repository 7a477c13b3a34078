"""Images of one patient, slide or scene stay on one side of every split, whatever names their group."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from archive_files import entries, make_tar
from conftest import tiny_config
from fake_hub import Hub, stand_in
from pair_files import annotation, picture
from PIL import Image
from tiny_classes import TRAINING, write_encoder
from tiny_pairs import leave_pictures_out, write_pairs
from tiny_pairs import train as train_segmenter
from tiny_runs import SMALLEST, without_pictures

from maekit import cli
from maekit.config import UserError
from maekit.data.groups import group_numbers
from maekit.data.labelled import kept_for_report, split_labelled
from maekit.data.order import lowest_hash, sides, split_heldout
from maekit.data.pairs import open_pairs
from maekit.data.parts import FilePart, Part, Source
from maekit.data.sources import open_source
from maekit.data.splits import Split
from maekit.rng import Purpose
from maekit.tasks import plan, pretrain
from maekit.training import evaluation
from maekit.training.anew import fitting_pool
from maekit.training.evaluation import TrainSet, held_out_S
from maekit.training.run import Job
from maekit.weights.store import random_model
from maekit.weights.written import write_weights

__all__ = ["stand_in"]

Ids = npt.NDArray[np.int64]
PATIENTS, EACH = 9, 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine patients with ten images each, in class folders: as a folder, an archive, a table and Parquet; the numbers
    of the files do not follow the patients.
    """
    root = tmp_path_factory.mktemp("groups")
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(PATIENTS * EACH):
        patient, label = f"p{number % PATIENTS}", ("cat", "dog")[number // PATIENTS % 2]
        path = root / "images" / label / f"{number:03d}_{patient}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
        rows.append({"file_name": f"images/{label}/{path.name}", "label": label, "patient": patient})
    with (root / "list.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    make_tar(root / "images.tar", entries(root / "images"))
    images = [{"bytes": (root / row["file_name"]).read_bytes(), "path": None} for row in rows]
    columns = {"label": [int(row["label"] == "dog") for row in rows], "patient": [row["patient"] for row in rows]}
    pq.write_table(pa.table({"image": images, **columns}), root / "rows.parquet", row_group_size=7)
    return root


def opened(place: Path, name: str = "images", by: str | None = r"p\d+") -> Source:
    return open_source(str(place / name), in_chans=1, group_by=by)


def patients(part: Part, ids: Ids) -> set[int]:
    assert part.groups is not None
    return set(part.groups[ids].tolist())


FORMS = [("images", r"_(p\d+)"), ("images.tar", r"_(p\d+)"), ("list.csv", "patient"), ("rows.parquet", "patient")]


@pytest.mark.parametrize(("name", "by"), FORMS)
def test_every_form_of_data_holds_the_same_patients_out(place: Path, name: str, by: str) -> None:
    """By a column or by a pattern: the numbers follow from the names of the groups."""
    source = opened(place, name, by)
    assert source.train.groups is not None and len(np.unique(source.train.groups)) == PATIENTS
    splits = split_labelled(source, "data", 0.02)
    sets = [patients(source.train, ids) for ids in (splits.train_ids, splits.heldout_ids, splits.test_ids)]
    assert sum(map(len, sets)) == PATIENTS == len(set.union(*sets)), "no patient is on two sides, none is lost"
    assert [len(one) for one in sets] == [6, 1, 2], "whole patients, as few as reach 2 and 20 % of the images"
    of_folder = split_labelled(opened(place), "data", 0.02)
    assert patients(source.train, splits.test_ids) == patients(of_folder.train, of_folder.test_ids)
    assert "(2 whole groups)" in splits.test_what
    (note,) = source.notes
    assert "9 in train" in note and "too narrow" in note


def test_without_groups_nothing_is_other_than_before(place: Path) -> None:
    """One group an image is no group at all."""
    part = opened(place, by=None).train
    assert part.groups is None
    ids = np.arange(90, dtype=np.int64)
    for count in (0, 1, 7, 90, 95):
        alone = lowest_hash(ids, count, Purpose.SUBSET)
        assert np.array_equal(lowest_hash(ids, count, Purpose.SUBSET, ids), alone)
    assert np.array_equal(split_heldout(90, 0.02)[1], split_heldout(90, 0.02, groups_N=ids)[1])
    kept = kept_for_report(part)
    train, held = split_heldout(90, 0.2, reported=kept)
    everyone = split_heldout(90, 0.2)
    assert np.array_equal(train, np.setdiff1d(everyone[0], kept)), "the held-out images are those of every other run"
    assert np.array_equal(held, np.setdiff1d(everyone[1], kept)) and len(held) < len(everyone[1])


def test_groups_are_nested_and_a_new_one_moves_no_other() -> None:
    random = np.random.default_rng(1)
    names = [f"slide {number}" for number in random.integers(0, 40, 600)]
    groups_N = group_numbers((name, str(place)) for place, name in enumerate(names))
    ids = np.arange(len(names), dtype=np.int64)
    smaller: set[int] = set()
    for count in (1, 50, 300, 600):
        chosen = set(lowest_hash(ids, count, Purpose.HELDOUT_SPLIT, groups_N).tolist())
        assert smaller <= chosen and len(chosen) >= count
        assert all((i in chosen) == (j in chosen) for i in ids[:60] for j in ids[:60] if groups_N[i] == groups_N[j])
        smaller = chosen
    more = group_numbers((name, str(place)) for place, name in enumerate(["a new slide", *names]))
    assert np.array_equal(more[1:], groups_N)
    assert groups_N.min() >= 0


def test_an_image_without_a_group_is_one_by_itself() -> None:
    numbers = group_numbers([("", "a.png"), ("x", "b.png"), ("", "c.png"), ("x", "a.png"), ("a.png", "d.png")])
    assert len(set(numbers.tolist())) == 4 and numbers[1] == numbers[3]


def test_the_held_out_group_is_another_than_the_one_for_the_report() -> None:
    """Of few groups the first by one hash and by the other are often the same, and then nothing would choose."""
    for seed in range(30):
        groups_N = group_numbers((f"{seed} {number % 3}", "") for number in range(90))
        ids = np.arange(90, dtype=np.int64)
        test = lowest_hash(ids, 18, Purpose.TEST_SPLIT, groups_N)
        train, held = split_heldout(90, 0.02, groups_N=groups_N, reported=test)
        assert len(test) == len(train) == len(held) == 30
        assert len({*groups_N[test], *groups_N[train], *groups_N[held]}) == 3


def test_a_test_groups_images_without_labels_are_not_held_out() -> None:
    """Where they were, that group could be the one to be held out, and no labelled image would be left of it."""
    labels = np.where(np.arange(90) % 9 < 3, -1, np.arange(90) % 2).astype(np.int64)
    for seed in range(12):
        part = FilePart(b"", [b"%02d.png" % number for number in range(90)], 1, labels=labels, class_names=["a", "b"])
        part.groups = group_numbers((f"{seed} {number % 3}", "") for number in range(90))
        splits = split_labelled(Source("data", part), "data", 0.02)
        sets = [patients(part, ids) for ids in (splits.train_ids, splits.heldout_ids, splits.test_ids)]
        assert [len(one) for one in sets] == [1, 1, 1] and len(set.union(*sets)) == 3


def test_pools_and_probes_keep_groups_together(place: Path) -> None:
    part = opened(place).train
    assert part.groups is not None
    reading = pretrain_job(place, place / "unused").config
    held_N = sides(part, reading)
    assert 0 < held_N.sum() < 90 and not set(part.groups[held_N]) & set(part.groups[~held_N])
    ids = np.arange(45, dtype=np.int64)
    held_S = held_out_S(ids, part.groups)
    assert 0 < held_S.sum() < 45 and not set(part.groups[ids[held_S]]) & set(part.groups[ids[~held_S]])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_what_names_no_groups_is_refused(place: Path) -> None:
    said = refusal(lambda: opened(place, by="p[0-7]"))
    assert "--group-by p[0-7]: finds nothing in cat/008_p8.png and 9 of 89 other images" in said
    assert "finds nothing in" in refusal(lambda: opened(place, by="x*")), "an empty text names nothing"
    assert "not a pattern of paths (missing )" in refusal(lambda: opened(place, by="(p"))
    assert "finds nothing in images/" in refusal(lambda: opened(place, "list.csv", "patiant"))
    assert "did you mean patient" in refusal(lambda: opened(place, "rows.parquet", "patiant"))
    assert "which --data digits is not" in refusal(lambda: open_source("digits", in_chans=1, group_by="p"))
    one = opened(place, by=r"\.png")
    assert "1 groups are too few" in refusal(lambda: split_labelled(one, "data", 0.02))
    assert "1 groups (90 images) are too few" in refusal(lambda: split_heldout(90, 0.02, groups_N=one.train.groups))
    assert "too few groups" in refusal(lambda: held_out_S(np.arange(20), one.train.groups))
    two = opened(place, by="cat|dog")
    assert "2 groups (90 images) are too few" in refusal(lambda: split_labelled(two, "data", 0.02))


def test_a_row_in_two_groups_is_refused(place: Path, tmp_path: Path) -> None:
    line = (place / "list.csv").read_text().splitlines()[1]
    table = tmp_path / "two.csv"
    table.write_text("\n".join(["file_name,label,patient", line, line[:-2] + "p8"]))
    assert "with another label, part or group" in refusal(lambda: open_source(str(table), group_by="patient"))


def test_patients_in_training_and_test_are_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (place / "list.csv").read_text().splitlines()
    parts = ["test" if place < 12 else "train" for place in range(len(rows) - 1)]
    table = place / "parted.csv"
    table.write_text(
        "\n".join([rows[0] + ",split", *(f"{row},{part}" for row, part in zip(rows[1:], parts, strict=True))])
    )
    source = opened(place, "parted.csv", "patient")
    assert (
        "9 of the 9 groups of test have images in train too, such as that of images/cat/000_p0.png" in source.notes[1]
    )
    assert source.test is not None and split_labelled(source, "data", 0.02).test_what == "test split (9 whole groups)"
    report = tmp_path / "report.json"
    assert cli.main(["check-data", "--data", str(table), "--group-by", "patient", "--out", str(report)]) == 0
    assert "9 of the 9 groups of test" in " ".join(capsys.readouterr().out.split())
    assert [part["groups"] for part in json.loads(report.read_text())["parts"].values()] == [9, 9]
    table.unlink()


def pretrain_job(place: Path, out: Path) -> Job:
    """A run of two steps, as pretraining prepared it."""
    found: list[Job] = []
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        real = pretrain.prepare

        def prepare(*arguments: Any) -> Job:
            found.append(real(*arguments))
            return found[-1]

        patch.setattr(pretrain, "prepare", prepare)
        shape = "--img-size 8 --patch-size 4 --in-chans 1 --batch-size 8 --workers 0 --steps 2".split()
        words = ["--data", str(place / "images"), "--group-by", r"p\d+", *SMALLEST, *shape]
        assert cli.main(["pretrain", "folder", *words, "--out", str(out)]) == 0
    return found[0]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A classifier that was trained without the test patients, which --group-by chose."""
    words = [word for word in TRAINING if word not in ("--data", "digits")]
    data = ["--data", str(place / "list.csv"), "--group-by", "patient"]
    out = place / "run"
    encoder = str(write_encoder(place / "encoder"))
    assert cli.main(["finetune", encoder, *data, *words, "--batch-size", "8", "--steps", "2", "--out", str(out)]) == 0
    return out


def test_pretraining_holds_whole_patients_out_and_goes_on(place: Path, tmp_path: Path) -> None:
    job = pretrain_job(place, tmp_path / "run")
    held = patients(job.part, job.heldout_ids)
    assert len(job.heldout_ids) == EACH and len(held) == 1 and not held & patients(job.part, job.train_ids)
    assert cli.main(["resume", str(tmp_path / "run"), "--steps", "3"]) == 0


def test_a_classifier_is_scored_on_the_patients_that_its_run_kept(run: Path, place: Path, tmp_path: Path) -> None:
    """Also where the flag is not said again: another fifth would hold images that it was trained on."""
    own = json.loads((run / "card.json").read_text())
    assert own["test_images"] == 2 * EACH and own["heldout_images"] == EACH and "(2 whole groups)" in own["test"]
    again = tmp_path / "eval"
    words = ["finetune", str(run), "--data", str(place / "list.csv"), "--eval", "--workers", "0", "--out", str(again)]
    assert cli.main(words) == 0
    card = json.loads((again / "card.json").read_text())
    assert (card["trained_on"], card["test_images"], card["top1"]) == (0, 2 * EACH, own["top1"])
    words = ["finetune", str(run), "--data", str(place / "images"), "--eval", "--workers", "0"]
    assert cli.main([*words, "--out", str(tmp_path / "others")]) == 0, "other data need not have such groups"
    said = tmp_path / "said.csv"
    assert cli.main(["predict", str(run), "--data", str(place / "list.csv"), "--out", str(said), "--workers", "0"]) == 0
    with said.open(newline="") as file:
        used = [row["trained_on"] for row in csv.DictReader(file)]
    assert (used.count("true"), used.count("false")) == (70, 20)


def test_a_card_keeps_patients_together(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that choose, too; and with --protocol paper, --scratch and for raw pixels."""
    encoder = str(write_encoder(tmp_path / "encoder"))
    divided: list[TrainSet] = []
    real = evaluation.divide
    monkeypatch.setattr(evaluation, "divide", lambda *words: divided.append(real(*words)) or divided[-1])  # type: ignore[func-returns-value]
    words = ["--data", str(place / "rows.parquet"), "--group-by", "patient", "--probes"]
    assert cli.main(["probe", encoder, *words, "--out", str(tmp_path / "card")]) == 0
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert (card["training_images"], card["test_images"], card["heldout_images"]) == (7 * EACH, 2 * EACH, EACH)
    assert card["test"] == "a fixed fifth of the images (2 whole groups), which no probe is fitted on"
    assert [len(train.held_S) for train in divided] == [EACH] * 3, "of the encoder, of random weights, of the pixels"
    part = opened(place).train
    assert part.groups is not None and part.labels is not None
    ids = np.arange(40, dtype=np.int64)
    pool: Any = None
    fitted = fitting_pool(Split(part, pool, ids, torch.from_numpy(part.labels[ids]))).ids
    left = set(part.groups[np.setdiff1d(ids, fitted)])
    assert 0 < len(fitted) < 40 and not left & set(part.groups[fitted])


@pytest.mark.parametrize("form", ["folder", "table"])
def test_pairs_of_one_street_stay_together(tmp_path: Path, form: str) -> None:
    """Frames of one film are nearly the same."""
    lines = ["image,mask,film"]
    for number in range(40):
        name = f"film{number % 4}_{number:02d}"
        picture(tmp_path / f"images/{name}.png")
        annotation(tmp_path / f"masks/{name}.png")
        lines.append(f"images/{name}.png,masks/{name}.png,{number % 4}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    if form == "folder":
        pairs = open_pairs(str(tmp_path), group_by="film[0-9]")
    else:
        pairs = open_pairs(str(tmp_path / "pairs.csv"), group_by="film")
    groups_N = pairs.train.images.groups
    assert groups_N is not None and len(np.unique(groups_N)) == 4
    names = [pairs.train.name(index) for index in range(40)]
    assert all((groups_N[i] == groups_N[j]) == (names[i][-8] == names[j][-8]) for i in range(40) for j in range(40))
    train, held = split_heldout(40, 0.1, 2, groups_N)
    assert len(held) == 10 and not set(groups_N[train]) & set(groups_N[held])
    assert "4 in train" in pairs.notes[-1] or "4 in train" in " ".join(pairs.notes)


def test_segmentation_holds_whole_films_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And scores on what it held out, without the flag being said again. Validation images may be named otherwise."""
    leave_pictures_out(monkeypatch)
    write_pairs(tmp_path / "data", train=15)
    for file in sorted((tmp_path / "data").glob("*/training/*.png")):
        file.rename(file.with_name(f"film{int(file.stem) % 3}_{file.name}"))
    model = random_model(tiny_config(depth=4), seed=5)
    write_weights(tmp_path / "mae.safetensors", model, model.passport)
    assert train_segmenter(tmp_path, tmp_path / "run", "--group-by", "film[0-9]", "--steps", "1") == 0
    assert "10 images to train on, 5 held out" in " ".join(capsys.readouterr().out.split())
    words = ["--eval", "--part", "heldout", "--workers", "0", "--device", "cpu", "--inference", "whole"]
    assert cli.main(["segment", str(tmp_path / "run"), *words]) == 0
    assert json.loads((tmp_path / "run" / "score.json").read_text())["images"] == 5


def test_a_plan_counts_as_pretraining_does(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LOADER_SECONDS", 0.2)
    shape = "--img-size 8 --patch-size 4 --in-chans 1 --batch-size 8 --workers 0 --dry-steps 2".split()
    words = ["--data", str(place / "images"), "--group-by", r"p\d+", *SMALLEST, *shape]
    assert cli.main(["plan", "folder", *words]) == 0
    said = capsys.readouterr().out
    assert "80 to train on, 10 held out" in said and "--group-by" in said


def test_packed_images_keep_the_groups_of_their_paths(place: Path, tmp_path: Path) -> None:
    """Rows that name a path have it, however many have none; and no image is read for it."""
    assert cli.main(["pack", "--data", str(place / "images"), "--out", str(tmp_path / "shards"), "--workers", "0"]) == 0
    packed, folder = opened(tmp_path, "shards"), opened(place)
    assert packed.train.groups is not None and folder.train.groups is not None
    assert packed.train.groups.tolist() == folder.train.groups.tolist()
    images = [{"bytes": b"-", "path": path} for path in ("p1/a.png", "p1/b.png", None)]
    pq.write_table(pa.table({"image": [*images, None]}), tmp_path / "train.parquet")
    assert "finds nothing in an image without a path and 1 of 3" in refusal(lambda: opened(tmp_path, "train.parquet"))
    pq.write_table(pa.table({"image": images[:2]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": images[1:]}), tmp_path / "test.parquet")
    (tmp_path / "parts").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / "parts" / f"{name}.parquet")
    source = opened(tmp_path, "parts")
    assert source.test is not None and source.test.groups is not None and len(set(source.test.groups.tolist())) == 2
    assert "1 of the 2 groups of test have images in train too, such as that of row 0" in source.notes[1]


def test_groups_of_the_hub(stand_in: Hub, place: Path) -> None:
    pytest.importorskip("huggingface_hub")
    stand_in.push("them/rows", {"README.md": b"", "data/train-00000.parquet": (place / "rows.parquet").read_bytes()})
    source = open_source("hub:them/rows", in_chans=1, group_by="patient")
    assert source.train.groups is not None
    assert source.train.groups.tolist() == opened(place, "rows.parquet", "patient").train.groups.tolist()  # type: ignore[union-attr]
    stand_in.push("them/files", {"README.md": b"", "p0/a.png": b"", "p0/b.png": b"", "p1/a.png": b"", "p1/b.png": b""})
    source = open_source("hub:them/files", in_chans=1, group_by="p[0-9]")
    assert source.train.groups is not None and len(np.unique(source.train.groups)) == 2
