"""maekit convert: other tools compute the same with our weights, or nothing is written and the reason is named.

References: the tools themselves, called here as their users call them, and the released files' tensor counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import maekit
from maekit import cli
from maekit.config import ModelConfig
from maekit.data.transforms import apply_to_image, centre_crops
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import convert
from maekit.weights.card import hub_license
from maekit.weights.export import obstacles, timm_config, to_hf, to_official
from maekit.weights.store import random_model

SQUARE: dict[str, Any] = {"img_size": (16,), "target": "pixels"}
close = torch.testing.assert_close


def save(folder: Path, **changes: Any) -> tuple[str, MaskedAutoencoder]:
    """Random weights on disk, biases and norms included, so that none can be exchanged unseen."""
    channels = changes.get("in_chans", 3)
    model = random_model(tiny_config(**changes), (0.3, 0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25, 0.15)[:channels])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 and "norm" not in name:
                value.normal_(std=0.1)
            elif value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.1)
    model.passport.weights_license = "CC-BY-NC-4.0, from elsewhere"
    path = folder / "weights.safetensors"
    save_file(model.state_dict(), path, metadata=model.passport.to_metadata())
    return str(path), model


def pixels(model: MaskedAutoencoder, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, model.config.in_chans, *model.config.size_hw, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pool", "changes"),
    [
        ("mean", {"in_chans": 4, "reg_tokens": 2, "pos_embed": "learned"}),
        ("cls", {}),
        ("tokens", {"class_token": False, "mlp_ratio": 2.0}),
    ],
)
def test_timm(tmp_path: Path, pool: Any, changes: dict[str, Any]) -> None:
    weights, ours = save(tmp_path, **changes)
    out = tmp_path / "out"
    assert cli.main(["convert", weights, "--to", "timm", "--out", str(out), "--pool", pool]) == 0
    theirs: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = ours.normalize(pixels(ours))
    assert ours.encode(images, pool).std() > 0.1
    close(theirs(images), ours.encode(images, pool), rtol=1e-5, atol=1e-5)
    close(theirs.forward_features(images), ours.encode(images, "tokens"), rtol=1e-5, atol=1e-5)
    told = timm.data.resolve_model_data_config(theirs)
    close(torch.tensor(told["mean"]), ours.mean.flatten())
    assert told["input_size"] == (ours.config.in_chans, 16, 24)
    assert "license: cc-by-nc-4.0" in (out / "README.md").read_text()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata()["license"] == "CC-BY-NC-4.0, from elsewhere"


@torch.no_grad()
def test_what_is_printed_for_timm_gives_the_same_features_of_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every printed line runs as it stands, on a photograph that is not square."""
    weights, ours = save(tmp_path, **SQUARE)
    assert cli.main(["convert", weights, "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    code = printed[printed.index("import timm") :].replace(
        "# of a picture of 8 bits opened with Pillow: ", "features = "
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    names: dict[str, Any] = {"picture": Image.open(tmp_path / "photo.png")}
    exec(code, names)
    close(names["features"], ours.encode(maekit.read_images(tmp_path / "photo.png", ours)), rtol=0, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("target", ["pixels", "norm-pixels"])
def test_hugging_face(tmp_path: Path, target: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    weights, ours = save(tmp_path, **{**SQUARE, "target": target, "in_chans": 4})
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert cli.main(["convert", weights, "--to", "hf", "--out", str(out)]) == 0
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(out).eval()
    images, mine = ours.normalize(pixels(ours)), ours(ours.normalize(pixels(ours)), seed=3)
    noise = torch.zeros(2, 16).scatter(1, mine.ids_masked_BM, 1.0)
    expected = theirs(images, noise=noise)
    close(mine.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert theirs.config.norm_pix_loss == (target == "norm-pixels")
    told = transformers.ViTImageProcessor.from_pretrained(out)
    assert list(told.image_mean) == list(ours.passport.mean)


@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 1.0), ("bilinear", 0.8)])
def test_their_processor_cuts_as_we_do(tmp_path: Path, interpolation: Any, crop_pct: float) -> None:
    """A photograph that is not square: the same pixels as `embed` takes, from the processor beside the weights."""
    transformers: Any = pytest.importorskip("transformers")
    weights, ours = save(tmp_path, **SQUARE)
    ours.passport.interpolation, ours.passport.crop_pct = interpolation, crop_pct
    save_file(ours.state_dict(), weights, metadata=ours.passport.to_metadata())
    assert cli.main(["convert", weights, "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    told = timm_config(ours.passport, "mean")["pretrained_cfg"]
    assert (told["interpolation"], told["crop_pct"]) == (interpolation, crop_pct)
    assert maekit.load(tmp_path / "out").passport.crop_pct == crop_pct
    image_HWC = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    crops = centre_crops(np.array([[40, 90]], np.int64), (16, 16), interpolation, crop_pct)
    mine = ours.normalize(apply_to_image(image_HWC, crops, 0, (16, 16)))[0]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(Image.fromarray(image_HWC), return_tensors="pt")["pixel_values"][0]
    close(theirs, mine, rtol=0, atol=0.02)  # half a step of 8 bits


@torch.no_grad()
def test_hugging_face_encoder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned positions, which their MAE does not have, their plain ViT has."""
    transformers: Any = pytest.importorskip("transformers")
    weights, ours = save(tmp_path, **{**SQUARE, "pos_embed": "learned"})
    assert cli.main(["convert", weights, "--to", "hf", "--out", str(tmp_path / "out"), "--encoder-only"]) == 0
    assert "add_pooling_layer=False" in capsys.readouterr().out
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    images = ours.normalize(pixels(ours))
    close(theirs(images).last_hidden_state, ours.encode(images, "tokens"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("target", ["pixels", "norm-pixels"])
def test_official(tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back by a decoder that puts all tokens into image order; the encoder also by timm under its own name."""
    weights, ours = save(tmp_path, **{**SQUARE, "target": target})
    assert cli.main(["convert", weights, "--to", "official", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(f"same {what}" in said for what in ("tokens", "loss", "predictions"))
    held = torch.load(tmp_path / "out" / "mae_pretrain_full.pth", weights_only=True)
    assert held.keys() == {"model"}
    assert cli.main(["convert", weights, "--to", "official", "--out", str(tmp_path / "enc"), "--encoder-only"]) == 0
    inner = torch.load(tmp_path / "enc" / "mae_pretrain.pth", weights_only=True)["model"]
    theirs: Any = timm.create_model(
        "vit_base_patch16_224.mae", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0,
        mlp_ratio=ours.config.mlp_ratio,
    ).eval()  # fmt: skip
    theirs.load_state_dict(inner, strict=True)
    images = ours.normalize(pixels(ours))
    close(theirs(images), ours.encode(images, "cls"), rtol=1e-5, atol=1e-5)


def test_released_files_have_these_tensors() -> None:
    """ViT-B: 150 tensors of 85,798,656 numbers in the encoder, 254 of 111,907,840 in all (counted in the files)."""
    with torch.device("meta"):
        model = MaskedAutoencoder(ModelConfig(), [0.5] * 3, [0.5] * 3)
    full = to_official(model.state_dict(), model.config)
    inner = {name: value for name, value in full.items() if not name.startswith("decoder_") and name != "mask_token"}
    assert (len(inner), sum(value.numel() for value in inner.values())) == (150, 85_798_656)
    assert (len(full), sum(value.numel() for value in full.values())) == (254, 111_907_840)
    shapes = {"pos_embed": (1, 197, 768), "mask_token": (1, 1, 512), "decoder_pos_embed": (1, 197, 512),
              "decoder_blocks.7.attn.qkv.weight": (1536, 512), "decoder_pred.weight": (768, 512),
              "decoder_embed.bias": (512,), "norm.weight": (768,)}  # fmt: skip
    assert {name: tuple(full[name].shape) for name in shapes} == shapes
    theirs = to_hf(model.state_dict(), model.config)
    assert len(theirs) == 254 + 4 * (12 + 8)  # queries, keys and values apart
    assert "vit.encoder.layer.11.attention.attention.query.weight" in theirs
    assert "decoder.decoder_layers.7.output.dense.bias" in theirs


@torch.no_grad()
def test_onnx(tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    onnx: Any = pytest.importorskip("onnx")
    weights, ours = save(tmp_path, in_chans=4, reg_tokens=2)
    assert cli.main(["convert", weights, "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for count in (1, 5):
        images = pixels(ours, count)
        found = torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))
        close(found, ours.encode(ours.normalize(images), "mean"), rtol=1e-4, atol=1e-5)
    props = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert props["license"] == "CC-BY-NC-4.0, from elsewhere"
    assert json.loads(props["mean"]) == list(ours.passport.mean)


@torch.no_grad()
def test_torch_export(tmp_path: Path) -> None:
    weights, ours = save(tmp_path)
    assert cli.main(["convert", weights, "--to", "torch-export", "--out", str(tmp_path / "out"), "--pool", "cls"]) == 0
    run: Any = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for count in (1, 5):
        images = pixels(ours, count)
        close(run(images), ours.encode(ours.normalize(images), "cls"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "changes", "decoder", "word"),
    [
        ("hf", {}, True, "grid of 4 x 6"),
        ("hf", {**SQUARE, "reg_tokens": 2}, True, "2 register tokens"),
        ("hf", {**SQUARE, "class_token": False}, True, "no class token"),
        ("hf", {**SQUARE, "pos_embed": "learned"}, True, "learned positions"),
        ("hf", {**SQUARE, "model": "deit3_small_patch16_224"}, True, "layer scale (`blocks.0.ls1.gamma`)"),
        ("official", {**SQUARE, "in_chans": 4}, True, "4 channels"),
        ("official", {**SQUARE, "mlp_ratio": 2.0}, True, "--mlp-ratio 2"),
        ("official", {**SQUARE, "reg_tokens": 1, "class_token": False}, False, "1 register tokens"),
    ],
)
def test_what_a_target_cannot_hold_is_named(to: Any, changes: dict[str, Any], decoder: bool, word: str) -> None:
    model = random_model(tiny_config(**changes))
    found = obstacles(model, to, decoder)
    assert any(word in line for line in found), found
    assert not obstacles(model, "timm", decoder)
    assert not obstacles(random_model(tiny_config(**SQUARE)), to, decoder)


def test_activation_and_eps_are_looked_at() -> None:
    model = random_model(tiny_config(**SQUARE))
    encoder: Any = model.encoder
    encoder.blocks[0].mlp.act = torch.nn.GELU(approximate="tanh")
    encoder.norm.eps = 1e-5
    found = " ".join(obstacles(model, "hf", True))
    assert "approximate='tanh'" in found
    assert "eps [1e-06, 1e-05]" in found
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    assert any("eps [1e-05]" in line for line in obstacles(model, "hf", True)), "their decoder has the same one"
    assert not any("eps" in line for line in obstacles(model, "hf", False))


def test_a_refusal_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, _ = save(tmp_path)
    assert cli.main(["convert", weights, "--to", "official", "--out", str(tmp_path / "out")]) == 2
    assert "grid of 4 x 6" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_other_outputs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that arrive wrong: two blocks exchanged, and queries with keys."""
    weights, _ = save(tmp_path, **SQUARE)

    def exchanged(real: Callable[..., Any], one: str, other: str) -> Callable[..., Any]:
        def change(*arguments: Any) -> Any:
            swap = {one: other, other: one}
            state = real(*arguments)
            words = {name: next((word for word in swap if word in name), "") for name in state}
            return {
                name.replace(word, swap.get(word, "")) if word else name: state[name] for name, word in words.items()
            }

        return change

    monkeypatch.setattr(convert, "to_timm", exchanged(convert.to_timm, "blocks.0.", "blocks.1."))
    monkeypatch.setattr(convert, "to_official", exchanged(to_official, "decoder_blocks.0.", "decoder_blocks.1."))
    monkeypatch.setattr(convert, "to_hf", exchanged(to_hf, ".query.", ".key."))
    for to, word in (("timm", "tokens differ by"), ("official", "predictions differ by"), ("hf", "tokens differ by")):
        assert cli.main(["convert", weights, "--to", to, "--out", str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _ = save(tmp_path, class_token=False)
    words = ["convert", weights, "--to", "onnx", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert cli.main([*words, weights]) == 2
    assert "is a file" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "out"), "--pool", "cls"]) == 2
    assert "no class token" in capsys.readouterr().err
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    assert cli.main([*words, str(tmp_path / "out")]) == 2
    assert "pip install 'maekit[export]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("Apache 2.0", {"license": "apache-2.0"}),
        ("cc by-nc-sa 4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("unspecified: trained by the owner of the run", {"license": "unknown"}),
        ("", {"license": "unknown"}),
        ("Permitted to nobody", {"license": "other", "license_name": "permitted-to-nobody"}),
    ],
)
def test_licences_are_those_of_the_hub(text: str, expected: dict[str, str]) -> None:
    assert hub_license(text) == expected
