"""Files that lack something, contradict what is said, or want to do more than be read: one clear error."""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_files as files
from conftest import tiny_config
from safetensors.torch import save_file
from weight_files import assert_close, said_for

import maekit
from maekit.config import UserError
from maekit.weights.store import load, random_model

# ---- what is missing or does not fit ----


@pytest.mark.parametrize(
    "lost",
    ["blocks.1.attn.qkv.bias", "decoder_pred.weight", "norm.weight", "cls_token", "pos_embed", "decoder_embed.weight"],
)
def test_missing_tensors_are_an_error(lost: str, tmp_path: Path) -> None:
    state = files.official_full()
    del state[lost]
    with pytest.raises(UserError) as caught:
        load(files.save_pth(state, tmp_path / "a.pth"), **said_for("official"))
    assert (
        "missing" in str(caught.value) or "position embedding" in str(caught.value) or "positions" in str(caught.value)
    )


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("blocks.1.ls1.gamma", (32,), "unknown to a plain vision transformer"),
        ("blocks.7.norm1.weight", (32,), "gaps"),
        ("blocks.0.mlp.fc2.weight", (32, 64), "has shape"), ("patch_embed.proj.weight", (32, 48), "no square conv"),
        ("pos_embed", (1, 16, 32), None), ("pos_embed", (1, 20, 32), "--grid"),
        ("pos_embed", (17, 32), "position embedding"),
        ("cls_token", (1, 1, 8), "cls_token has shape"), ("norm.weight", (), "has shape"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(key: str, shape: tuple[int, ...], words: str | None, tmp_path: Path) -> None:
    state = files.official_encoder() | {key: torch.ones(shape)}
    path = files.save_pth(state, tmp_path / "a.pth")
    if words is None:  # positions of the patches alone
        mae = load(path, **files.ENCODER_SAID)
        table = mae.state_dict()["encoder.pos_embed"]
        assert not table[:, :1].any()
        assert (table[:, 1:] == 1).all()
        return
    with pytest.raises(UserError, match=words):
        load(path, **files.ENCODER_SAID)


def test_a_grid_that_is_no_square_must_be_said(tmp_path: Path) -> None:
    state = files.official_encoder()
    state["pos_embed"] = torch.randn(1, 1 + 3 * 8, 32)
    path = files.save_pth(state, tmp_path / "a.pth")
    assert load(path, **files.ENCODER_SAID).grid_hw == (5, 5)  # 24 is no square, but 25 is: patches alone
    state["pos_embed"] = torch.randn(1, 1 + 2 * 9, 32)
    files.save_pth(state, path)
    with pytest.raises(UserError, match="--grid HEIGHT WIDTH"):
        load(path, **files.ENCODER_SAID)
    assert load(path, grid=(2, 9), **files.ENCODER_SAID).config.size_hw == (8, 36)
    with pytest.raises(UserError, match="4 x 4 does not fit"):
        load(path, grid=(4, 4), **files.ENCODER_SAID)


def test_half_precision_becomes_float32_and_integers_are_refused(tmp_path: Path) -> None:
    state = {key: value.to(torch.bfloat16) for key, value in files.official_encoder().items()}
    mae = load(files.save_pth(state, tmp_path / "a.pth"), **files.ENCODER_SAID)
    assert mae.encoder.norm.weight.dtype == torch.float32
    assert "bfloat16 became float32" in str(mae.key_report)
    assert mae.config.pos_embed == "sincos"
    state["norm.weight"] = torch.ones(32, dtype=torch.int64)
    with pytest.raises(UserError, match="no floating-point"):
        load(files.save_pth(state, tmp_path / "a.pth"), **files.ENCODER_SAID)


def test_positions_that_are_all_zero_are_noticed(tmp_path: Path) -> None:
    """What transformers pretrains from scratch: no positions at all."""
    state = files.official_encoder()
    state["pos_embed"] = torch.zeros(1, 17, 32)
    mae = load(files.save_pth(state, tmp_path / "a.pth"), **files.ENCODER_SAID)
    assert "all its positions are zero" in str(mae.key_report)


def test_a_passport_knows_all_and_is_not_contradicted(tmp_path: Path) -> None:
    mae = random_model(tiny_config())
    save_file(mae.state_dict(), tmp_path / "m.safetensors", metadata=mae.passport.to_metadata())
    for said in ({"num_heads": 8}, {"target": "pixels"}, {"mean": (0.1,) * 3}, {"decoder_heads": 4}, {"grid": (6, 4)}):
        with pytest.raises(UserError, match=r"the passport of .* says"):
            load(tmp_path / "m.safetensors", **said)
    same = load(tmp_path / "m.safetensors", num_heads=4, target="norm-pixels", grid=(4, 6))
    assert same.passport == mae.passport
    assert not same.key_report.missing
    alone = load(tmp_path / "m.safetensors", encoder_only=True)
    assert alone.passport.kind == "encoder"
    norm = "encoder.norm.weight"
    assert torch.equal(alone.state_dict()[norm], mae.state_dict()[norm])
    state = {name: value for name, value in alone.state_dict().items() if name.startswith("encoder.")}
    save_file(state, tmp_path / "e.safetensors", metadata=alone.passport.to_metadata())  # an encoder by itself
    again = load(tmp_path / "e.safetensors")
    assert_close(again.encode(torch.ones(1, 3, 16, 24)), mae.encode(torch.ones(1, 3, 16, 24)))
    assert set(again.key_report.missing) == {name for name in again.state_dict() if name.startswith("decoder.")}


def test_the_public_load_takes_them_all(tmp_path: Path) -> None:
    path = files.save_pth(files.mmpretrain(files.official_full()), tmp_path / "epoch_300.pth")
    mae = maekit.load(path, "cpu", img_size=32, **files.SAID)
    assert mae.passport.grid == (8, 8)
    assert mae.passport.origin == "mmpretrain: epoch_300.pth"
    assert not mae.training


# ---- files that want to do more than be read ----


def test_namespaces_are_inert(tmp_path: Path) -> None:
    """A Namespace may carry anything that the unpickler lets pass; only plain values are read from it."""
    arguments = {"norm_pix_loss": "yes", "epoch": 10**300, "mask_ratio": float("nan"), "__class__": "x", "model": 3}
    namespace = argparse.Namespace()
    namespace.__dict__.update(arguments)
    path = tmp_path / "a.pth"
    torch.save({"model": files.official_full(), "args": namespace}, path)
    mae = load(path, **said_for("official"))
    assert (mae.config.mask_ratio, mae.passport.epochs) == (0.75, 0.0)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["beside", "inside", "arguments"])
