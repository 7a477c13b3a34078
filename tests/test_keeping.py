"""No result is written over: the helper by itself, then cards, scores, tables and pictures through the command line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from test_card import make_weights
from tiny_classes import TRAINING, write_classifier, write_encoder, write_images

from maekit import cli, keeping
from maekit.config import FinetuneConfig, UserError
from maekit.config.segmentation import SegmentConfig
from maekit.training.finetuning import default_out as finetune_out
from maekit.training.segmentation_prepare import default_out as segment_out

PROBE = "--data digits --device cpu --no-baselines --probes --blocks 2".split()


def write(path: Path, text: str) -> None:
    """As every writer of maekit: a file takes another's place, and none is written into."""
    temporary = path.with_name("new.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_earlier_result_that_differs_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what belongs to it, under the next number, and it is said; the newest has the plain name."""
    card = tmp_path / "card.json"
    for number, value in enumerate((1, 2, 3)):
        with keeping.keeping(card, Console(), "card.png"):
            write(card, json.dumps({"top1": value}))
            write(tmp_path / "card.png", f"picture {value}")
        said = capsys.readouterr().out
        assert (f"kept as card-{number}.json, with card-{number}.png" in said) == (number > 0)
    assert names_in(tmp_path) == ["card-1.json", "card-1.png", "card-2.json", "card-2.png", "card.json", "card.png"]
    assert [json.loads((tmp_path / f"card{end}.json").read_text())["top1"] for end in ("-1", "-2", "")] == [1, 2, 3]
    assert (tmp_path / "card-1.png").read_text() == "picture 1"


def test_the_same_result_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds and environment are no difference, at any depth; bytes are where it is no JSON."""
    card, table = tmp_path / "card.json", tmp_path / "table.csv"
    for seconds in (1.5, 2.5):
        with keeping.keeping(card, Console()):
            write(card, json.dumps({"rows": [{"a": 1, "seconds": {"fit": seconds}}], "environment": seconds}))
        with keeping.keeping(table, Console()):
            write(table, "a,b\n")
    assert names_in(tmp_path) == ["card.json", "table.csv"]
    assert capsys.readouterr().out.count("was there already and said the same") == 2
    assert json.loads(card.read_text())["environment"] == 2.5


def test_what_the_new_result_has_not_is_of_the_earlier_one_alone(tmp_path: Path) -> None:
    """A picture that was not drawn anew must not stand beside another card."""
    card, picture = tmp_path / "card.json", tmp_path / "confusion.png"
    write(card, "{}")
    write(picture, "old")
    with keeping.keeping(card, Console(), picture.name):
        write(card, '{"a": 1}')
    assert names_in(tmp_path) == ["card-1.json", "card.json", "confusion-1.png"]


def test_what_fails_leaves_the_earlier_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that ends in an error, and a folder in which nothing can be kept; a copy where links are unknown."""
    card = tmp_path / "card.json"
    write(card, "{}")
    with pytest.raises(RuntimeError), keeping.keeping(card, Console()):
        raise RuntimeError
    assert names_in(tmp_path) == ["card.json"]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with keeping.keeping(card, Console()):
        write(card, "[]")
    assert (tmp_path / "card-1.json").read_text() == "{}"
    monkeypatch.setattr("shutil.copy2", refuse)
    with (
        pytest.raises(UserError, match=r"cannot be kept as card-2\.json .*not permitted.*--out"),
        keeping.keeping(card, Console()),
    ):
        raise AssertionError("not begun")
    assert names_in(tmp_path) == ["card-1.json", "card.json"] and card.read_text() == "[]"


QUICK_PROBE = "--data digits --device cpu --no-baselines --probes --blocks 2".split()


def test_two_probes_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other settings keep the first card; the same ones again replace theirs. A failing one changes nothing."""
    weights = make_weights(tmp_path, in_chans=1)
    words = ["probe", str(weights), *QUICK_PROBE]
    out = tmp_path / "card"
    for more in (["--pool", "mean"], ["--pool", "cls"], ["--pool", "cls"]):
        assert cli.main([*words, *more, "--out", str(out)]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "the earlier one is kept as card-1.json, with config-1.json, card-1.png" in said
    assert said.count("said the same") == 1
    kept = ["card-1.json", "card-1.png", "card.json", "card.png", "config-1.json", "config.json"]
    assert names_in(out) == kept
    pools = [json.loads((out / f"config{end}.json").read_text())["pool"] for end in ("-1", "")]
    assert pools == ["mean", "cls"]


def test_an_unfinished_card_does_not_touch_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings too have a name of their own, until all is measured."""
    weights = make_weights(tmp_path, in_chans=1)
    out = tmp_path / "card"
    words = ["probe", str(weights), *QUICK_PROBE]
    assert cli.main([*words, "--pool", "mean", "--out", str(out)]) == 0
    before = {name: (out / name).read_bytes() for name in names_in(out)}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maekit.tasks.probe.say_left_out", stop)
        assert cli.main([*words, "--pool", "cls", "--out", str(out)]) == 130
    assert names_in(out) == sorted([*before, "card-unfinished.json", "config-unfinished.json"])
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert json.loads((out / "card-unfinished.json").read_text())["pool"] == "cls"
    assert cli.main([*words, "--pool", "cls", "--out", str(out)]) == 0
    assert not [name for name in names_in(out) if "unfinished" in name]


def test_scores_and_tables_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--eval seen in another way, and predictions of another part, both to the name that they have by default."""
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "run")
    for share in ("1", "0.5"):
        assert cli.main(["finetune", "run", "--data", "digits", "--eval", "--device", "cpu", "--crop-pct", share]) == 0
    folder = tmp_path / "run" / "eval-digits"
    assert names_in(folder) == ["card-1.json", "card.json", "confusion-1.png", "confusion.png"]
    cards = [json.loads((folder / f"card{end}.json").read_text()) for end in ("-1", "")]
    assert [card["crop_pct"] for card in cards] == [1, 0.5]
    for part in ("train", "test", "test"):
        assert cli.main(["predict", "run", "--data", "digits", "--part", part, "--device", "cpu"]) == 0
    assert {"predictions.parquet", "predictions-1.parquet"} == {one.name for one in tmp_path.glob("predictions*")}


def test_pictures_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels, attention maps, and what check-data writes."""
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "run")
    images = write_images(tmp_path / "images", {"a": 2})
    for index in (0, 1):
        for command in ("reconstruct", "attend"):
            words = [command, "run", "--image", str(images / "a" / f"{index}.png"), "--device", "cpu"]
            assert cli.main(words) == 0
        assert cli.main(["check-data", "--data", str(images), "--out", "report.json", "--workers", "0"]) == 0
        Image.new("L", (8, 8)).save(images / "a" / "2.png")
    assert {"panel.png", "panel-1.png", "maps.png", "maps-1.png", "report.json", "report-1.json"} <= set(
        names_in(tmp_path)
    )


