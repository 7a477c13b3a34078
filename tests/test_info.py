"""`maekit info`: what a file is, can do and needs; and the other commands that read any source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import weight_files as files
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_fuzz import changed, refused, values

from maekit import cli
from maekit.config import SourceConfig, UserError
from maekit.weights.files import Raw
from maekit.weights.foreign import Hints, identify
from maekit.weights.report import KeyReport, grouped
from maekit.weights.sources import _hints
from maekit.weights.store import random_model


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = run(capsys, "info", *words, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def write_run(folder: Path) -> Path:
    """A run's weights with a full passport."""
    mae = random_model(tiny_config())
    passport = dataclasses.replace(
        mae.passport, steps=300, epochs=12.5, data="leaves", fingerprint="ab" * 32, recipe="folder"
    )
    folder.mkdir()
    save_file(mae.state_dict(), folder / "model.safetensors", metadata=passport.to_metadata())
    return folder


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the passport, and no model is built for it."""
    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("maekit.models.mae.MaskedAutoencoder.__init__", lambda *_: pytest.fail("a model was built"))
    found = facts(capsys, str(folder))
    expected = {
        "kind": "mae", "layout": "maekit", "grid": [4, 6], "target": "norm-pixels", "mask_ratio": 0.75, "epochs": 12.5,
        "steps": 300, "data": "leaves", "fingerprint": "ab" * 32, "recipe": "folder", "needs": [], "cannot": [],
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    # Counted by hand: two blocks of 12 d^2 + 13 d; norm 2 d; token d; positions 25 d; patches 48 d + d.
    encoder = 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + 32 + 25 * 32 + 49 * 32
    decoder = 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 16 + 25 * 16 + (32 * 16 + 16) + (16 * 48 + 48)
    assert found["parameters"] == {"encoder": encoder, "decoder": decoder}
    assert found["next"] == f"maekit reconstruct {folder} --image photo.jpg"
    code, out, _ = run(capsys, "info", str(folder))
    assert code == 0
    for words in ("4 heads", "16 x 24 px", "12.5 epochs", "300 steps", "on leaves", "abababababab", "norm-pixels"):
        assert words in out, (words, out)
    assert "warning" not in out


def test_an_official_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files.save_pth(files.official_encoder(), tmp_path / "mae_pretrain_vit_base.pth")
    code, out, _ = run(
        capsys, "info", str(path), "--num-heads", "4", "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1"
    )
    assert code == 0
    for words in (
        "pretrained encoder",
        "none that is trained",
        "1600 epochs",
        "CC-BY-NC",
        "non-commercial",
        "reconstruct: ",
    ):
        assert words in out, (words, out)
    assert f"next: maekit probe {path} --num-heads 4 --mean 0.5 0.5 0.5 --std 1.0 1.0 1.0 --data FOLDER" in out


def test_a_file_that_does_not_say_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing is asked for, with the command that says it; what is known is told."""
    path = files.save_pth(files.lightly(files.official_full()), tmp_path / "mine.ckpt")
    found = facts(capsys, str(path))
    assert found["layout"] == "lightly"
    assert found["model"]["num_heads"] is None
    assert found["target"] is None
    assert [need.split()[0] for need in found["needs"]] == ["--num-heads", "--decoder-heads", "--target", "--mean"]
    assert found["next"].startswith(
        f"maekit reconstruct {path} --num-heads N --decoder-heads N --target TARGET --mean "
    )
    code, out, _ = run(capsys, "info", str(path))
    assert (code, "heads unknown" in out, "target unknown" in out) == (0, True, True)


def test_an_untrained_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "random:mae_vit_base_patch16")
    assert found["parameters"] == {"encoder": 85_798_656, "decoder": 26_109_184}  # as the official model counts
    assert not found["can"]["reconstruct"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"words", "not a readable safetensors file"), ("a.pth", b"words", "looks like a pickle"),
        ("a.safetensors", b"", "not a readable safetensors file"),
        ("a.png", b"\x89PNG\r\n\x1a\n" * 9, "not a readable"),
        (None, b"", "no such run or file"),
    ],
)  # fmt: skip
def test_wrong_files_give_one_line(
    name: str | None, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / (name or "nothing")
    if name:
        path.write_bytes(content)
    code, out, error = run(capsys, "info", str(path))
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert words in error


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "info")[0] == 2
    assert run(capsys, "info", "a", "b")[0] == 2
    code, _, error = run(capsys, "info", str(tmp_path))
    assert (code, "not a run" in error) == (2, True)
    assert "info SRC" in cli.HELP


# ---- the commands that read any source ----