def test_a_good_file_with_code_in_it_is_refused(where: str, tmp_path: Path) -> None:
    evil: Any = Evil(tmp_path / "executed")
    state: Any = files.official_full()
    beside: dict[str, Any] = {}
    if where == "inside":
        state["blocks.0.norm1.weight"] = evil
    else:
        beside = {"optimizer": evil} if where == "beside" else {"args": {"lr": evil}}
    path = files.save_pth(state, tmp_path / "mae_visualize_vit_base.pth", **beside)
    with pytest.raises(UserError, match=r"more than weights in it \(posix.mkdir\).*not loaded"):
        load(path, **said_for("official"))
    assert not (tmp_path / "executed").exists()


def test_tensors_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    for claimed in (torch.zeros(1).expand(32, 10**9), torch.zeros(4).as_strided((10**5, 10**5), (0, 0))):
        state = files.official_encoder() | {"head.weight": claimed}
        with pytest.raises(UserError, match="more than the file holds"):
            load(files.save_pth(state, tmp_path / "a.pth"), **files.ENCODER_SAID)
    shared = torch.zeros(1 << 18)
    state = files.official_encoder() | {f"head.{index}": shared.view(512, 512) for index in range(30)}
    with pytest.raises(UserError, match="far more than the file holds"):
        load(files.save_pth(state, tmp_path / "a.pth"), **files.ENCODER_SAID)
    sparse = files.official_encoder() | {"head.weight": torch.eye(3).to_sparse()}
    with pytest.raises(UserError, match="no dense tensor"):
        load(files.save_pth(sparse, tmp_path / "a.pth"), **files.ENCODER_SAID)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([1, 2], "holds a list"), ({"model": {}}, "no weights"), ({"epoch": 3}, "no weights"),
        ({"a.weight": torch.zeros(3)}, "keys of no known layout"), ({"a\x1bb": torch.zeros(3)}, "not printable"),
    ]  # fmt: skip
    for content, words in cases:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match=words):
            load(tmp_path / "a.pth")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = files.save_pth(files.official_encoder(), tmp_path / "a.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="compressed"):
        load(tmp_path / "b.pth", **files.ENCODER_SAID)


def test_old_archives_of_torch_are_read(tmp_path: Path) -> None:
    """torch.save's form before 1.6: a bare pickle followed by storages."""
    state = files.official_encoder()
    torch.save({"model": state}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    mae = load(tmp_path / "a.pth", **files.ENCODER_SAID)
    assert torch.equal(mae.state_dict()["encoder.norm.weight"], state["norm.weight"])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_files_are_refused(share: float, tmp_path: Path) -> None:
    data = files.save_pth(files.official_encoder(), tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="looks like a pickle"):
        load(tmp_path / "a.pth", **files.ENCODER_SAID)


def test_a_loaded_model_does_not_live_in_the_file(tmp_path: Path) -> None:
    """The file may be replaced, and tensors that were one there are trained apart."""
    state = files.official_encoder()
    state["norm.weight"] = state["blocks.0.norm1.weight"]
    path = files.save_pth(state, tmp_path / "a.pth")
    mae = load(path, **files.ENCODER_SAID)
    before = path.read_bytes()
    weights = mae.state_dict()
    weights["encoder.norm.weight"].add_(1)
    assert not torch.equal(weights["encoder.norm.weight"], weights["encoder.blocks.0.norm1.weight"])
    assert path.read_bytes() == before
    path.write_bytes(b"")
    assert torch.equal(weights["encoder.blocks.0.norm1.weight"], state["norm.weight"])
