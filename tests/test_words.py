"""Words typed out of a habit: flags of other codes, sources behind the flags, images where weights are wanted."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_classes import write_encoder, write_images

from maekit import cli, config
from maekit.config import words
from maekit.config.segmentation import SegmentConfig

KINDS = [one for one in vars(config).values() if dataclasses.is_dataclass(one)] + [SegmentConfig]
FIELDS = {item.name for kind in KINDS for item in dataclasses.fields(kind)}


def run(*typed: str) -> int:
    try:
        return cli.main(typed)
    except SystemExit as error:  # tyro's
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("pretrain folder --data_path d --output_dir o", ["--data_path: no flag of this command; take --data"]),
        ("pretrain folder --data_path d --output_dir=o", ["--output_dir: no flag of this command; take --out ("]),
        ("pretrain folder --accum_iter 4", ["take --accum, and --batch-size counts all processes"]),
        ("pretrain folder --norm_pix_loss", ["take --target norm-pixels", "docs/coming-from.md"]),
        ("pretrain folder --resume x.pth", ["command; maekit resume RUN continues"]),
        ("pretrain folder --input-size 64", ["take --img-size"]),
        ("probe run --data d --accum_iter 2", ["commands that can do this call it --accum"]),
        ("finetune run --finetune w.pth --nb_classes 3", ["stands first, without a flag", "those of the labels"]),
        ("probe --data d run", ["is missing", "perhaps: maekit probe run --data d"]),
        ("pretrain --data d --out o folder", ["comes first", "perhaps: maekit pretrain folder --data d --out o"]),
        ("probe run --data d --epochs 9", ["take --lars-epochs"]),
        ("resume run --lr 1 --epochs 3", ["--lr: a run keeps what it began with"]),
        ("pretrain folder d --out o", ["maekit pretrain folder --data d --out o"]),
        ("selftest resume foldr", ["error: recipe 'foldr'"]),
        ("check-data d", ["maekit check-data --data d"]),
        ("pack d --out o", ["maekit pack --data d --out o"]),
    ],
)
def test_what_is_meant_is_said(typed: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*typed.split()) == 2
    error = capsys.readouterr().err
    assert all(one in error for one in said), error


def test_own_flags_are_no_habits() -> None:
    """In whatever spelling, with whatever value; a value is no flag."""
    typed = "--mask_ratio 0.75 --warmup_epochs 5 --blr 1e-3 --model mae --no-resume --num-workers".split()
    assert [line.split()[0] for line in words.foreign_flags(typed, config.PretrainConfig)] == ["--num-workers:"]
    assert set(words.HABITS) & {item.name for item in dataclasses.fields(config.PretrainConfig)} == {
        "epochs"  # which the official probe has, and ours not
    }


def test_every_habit_leads_to_a_flag_that_there_is() -> None:
    for advice in words.HABITS.values():
        for name in re.findall(r"--([a-z-]+)", advice.replace("--nproc", "")):
            assert name.replace("-", "_") in FIELDS, advice


def test_the_page_and_the_program_know_the_same_flags() -> None:
    """Each flag of another code in the page's tables is one of ours, or its habit is answered."""
    page = (ROOT / "docs" / "coming-from.md").read_text().partition("## Flags")[2]
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    there = {name for row in rows for cell in row[:-1] for name in re.findall(r"--([a-z_]+)", cell)}
    assert len(there) > 40
    assert not {name for name in there if name not in FIELDS and name not in words.HABITS}


def test_images_and_runs_in_each_others_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of images as SRC; a run as --data, whose panels would be trained on."""
    images = write_images(tmp_path / "images", {"a": 2})
    run_folder = write_encoder(tmp_path / "run")
    (run_folder / "config.json").write_text("{}")
    (run_folder / "metrics.jsonl").write_text("")
    assert cli.main(["probe", str(images), "--data", str(images)]) == 2
    assert "it holds images, which --data names" in capsys.readouterr().err
    assert cli.main(["check-data", "--data", str(run_folder)]) == 2
    assert "is the folder of a run, not of images" in capsys.readouterr().err


def test_a_folder_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["pretrain", str(tmp_path), "--data", "d"]) == 2
    assert f"a folder; maekit resume {tmp_path} continues" in capsys.readouterr().err


def test_a_pretraining_has_no_segmentation_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, and not by the fields of its config that a segmentation does not have."""
    folder = write_encoder(tmp_path / "run")
    (folder / "config.json").write_text('{"embed_dim": 16}')
    assert cli.main(["segment", str(folder), "--eval", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "not a segmenter" in error and len(error.splitlines()) == 1


def test_a_panel_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, images = write_encoder(tmp_path / "run"), write_images(tmp_path / "images", {"a": 1})
    words_ = ["reconstruct", str(folder), "--image", str(images / "a" / "0.png"), "--device", "cpu"]
    assert cli.main([*words_, "--out", str(images / "a" / "0.png" / "panel.png")]) == 2
    assert "panel.png: cannot be written (" in capsys.readouterr().err
