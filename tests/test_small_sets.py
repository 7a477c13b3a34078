"""Few images: batch and rate that follow their number, and what is said of runs that are short or learn little."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_classes
import tiny_runs
from rich.console import Console

from maekit import cli, demo, recipes
from maekit.config import PRESETS, DemoConfig, PlanConfig, PretrainConfig, UserError
from maekit.tasks import finetune, pretrain
from maekit.training import batch, finetuning, prepare
from maekit.training.advice import few_heldout, few_steps, images_seen, low_skill, missed_classes
from maekit.viz import confusion

FOLDER = [*tiny_runs.SMALLEST, *"--img-size 16 --patch-size 8 --workers 0 --in-memory no".split()]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(confusion, "draw_confusion", lambda *_, **__: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """88 images, of which 80 are trained on."""
    return tiny_runs.make_images(tmp_path_factory.mktemp("small") / "images", 88)


def chosen(config: Any, count: int, parts: int = 1, rate: batch.Rate = batch.short_run_rate) -> tuple[Any, str]:
    """What a config becomes with so many training images, and what is said."""
    told = io.StringIO()
    found = batch.follow_images(config, count, parts, rate, Console(file=told, width=500))
    return found, told.getvalue()


def held(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "config.json").read_text())
    return values


# ---- the rule ----


@pytest.mark.parametrize(
    ("count", "most", "unit", "expected"),
    [(232, 64, 1, 8), (511, 64, 1, 8), (512, 64, 1, 16), (1024, 64, 1, 32), (2047, 64, 1, 32), (2048, 64, 1, 64),
     (10**6, 64, 1, 64), (2048, 96, 1, 64), (3072, 96, 1, 96), (1568, 1024, 2, 32), (32768, 1024, 2, 1024),
     (20, 64, 1, 8), (5, 64, 1, 5), (5, 64, 2, 4), (232, 6, 1, 6), (1024, 96, 3, 30), (232, 66, 11, 11)],
)  # fmt: skip
def test_the_batch_worked_by_hand(count: int, most: int, unit: int, expected: int) -> None:
    """32 steps an epoch, from 8 images a step on; a whole number of parts."""
    assert batch.small_batch(count, most, unit) == expected


def test_every_process_chooses_the_same_and_can_share_it() -> None:
    config = dataclasses.replace(recipes.get("folder"), accum=2)
    assert chosen(config, 600, parts=2)[0].batch_size == 16
    assert chosen(config, 600, parts=3)[0].batch_size == 12


def test_large_sets_keep_the_recipe() -> None:
    """But for the field that says that nothing is left to choose."""
    for config in (recipes.get("folder"), PRESETS["paper"], PRESETS["official"], PRESETS["small"], PRESETS["light"]):
        found, said = chosen(config, 32 * config.batch_size)
        assert (vars(found), said) == (vars(config) | {"follow_images": ()}, "")
        smaller, said = chosen(config, 32 * config.batch_size - 1)
        assert smaller.batch_size == config.batch_size // 2
        assert f"--batch-size {smaller.batch_size} --lr {smaller.lr:g} for" in said
        assert (said.count("\n"), config.lr) == (1, None)


def test_a_batch_that_no_flag_says_is_one_that_all_processes_can_share() -> None:
    """Three processes cannot share 64 images, nor twice as many parts, of pairs, 128: no flag has asked for those."""
    found, said = chosen(recipes.get("folder"), 100_000, parts=3)
    assert (found.batch_size, found.lr) == (63, None)
    assert "--batch-size 63 for 100,000 images, as no flag says it: 64 is not divisible by 3" in said
    found, said = chosen(PRESETS["small"], 100_000, parts=6, rate=batch.finetuning_rate)
    assert (found.batch_size, found.lr) == (126, None)
    found, said = chosen(recipes.get("folder"), 300, parts=80)
    assert (found.batch_size, found.lr) == (80, 5e-4) and "64 is not divisible by 80" in said
    with pytest.raises(UserError, match="12 training images are too few: a batch must be divisible by 16 here"):
        chosen(recipes.get("folder"), 12, parts=16)


def test_a_batch_that_was_typed_is_refused_with_those_next_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is yet to follow the number of images is not looked at."""
    monkeypatch.setattr(prepare, "start_accelerator", lambda *_: SimpleNamespace(num_processes=3))
    config = dataclasses.replace(recipes.get("folder"), data="x")
    assert prepare.open_machine(config, Path())[1].num_processes == 3
    with pytest.raises(UserError, match=r"64 is not divisible by 3 processes x --accum 1.* --batch-size 63 or 66$"):
        prepare.open_machine(dataclasses.replace(config, follow_images=()), Path())
    with pytest.raises(UserError, match=r"such as --batch-size 3$"):
        prepare.open_machine(dataclasses.replace(config, follow_images=(), batch_size=1), Path())
    paired = PRESETS["small"]
    assert finetuning.open_paired_machine(paired, Path())
    for size, expected in ((128, "not divisible by 3 .* --batch-size 126 or 132$"), (129, "even.* 126 or 132 ")):
        with pytest.raises(UserError, match=expected):
            finetuning.open_paired_machine(dataclasses.replace(paired, follow_images=(), batch_size=size), Path())


