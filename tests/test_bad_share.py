"""A few broken files end nothing, too many end a run with a word, and no command looks for a readable one for ever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_classes
import tiny_runs
import torch
from tiny_runs import folder_words, make_images, run

from maekit import cli
from maekit.config import UserError
from maekit.data.parts import FilePart
from maekit.data.quarantine import Quarantine, allowed_bad, share_for
from maekit.data.sources import open_source
from maekit.tasks import finetune


@pytest.fixture(scope="module", autouse=True)
def _quick() -> object:
    patch = pytest.MonkeyPatch()
    tiny_runs.without_pictures(patch)
    patch.setattr(finetune, "draw_training", lambda *_, **__: None)
    yield
    patch.undo()


def spoil(folder: Path, *ids: int) -> None:
    for index in ids:
        next(folder.rglob(f"{index:03d}.png")).write_bytes(b"")


def quarantined(out: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (out / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("share", "images", "allowed"),
    [
        (0.01, 41, 10),
        (0.01, 12, 3),
        (0.01, 3, 0),
        (0.01, 5000, 50),
        (0.29, 100, 29),
        (0.5, 12, 6),
        (0, 41, 0),
        (1, 7, 7),
    ],
)
def test_how_many_may_be_unreadable(share: float, images: int, allowed: int) -> None:
    """By hand: the larger one of the share and of ten, these up to a quarter."""
    assert allowed_bad(share, images) == allowed


def test_the_share_that_a_message_proposes_is_enough() -> None:
    for images in (3, 41, 50, 100, 997):
        for bad in range(1, images + 1):
            assert allowed_bad(float(share_for(bad, images)), images) >= bad


@pytest.mark.parametrize("in_memory", ["no", "yes"])
def test_one_broken_file_of_41_ends_no_pretraining(tmp_path: Path, in_memory: str) -> None:
    images = make_images(tmp_path / "images", 41)
    spoil(images, 7)
    words = [*folder_words(images), "--in-memory", in_memory]
    assert run(words, tmp_path / "run", "--steps", "5") == 0
    assert quarantined(tmp_path / "run") == ["007.png"]


def test_too_many_stop_a_run_and_stop_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """11 of 41: the files, the reason and the way out are named, on resume too; and that way is one."""
    images, out = make_images(tmp_path / "images", 41), tmp_path / "run"
    spoil(images, *range(20, 31))
    assert run([*folder_words(images), "--in-memory", "yes"], out, "--steps", "3") == 2
    again = ["resume", str(out)]
    first = capsys.readouterr().err
    assert cli.main(again) == 2
    for error in (first, capsys.readouterr().err):
        assert "11 of 41 images cannot be read, and --max-bad-share 0.01 allows 10 (020.png: empty file; " in error
        assert f"maekit resume {out} --max-bad-share 0.27" in error
        assert error.count("\n") == 1
    assert cli.main([*again, "--max-bad-share", "0.27"]) == 0


def test_a_share_of_0_allows_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images", 41)
    spoil(images, 7)
    assert run([*folder_words(images), "--in-memory", "yes"], tmp_path / "run", "--max-bad-share", "0") == 2
    assert "--max-bad-share 0 allows 0 (007.png: empty file)" in capsys.readouterr().err


@pytest.mark.parametrize("in_memory", ["no", "auto"])
@pytest.mark.parametrize("readable", [0, 1])
def test_a_tiny_set_of_broken_files_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_memory: str, readable: int
) -> None:
    images = make_images(tmp_path / "images", 17)
    spoil(images, *range(17 - readable))
    words = [*folder_words(images), "--in-memory", in_memory, "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert run(words, tmp_path / "run", "--steps", "3") == 2
    error = capsys.readouterr().err
    assert "can be read" in error or "cannot be read" in error
    assert "empty file" in error


def test_what_is_whole_again_is_not_counted(tmp_path: Path) -> None:
    """A disk that was away left every file in the list: a resumed run judges what it meets, and what others meet."""
    images = make_images(tmp_path / "images", 41)
    part = open_source(str(images)).train
    assert isinstance(part, FilePart)
    path = tmp_path / "quarantine.jsonl"
    path.write_text("".join(json.dumps({"id": i, "name": "x", "reason": "away"}) + "\n" for i in range(41)))
    mine = Quarantine(path, part, 0.01)
    assert mine.add([(3, "away")]) == []
    path.write_text("")
    mine, other = Quarantine(path, part, 0.01), Quarantine(path, part, 0.01)
    other.add([(i, "broken") for i in range(6)])
    mine.add([(i, "broken") for i in range(6, 10)])
    with pytest.raises(UserError, match=r"11 of 41 .* \(000\.png: broken; 001\.png: broken; 002\.png: broken; and 8 m"):
        mine.add([(10, "broken")])


def test_a_batch_of_broken_files_ends_no_fine_tuning(tmp_path: Path) -> None:
    """Two of a batch of two: the step learns nothing from images whose labels are not theirs, and the run goes on."""
    data = tiny_classes.write_images(tmp_path / "data", {"a": 20, "b": 20})
    source = tiny_classes.write_encoder(tmp_path / "source")
    for index in range(6):
        (data / "a" / f"{index}.png").write_bytes(b"")
    words = [*tiny_classes.TRAINING, "--data", str(data), "--batch-size", "2", "--epochs", "3"]
    words += ["--auto-augment", "none"]
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        real = finetune.soft_loss

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.append(targets.sum(dim=1))
            return real(logits, targets)

        patch.setattr(finetune, "soft_loss", loss)
        assert cli.main(["finetune", str(source), *words, "--out", str(tmp_path / "run")]) == 0
    sums = torch.stack(seen)
    assert (sums == 0).all(dim=1).any(), "no batch of broken files alone was drawn: take another seed"
    assert torch.isclose(sums[(sums != 0).any(dim=1)], torch.ones(())).all()
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses)