def test_reconstruct_refuses_an_encoder_and_takes_a_whole_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20), (200, 30, 60)).save(tmp_path / "i.png")
    files.save_pth(files.official_encoder(), tmp_path / "e.pth")
    said = ["--num-heads", "4", "--image", str(tmp_path / "i.png"), "--out", str(tmp_path / "p.png"), "--device", "cpu"]
    words = [*said, "--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    code, _, error = run(capsys, "reconstruct", str(tmp_path / "e.pth"), *words)
    assert code == 2
    assert "its decoder is not trained, so it cannot reconstruct" in error
    assert not (tmp_path / "p.png").exists()
    path = str(files.save_pth(files.official_full(), tmp_path / "mae_visualize_vit_base.pth"))
    code, out, error = run(capsys, "reconstruct", path, *said, "--decoder-heads", "2", "--img-size", "24", "32")
    assert (code, error) == (0, "")
    assert "official layout: 62 tensors loaded, 32 renamed, 1 resized" in " ".join(out.split())
    assert "positions 4 x 4 -> 6 x 8 (bicubic)" in " ".join(out.split())
    assert (tmp_path / "p.png").exists()
    code, _, error = run(capsys, "reconstruct", path, "--image", str(tmp_path / "i.png"))
    assert code == 2
    assert "give --num-heads N" in error
    assert "give --decoder-heads N" in error


# ---- reports ----


def test_reports_are_short_and_name_everything() -> None:
    report = KeyReport(
        "x.pth", "timm", loaded=["a"] * 30, missing=[f"decoder.blocks.{i}.norm1.weight" for i in range(8)]
    )
    report.unused, report.notes = ["head.weight"], ["a note"]
    first, second = report.summary()
    assert first == "timm layout: 30 tensors loaded, 8 missing, 1 unused"
    assert second == "initial values in decoder.blocks.*.norm1.weight (8); not used: head.weight; a note"
    assert "missing   8: decoder.blocks.*.norm1.weight (8)" in str(report)
    report.missing = ["decoder.mask_token", "decoder.norm.weight"]
    report.unused = [f"decoder.blocks.0.{kind}.weight" for kind in range(9)] + [f"head.{i}" for i in "abcd"]
    report.unused += [f"neck{i}.x" for i in range(3)]
    assert report.summary()[1].startswith(
        "the decoder holds initial values; not used: decoder.* (9), head.* (4), neck0.*"
    )
    many = [f"a{i}.b.c" for i in range(20)]
    assert grouped(many).endswith("and 14 more")
    assert KeyReport("m", "maekit").remarks() == []


# ---- configs from elsewhere ----

CONFIG = {
    "model_type": "vit_mae", "image_size": 16, "patch_size": 4, "num_attention_heads": 4, "layer_norm_eps": 1e-6,
    "decoder_num_attention_heads": 2, "norm_pix_loss": True, "mask_ratio": 0.75, "hidden_act": "gelu", "qkv_bias": True,
}  # fmt: skip
STATE = files.hf4(files.official_full())


TIMM = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3}, "model_args": {"num_heads": 4}}


@settings(max_examples=60, deadline=None, database=None)
@example(CONFIG | {"layer_norm_eps": 10**400}, [10**400])
@example(CONFIG | {"image_size": 10**400, "hidden_act": "x" * 20_000}, None)
@example(TIMM | {"architecture": "x" * 20_000}, None)
@example(TIMM | {"model_args": {"num_heads": 10**400}, "pretrained_cfg": {"license": "\x1b"}}, None)
@given(st.one_of(changed(CONFIG), changed(TIMM)), st.one_of(st.none(), values))
def test_a_config_beside_the_weights_may_say_anything(config: dict[str, Any], beside: Any) -> None:
    """One clear error or a consistent answer; never a traceback."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        files.write_json(folder / "config.json", config)
        if beside is not None:
            files.write_json(folder / "preprocessor_config.json", {"image_mean": beside, "image_std": beside})
        try:
            found = identify(Raw(dict(STATE)), "x", "x", SourceConfig(), _hints(folder))
        except UserError as error:
            refused(error)
        else:
            assert isinstance(found.needs, list)
            assert found.passport.model.embed_dim == 32


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(sorted(STATE)), st.lists(st.integers(0, 40), max_size=4), st.booleans())
def test_tensors_may_have_any_shape(name: str, shape: list[int], lost: bool) -> None:
    """Any one tensor of any shape or gone: an error, or sizes that are those of the tensors."""
    state = dict(STATE)
    if lost:
        del state[name]
    else:
        state[name] = torch.zeros(shape)
    try:
        found = identify(Raw(state), "x", "x", SourceConfig(**files.SAID), Hints())
    except UserError as error:
        refused(error)
    else:
        assert found.passport.model.depth
