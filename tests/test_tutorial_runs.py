"""The Keras tutorial's recipes through every command: pretrain, stop and resume, look at, embed, refuse to convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same_run, run

import maekit
from maekit import cli
from maekit.config import FinetuneConfig, ModelConfig, ProbeConfig, UserError
from maekit.data.centres import read_centres
from maekit.data.loader import choose_training, split_heldout
from maekit.data.transforms import apply_to_image, centre_crops
from maekit.models.encoder import resolve
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import attend, predict, pretrain, reconstruct
from maekit.training import probe_choices
from maekit.training.finetuning import reading_config
from maekit.weights.export import obstacles
from maekit.weights.passport import Passport

TINY = (
    "--img-size 12 --resize-to 14 --embed-dim 8 --depth 2 --num-heads 2 --head-dim 6 --decoder-dim 4 --decoder-heads 2 "
    "--train-images 512 --batch-size 128 --probe-every 0 --panel-every 0 --log-every 1 --device cpu --precision fp32 "
    "--compile off"
).split()
WORDS = ["pretrain", "keras-6x2-m75", "--data", "digits", *TINY, "--steps", "4"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of the recipe."""
    out = tmp_path_factory.mktemp("tutorial") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(WORDS, out) == 0
    return out


# ---- a part of the images ----


def test_train_images_are_a_fixed_part_that_grows() -> None:
    train, heldout = split_heldout(5000, 0.02)
    few, more = choose_training(train, 100), choose_training(train, 1000)
    assert (len(few), len(more)) == (100, 1000)
    assert set(few) < set(more) < set(train)
    assert not set(more) & set(heldout)
    assert choose_training(train, None) is train
    assert few.tolist() != train[:100].tolist()
    with pytest.raises(UserError, match="--train-images 4901: only 4900"):
        choose_training(train, 4901)