def test_a_plan_takes_the_batch_that_so_many_processes_would_choose() -> None:
    config = dataclasses.replace(PlanConfig(**vars(recipes.get("folder"))), data="x", processes=3)
    assert config.problems() == []
    assert "divisible by --processes 3" in " ".join(dataclasses.replace(config, follow_images=()).problems())


def test_only_folder_and_the_presets_follow() -> None:
    assert [name for name in recipes.names() if recipes.get(name).follow_images] == ["folder"]
    assert PretrainConfig(data="x").follow_images == ()


@pytest.mark.parametrize(("size", "expected"), [(1024, 4e-3), (256, 1e-3), (128, 5e-4), (64, 5e-4), (8, 5e-4)])
def test_fine_tunings_rate_does_not_fall_below_128_images(size: int, expected: float) -> None:
    """blr 1e-3 x batch / 256."""
    assert batch.finetuning_rate(PRESETS["paper"], size)[0] == pytest.approx(expected)


def test_pretrainings_rate_does_not_fall_below_a_floor() -> None:
    config = recipes.get("folder")
    assert [batch.short_run_rate(config, size)[0] for size in (8, 256, 512)] == [5e-4, 5e-4, 1e-3]


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], ("batch_size", "lr")), (["--lr", "5e-4"], ("batch_size",)), (["--blr=1"], ("batch_size",)),
     (["--batch_size", "64"], ()), (["--batch-size=64", "--lr", "1"], ())],
)  # fmt: skip
def test_flags_that_are_typed_are_obeyed(
    words: list[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pretrain, "main", asked.append)
    monkeypatch.setattr(finetune, "main", lambda source, config: asked.append(config))
    monkeypatch.setattr(cli, "int", lambda value: 0, raising=False)
    cli.main(["pretrain", "folder", "--data", "x", *words])
    cli.main(["finetune", "random:vit_tiny_patch16_224", "--data", "x", *words])
    assert [config.follow_images for config in asked] == [expected, expected]
    for config in asked:
        found = chosen(config, 300)[0] if expected else config
        if "--lr" in words:
            assert found.lr == float(words[words.index("--lr") + 1])
        elif expected == ("batch_size",):
            assert found.lr is None


@pytest.mark.parametrize("lr", [None, 3e-4])
def test_a_batch_that_is_too_large_is_refused_with_one_that_fits_and_its_rate(lr: float | None) -> None:
    config = PretrainConfig(data="x", batch_size=64, blr=5e-4, lr=lr)
    with pytest.raises(UserError) as caught:
        chosen(config, 30)
    said = str(caught.value)
    assert "--batch-size 64 is larger than the 30 training images: lower it, such as to --batch-size 8" in said
    assert ("--batch-size 8 --lr 0.0005 (blr x batch / 256 would be 1.6e-05" in said) is (lr is None)


# ---- whole runs ----


def test_a_small_folder_gets_a_small_batch_which_a_resume_keeps(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen, said, and kept in config.json, where resume reads it; the whole run's images are told after a resume."""
    tiny_runs.without_pictures(monkeypatch)
    words = ["pretrain", "folder", "--data", str(images), *FOLDER, "--epochs", "2"]
    assert tiny_runs.run(words, tmp_path / "alone") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch-size 8 --lr 0.0005 for 80 images, as no flag says them: 64 would make 1 step an epoch" in said
    assert "only 20 optimiser steps in all" in said and "--epochs 100 makes 1,000" in said
    assert "images seen 160 in" in said
    values = held(tmp_path / "alone")
    assert (values["batch_size"], values["lr"], values["follow_images"]) == (8, 5e-4, [])
    watch = pretrain.watch

    def stop(job: Any, *rest: Any) -> bool:
        if job.position.step == 5:
            job.stop.number = 15
        return watch(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "watch", stop)
        assert tiny_runs.run(words, tmp_path / "run") == 143
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "as no flag says" not in said and "optimiser steps in all" not in said
    assert "images seen 160, the last 120 of them in" in said
    tiny_runs.assert_same_run(tmp_path / "alone", tmp_path / "run")
    again = ["pretrain", str(tmp_path / "alone" / "config.json"), "--epochs", "1"]
    assert tiny_runs.run(again, tmp_path / "again") == 0
    assert (held(tmp_path / "again")["batch_size"], held(tmp_path / "again")["lr"]) == (8, 5e-4)


def test_panels_of_parts_of_an_epoch_have_names_of_their_own_and_tell_the_skill(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[tuple[str, str]] = []
    monkeypatch.setattr(pretrain, "draw", lambda rows, path, *, title, note: titles.append((path.name, title)))
    monkeypatch.setattr(pretrain, "draw_curves", lambda *_, **__: None)
    words = ["pretrain", "folder", "--data", str(images), *FOLDER, "--steps", "12", "--eval-every", "1"]
    assert tiny_runs.run(words, tmp_path / "run", "--panel-every", "0.5") == 0
    assert [name for name, _ in titles] == ["epoch-0000_step-00000005.png", "epoch-0001.png",
                                            "epoch-0001_step-00000012.png"]  # fmt: skip
    assert [name for name, _ in titles] == sorted(name for name, _ in titles)
    skills = [line["skill"] for line in tiny_runs.metrics(tmp_path / "run") if line["kind"] == "heldout"]
    assert titles[0][1].endswith("after 0.5 epochs"), "no skill was measured there"
    assert titles[1][1].endswith(f"after 1 epochs, skill {skills[1]:.3f}")
    assert titles[2][1].endswith(f"after 1.2 epochs, skill {skills[2]:.3f}")


def test_fine_tuning_few_images_takes_a_small_batch_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,409 digits x 0.1: batch 8 of which mixup makes pairs, at the rate of 128."""
    source = tiny_classes.write_encoder(tmp_path / "source")
    words = ["finetune", str(source), *"--data digits --train-share 0.1 --steps 6 --warmup-steps 1".split()]
    words += "--log-every 1 --device cpu --precision fp32 --compile off --workers 0 --auto-augment none".split()
    assert tiny_runs.run(words, tmp_path / "alone") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch-size 8 --lr 0.0005 for 141 images, as no flag says them: 1,024 would make no steps" in said
    assert "chosen on 29 held-out images" in said
    values = held(tmp_path / "alone")
    assert (values["batch_size"], values["lr"], values["follow_images"]) == (8, 5e-4, [])
    real, steps = finetune.set_scaled_rate, [0]

    def interrupt(*arguments: Any) -> None:
        steps[0] += 1
        if steps[0] == 4:
            job_stop[0].number = 15
        real(*arguments)

    job_stop: list[Any] = []
    prepare = finetune.prepare

    def keep(config: Any, out: Any, console: Any, stop: Any, resumed: bool) -> Any:
        job_stop[:] = [stop]
        return prepare(config, out, console, stop, resumed)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "set_scaled_rate", interrupt)
        patch.setattr(finetune, "prepare", keep)
        assert tiny_runs.run(words, tmp_path / "run") == 143
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert "images seen 48, the last 24 of them in" in " ".join(capsys.readouterr().out.split())
    tiny_runs.assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_plan_chooses_as_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "folder", "--images", "240", *FOLDER, "--dry-steps", "2", "--epochs", "10"]
    assert cli.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "290 steps = 10 epochs x 29 steps" in said
    assert "only 290 optimiser steps in all" in said and "--epochs 35 makes 1,000" in said
    assert "--batch-size 8 --lr 0.0005" in said.partition("next: ")[2]
    assert "follow" not in said


# ---- what is said ----


def test_short_runs_are_told_with_the_flags_that_make_them_longer() -> None:
    config = PretrainConfig(data="x", batch_size=64, epochs=60, blr=5e-4)
    (line,) = few_steps(config, 240, 4, world=1)
    assert line.startswith("only 240 optimiser steps in all")
    assert "--epochs 250 makes 1,000; --batch-size 8 --lr 0.0005 makes 1,920" in line
    assert few_steps(config, 1000, 4, world=1) == []
    config = PretrainConfig(data="x", batch_size=64, epochs=None, steps=1)
    (line,) = few_steps(config, 1, 4, world=1)
    assert line.startswith("only 1 optimiser step in all") and line.endswith("--steps 1000 makes 1,000")
    photos = recipes.get("photos")
    assert few_steps(photos, 658, 94, world=1) == [], "tuned to be so short"


def test_a_skill_near_zero_is_called_so() -> None:
    config = PretrainConfig(data="x", batch_size=64, blr=5e-4)
    assert low_skill(config, 0.05, 240, 4, 1e-4, 1) == {}
    said = low_skill(config, 0.049, 240, 4, 1.25e-4, 1)["that is"]
    assert "hardly better than interpolation (below 0.05)" in said
    assert "--epochs; this one made 240 steps" in said and "--batch-size 8 --lr 0.0005" in said
    said = low_skill(config, -0.1, 240, 400, 1.25e-4, 1)["that is"]
    assert "no better than" in said and "--lr 0.0005; this one's peak was 0.000125" in said
    assert "--lr" not in low_skill(config, 0.0, 240, 400, 1e-3, 1)["that is"]


@pytest.mark.parametrize(("world", "accum", "batch_size"), [(1, 1, 8), (2, 1, 8), (3, 1, 6), (4, 4, 16), (3, 4, 12)])
def test_a_batch_that_is_named_is_one_that_all_processes_can_share(world: int, accum: int, batch_size: int) -> None:
    """--batch-size counts the images of all processes: of three, 8 would be refused."""
    config = PretrainConfig(data="x", batch_size=48, epochs=60, blr=5e-4, accum=accum)
    (line,) = few_steps(config, 300, 5, world)
    assert f"--batch-size {batch_size} --lr 0.0005 makes {60 * (240 // batch_size):,}" in line
    assert f"--batch-size {batch_size} --lr 0.0005" in low_skill(config, 0.0, 300, 5, 1e-4, world)["that is"]


def test_a_choice_by_few_images_is_called_noisy() -> None:
    """1 / sqrt(25) = 20 points."""
    (line,) = few_heldout("best", 25)
    assert "25 held-out images" in line and "+- 20 points" in line
    assert few_heldout("last", 25) == few_heldout("best", 100) == []


def test_classes_that_the_choice_does_not_see_are_named() -> None:
    train, heldout, names = np.array([0, 0, 1, 2, 2]), np.array([0, 0, 2]), ("dent", "crack", "fine")
    (line,) = missed_classes("best", train, heldout, names)
    assert "no held-out image is of crack: " in line
    assert missed_classes("last", train, heldout, names) == missed_classes("best", train, np.arange(3), names) == []
    (line,) = missed_classes("best", np.arange(8), heldout[:1], [f"class {k}" for k in range(8)])
    assert "class 1, class 2, class 3, class 4, class 5 and 2 more" in line


def test_images_seen_are_those_of_the_whole_run() -> None:
    assert images_seen(160, 160, "3 s") == "160 in 3 s"
    assert images_seen(160, 40, "3 s") == "160, the last 40 of them in 3 s"


def test_a_demo_of_any_length_can_begin(tmp_path: Path) -> None:
    """The warm-up keeps its share of a run that is shorter than it; a length of 0 is refused, not replaced."""
    found = demo.pretraining(DemoConfig(epochs=0.2), tmp_path)
    assert found.epochs == 0.2 and found.warmup_epochs == pytest.approx(0.02)
    assert found.problems() == []
    assert demo.pretraining(DemoConfig(), tmp_path) == dataclasses.replace(recipes.get("photos"), out=str(tmp_path))
    assert demo.pretraining(DemoConfig(epochs=0), tmp_path).problems() == ["--epochs 0: must be above 0"]