def test_a_lengthened_fine_tuning_keeps_its_first_card(tmp_path: Path) -> None:
    """Other weights were scored: the shorter run's number stays."""
    source, out = str(write_encoder(tmp_path / "source")), tmp_path / "run"
    assert cli.main(["finetune", source, *TRAINING, "--steps", "2", "--out", str(out)]) == 0
    assert cli.main(["resume", str(out), "--steps", "3"]) == 0
    assert [json.loads((out / name).read_text())["steps"] for name in ("card-1.json", "card.json")] == [2, 3]
    assert (out / "confusion-1.png").is_file()


def test_names_of_folders_follow_what_experiments_vary() -> None:
    """Seeds, shares of the labels, heads and starts; the usual ones have the plain name."""
    names = [
        finetune_out("run", FinetuneConfig(data="cifar10", **changes)).name
        for changes in ({}, {"seed": 2}, {"train_share": 0.1, "seed": 2}, {"from_scratch": True})
    ]
    assert names == ["finetune-cifar10", "finetune-cifar10-seed2", "finetune-cifar10-share0.1-seed2", "scratch-cifar10"]
    names = [
        segment_out(SegmentConfig(data="camvid/", source="run", **changes)).name
        for changes in ({}, {"head": "linear"}, {"head": "fpn", "from_scratch": True, "seed": 1})
    ]
    assert names == ["segment-camvid", "segment-camvid-linear", "segment-camvid-fpn-scratch-seed1"]