def test_train_images_are_counted(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 of the 1,409 images: 4 steps of 128 are one epoch; more than there are: one line, exit code 2."""
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in records if line["kind"] == "step"] == [0.25, 0.5, 0.75, 1.0]
    assert cli.main([*WORDS, "--train-images", "1410", "--out", str(tmp_path / "run")]) == 2
    assert "--train-images 1410: only 1409" in capsys.readouterr().err


# ---- through the commands ----


def test_a_stopped_run_goes_on_bit_equal(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        real, left = pretrain.guarded_update, [2]

        def stop_then(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(pretrain, "guarded_update", stop_then)
        assert run([*WORDS, "--save-every", "0.25"], out) == 130
    assert cli.main(["resume", str(out)]) == 0
    assert_same_run(finished, out)


def test_every_command_takes_its_weights(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(image)
    assert cli.main(["reconstruct", str(finished), "--image", str(image), "--out", str(tmp_path / "panel.png")]) == 0
    assert (
        cli.main(["embed", str(finished), "--data", "digits", "--out", str(tmp_path / "f.npz"), "--workers", "0"]) == 0
    )
    assert np.load(tmp_path / "f.npz")["features"].shape == (1797, 8)
    assert cli.main(["attend", str(finished), "--image", str(image), "--out", str(tmp_path / "maps.png")]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(finished)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("2 heads of 6", "GELU after both layers", "flat, width 4, 2 blocks", "predicts pixels"):
        assert words in said, words
    for to in ("timm", "official"):
        assert cli.main(["convert", str(finished), "--to", to, "--out", str(tmp_path / to)]) == 2
        assert "cannot hold this model" in capsys.readouterr().err
    model = maekit.load(finished)
    assert [reason.split(": ")[1] for reason in obstacles(model, "timm", False)] == [
        "--head-dim 6, and its heads share the width among them",
        "GELU after both layers of the MLP, and it has one between them",
    ]
    assert not obstacles(model, "onnx", False)
    assert model.passport.model.decoder == "flat"
    assert float(model(torch.rand(2, 3, 12, 12)).pred_BMP.detach().min()) >= 0


def test_later_commands_resize_as_its_training_did(finished: Path, tmp_path: Path) -> None:
    """Bilinear, as the passport says: rows of `embed`, and what `probe`, `finetune` and `attend` read."""
    (tmp_path / "images").mkdir()
    image_HWC = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(image_HWC).save(tmp_path / "images" / "one.png")
    words = ["embed", str(finished), "--data", str(tmp_path / "images"), "--out", str(tmp_path / "f.npz")]
    assert cli.main([*words, "--workers", "0"]) == 0
    model = maekit.load(finished)
    assert model.passport.interpolation == "bilinear"

    def centre(interpolation: str) -> torch.Tensor:
        return apply_to_image(image_HWC, centre_crops(np.array([[20, 20]]), (12, 12), interpolation), 0, (12, 12))

    row = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    with torch.no_grad():
        torch.testing.assert_close(row, model.encode(model.normalize(centre("bilinear")[None])), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(row, model.encode(model.normalize(centre("bicubic")[None])), rtol=1e-3, atol=1e-3)
    (image,) = read_centres([str(tmp_path / "images" / "one.png")], model.config, model.passport.interpolation, 1.0)
    assert torch.equal(image, centre("bilinear") / 255)
    assert reading_config(FinetuneConfig(data="-"), model.passport).interpolation == "bilinear"
    assert model.passport.reading("-").size_hw == (12, 12)
    assert probe_choices.reading_config(ProbeConfig(data="-"), model.passport).interpolation == "bilinear"


def test_a_classifier_of_it_and_every_reader_resize_so_too(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fine-tuning writes says bilinear, and which share; `predict`, `attend` and `reconstruct` ask for it."""
    out = tmp_path / "classifier"
    tuning = [*"--data digits --preset light --steps 1 --warmup-steps 0 --batch-size 64 --workers 0".split()]
    assert cli.main(["finetune", str(finished), *tuning, "--crop-pct", "0.75", "--out", str(out)]) == 0
    assert (maekit.load(out).passport.interpolation, maekit.load(out).passport.crop_pct) == ("bilinear", 0.75)

    asked = []

    def spied(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            asked.append(arguments[-2:])
            return real(*arguments)

        return call

    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    for module, name in ((predict, "Centres"), (attend, "read_centres"), (reconstruct, "read_centres")):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    rows = ["--data", "digits", "--out", str(tmp_path / "p.csv"), "--workers", "0"]
    assert cli.main(["predict", str(out), *rows]) == 0
    assert cli.main(["attend", str(finished), "--image", str(image), "--out", str(tmp_path / "maps.png")]) == 0
    assert cli.main(["reconstruct", str(finished), "--image", str(image), "--out", str(tmp_path / "panel.png")]) == 0
    assert asked[-2:] == [("bilinear", 1.0)] * 2  # attend and reconstruct: of the run
    assert set(asked[:-2]) == {("bilinear", 0.75)}  # predict: of the classifier


def test_another_size_starts_the_decoder_anew(finished: Path) -> None:
    """Its weights belong to places of one grid: it is said to be missing, and the encoder's features are there."""
    model = maekit.load(finished, img_size=24)
    assert model.passport.kind == "encoder"
    assert {name.split(".")[0] for name in model.key_report.missing} == {"decoder"}
    assert model.encode(torch.rand(1, 3, 24, 24)).shape == (1, 8)
    assert maekit.load(finished).passport.kind == "mae"


def test_files_from_before_these_fields_are_read(tmp_path: Path) -> None:
    """A passport without the new fields means their defaults, which are what such a file has."""
    config = resolve(ModelConfig(model="vit_tiny_patch16_224", img_size=(8,), patch_size=4, embed_dim=8, depth=1,
                                 num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2))  # fmt: skip
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.2,) * 3)
    metadata = Passport(model=model.config, mean=(0.5,) * 3, std=(0.2,) * 3, grid=(2, 2)).to_metadata()
    passport = json.loads(metadata["maekit"])
    for name in ("head_dim", "mlp_act", "target_cut"):
        del passport["model"][name]
    del passport["interpolation"]
    save_file(model.state_dict(), tmp_path / "old.safetensors", metadata | {"maekit": json.dumps(passport)})
    loaded = maekit.load(tmp_path / "old.safetensors")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(images).loss, model(images).loss)


def test_the_passport_holds_what_the_tensors_cannot_tell(finished: Path, tmp_path: Path) -> None:
    """A wrong head width in it, or one that is absurd, is refused before anything is built of it."""
    file = finished / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    passport = json.loads(metadata["maekit"])
    assert (passport["model"]["head_dim"], passport["model"]["mlp_act"]) == (6, "both")
    for value, words in ((12, "expected"), (10**6, "at most"), (0, "above 0")):
        passport["model"]["head_dim"] = value
        save_file(load_file(file), tmp_path / "m.safetensors", metadata | {"maekit": json.dumps(passport)})
        with pytest.raises(UserError, match=words):
            maekit.load(tmp_path / "m.safetensors")
