"""A fine-tuned classifier for other tools: called as their users call them, they give our logits and class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_config
from safetensors import safe_open

from maekit import cli
from maekit.models.classifier import Classifier
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.store import load
from maekit.weights.written import write_weights

CLASSES = ("cat", "dog", "eel")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
POOLS = pytest.mark.parametrize("pool", ["mean", "cls"])
close = torch.testing.assert_close


def write(folder: Path, pool: Any, **changes: Any) -> tuple[str, Classifier]:
    """A classifier all of whose numbers are far from their first values."""
    torch.manual_seed(0)
    model = Classifier(tiny_config(**{"img_size": (16,), **changes}), CLASSES, MEAN, STD, pool)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    passport = Passport(
        model=model.config, mean=MEAN, std=STD, grid=model.grid_hw, kind="classifier", classes=CLASSES,
        head=HeadFacts(kind="linear", pool=pool), crop_pct=0.875,
    )  # fmt: skip
    path = folder / "weights.safetensors"
    write_weights(path, model, passport)
    return str(path), model.eval()


def convert(weights: str, to: str, out: Path, *more: str) -> int:
    return cli.main(["convert", weights, "--to", to, "--out", str(out), *more])


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
@POOLS
def test_timm(tmp_path: Path, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights, ours = write(tmp_path, pool, reg_tokens=2)
    out = tmp_path / "out"
    assert convert(weights, "timm", out) == 0
    assert "the classifier of 3 classes" in capsys.readouterr().out
    theirs: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    expected = ours(ours.normalize(images()))
    assert expected.std() > 0.1
    close(theirs(ours.normalize(images())), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, list(CLASSES))
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    assert "pipeline_tag: image-classification" in (out / "README.md").read_text()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)


@torch.no_grad()
def test_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Theirs reads the class token; a classifier that pools by the mean has no place there, which is said."""
    transformers: Any = pytest.importorskip("transformers")
    weights, ours = write(tmp_path, "cls")
    assert convert(weights, "hf", tmp_path / "out") == 0
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    close(theirs(ours.normalize(images())).logits, ours(ours.normalize(images())), rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id["eel"] == 2
    weights, _ = write(tmp_path, "mean")
    assert convert(weights, "hf", tmp_path / "mean") == 2
    assert "ViTForImageClassification cannot hold this model: pooling by the mean" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


@torch.no_grad()
@POOLS
def test_official(tmp_path: Path, pool: str) -> None:
    """Named as the released fine-tuned weights, which are read by timm's names."""
    weights, ours = write(tmp_path, pool)
    assert convert(weights, "official", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out" / "mae_finetuned.pth", weights_only=True)["model"]
    assert ("fc_norm.weight" in state, "norm.weight" in state) == (pool == "mean", pool == "cls")
    config = ours.config
    theirs: Any = timm.create_model(
        config.model, num_classes=3, global_pool={"mean": "avg", "cls": "token"}[pool], img_size=16,
        patch_size=config.patch_size, embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads,
    ).eval()  # fmt: skip
    theirs.load_state_dict(state, strict=True)
    close(theirs(ours.normalize(images())), ours(ours.normalize(images())), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@POOLS
def test_torch_export(tmp_path: Path, pool: str) -> None:
    weights, ours = write(tmp_path, pool)
    assert convert(weights, "torch-export", tmp_path / "out") == 0
    told = {"maekit.json": ""}
    run: Any = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=told).module()
    for count in (1, 5):
        close(run(images(count)), ours(ours.normalize(images(count))), rtol=1e-5, atol=1e-5)
    assert json.loads(told["maekit.json"])["pool"] == pool


@torch.no_grad()
def test_onnx(tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    onnx: Any = pytest.importorskip("onnx")
    weights, ours = write(tmp_path, "mean")
    assert convert(weights, "onnx", tmp_path / "out") == 0
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    found = torch.from_numpy(np.asarray(session.run(["logits"], {"images": images(3).numpy()})[0]))
    close(found, ours(ours.normalize(images(3))), rtol=1e-4, atol=1e-5)
    props = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(props["classes"]) == list(CLASSES)


@torch.no_grad()
def test_the_encoder_alone(tmp_path: Path) -> None:
    weights, _ = write(tmp_path, "cls")
    assert convert(weights, "timm", tmp_path / "out", "--encoder-only") == 0
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    encoder = load(weights, encoder_only=True)
    assert theirs.num_classes == 0
    close(theirs(encoder.normalize(images())), encoder.encode(encoder.normalize(images())), rtol=1e-5, atol=1e-5)


def test_other_logits_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that arrives otherwise is found by its logits."""
    weights, _ = write(tmp_path, "mean")
    from maekit.tasks import convert as task

    kept = task.to_timm

    def shifted(*arguments: Any) -> dict[str, torch.Tensor]:
        state = kept(*arguments)
        return {**state, "head.bias": state["head.bias"] + 1e-3}

    monkeypatch.setattr(task, "to_timm", shifted)
    assert convert(weights, "timm", tmp_path / "out") == 2
    assert "logits differ by 1.0e-03" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
