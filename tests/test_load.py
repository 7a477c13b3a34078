"""Weights of other programs give here what they give there, and what their files do not say is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import weight_files as files
from safetensors.torch import save_file
from test_layouts import WRITERS, expected_of
from torch import Tensor
from weight_files import WHOLE, assert_close, said_for

from maekit.config import SourceConfig, UserError
from maekit.hub import offline_at_once
from maekit.models.encoder import sincos_positions
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks
from maekit.weights import facts
from maekit.weights.files import Raw
from maekit.weights.foreign import Hints, Material, identify
from maekit.weights.sources import gather
from maekit.weights.store import load, require_decoder

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- the same outputs as the programs that the files come from ----


def hugging_face(folder: Path, **changes: Any) -> Any:
    """A tiny ViTMAE of theirs with random weights everywhere, saved by themselves into the folder."""
    transformers = pytest.importorskip("transformers", reason="needs the [export] extra")
    torch.manual_seed(0)
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 16,
        "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64, "norm_pix_loss": True,
    }  # fmt: skip
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**(config | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    files.write_json(
        folder / "preprocessor_config.json",
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "resample": 2},
    )
    return model


def same_as_hugging_face(mae: MaskedAutoencoder, model: Any) -> None:
    """Loss, and the prediction of each hidden patch, with one mask given to them as noise."""
    masks = make_masks("random", (4, 4), mae.config.mask_ratio, range(2), seed=0)
    order = torch.cat([masks.ids_keep_BV, masks.ids_masked_BM], dim=1)
    noise = torch.zeros(order.shape).scatter(1, order, torch.arange(16.0).expand(order.shape))
    with torch.no_grad():
        expected, out = model(IMAGES, noise=noise), mae(IMAGES, masks.ids_keep_BV)
    assert_close(out.loss, expected.loss)
    assert out.pred_BMP.std() > 0.1
    assert_close(out.pred_BMP, torch.take_along_dim(expected.logits, out.ids_masked_BM.unsqueeze(-1), dim=1))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_folder_that_transformers_saved(norm_pix_loss: bool, tmp_path: Path) -> None:
    model = hugging_face(tmp_path, norm_pix_loss=norm_pix_loss, layer_norm_eps=1e-3, mask_ratio=0.5)
    mae = load(tmp_path)
    same_as_hugging_face(mae, model)
    assert mae.config.target == ("norm-pixels" if norm_pix_loss else "pixels")
    assert mae.config.mask_ratio == 0.5
    assert mae.passport.interpolation == "bilinear"  # resample 2, as Pillow counts
    assert (mae.config.num_heads, mae.config.decoder_heads) == (4, 2)
    assert mae.passport.eps == 1e-3
    assert mae.passport.mean == (0.5, 0.4, 0.3)
    assert mae.config.pos_embed == "learned"
    assert not mae.key_report.missing
    assert not mae.key_report.unused
    assert len(mae.key_report.loaded) == len(mae.state_dict())
    again = load(tmp_path / "model.safetensors")  # the file itself: its config lies beside it
    assert again.passport == mae.passport


@pytest.mark.parametrize("layout", ["hf", "hf5", "hf5-saved"])
def test_each_layout_of_hugging_face(layout: str, tmp_path: Path) -> None:
    """Their model in memory, its weights written under the names of each of their versions, as .bin too."""
    model = hugging_face(tmp_path)
    official = {name: torch.zeros(shape) for name, shape in (files.encoder_shapes() | files.decoder_shapes()).items()}
    theirs = model.state_dict()
    in_memory = dict(zip(files.hf5(official), WRITERS[layout](official), strict=True))
    assert set(in_memory) == set(theirs)
    state = {new: theirs[old] for old, new in in_memory.items()}
    (tmp_path / "model.safetensors").unlink()
    if layout == "hf5":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        files.save_safetensors(state, tmp_path / "model.safetensors")
    mae = load(tmp_path)
    assert mae.key_report.layout == layout
    same_as_hugging_face(mae, model)


def test_hugging_face_folders_that_differ_from_the_paper_are_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"hidden_act": "relu"}, "hidden_act 'relu'"), ({"model_type": "bert"}, "type 'bert'"),
        ({"num_attention_heads": "many"}, "no count"), ({"layer_norm_eps": 5}, "layer_norm_eps 5"),
        ({"num_attention_heads": 5}, "must divide the width"),
    ):  # fmt: skip
        files.write_json(tmp_path / "config.json", config | change)
        with pytest.raises(UserError, match=words):
            load(tmp_path)
    files.write_json(tmp_path / "config.json", config)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"--mean and --std \(3 values each\)"):
        load(tmp_path)
    assert load(tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3).passport.std == (0.5,) * 3
    with pytest.raises(UserError, match="--num-heads 8: this file says 4"):
        load(tmp_path, num_heads=8, mean=(0.5,) * 3, std=(0.5,) * 3)


TIMM = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # its final norm is then called fc_norm
    ("vit_medium_patch16_reg4_gap_256", {}),  # registers, no class token, positions of patches alone, LayerScale
    ("vit_base_patch16_siglip_224", {}),  # attention pooling
    ("vit_base_patch16_clip_224", {}),  # a norm before the blocks, no bias, epsilon 1e-5
]


def timm_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model: Any = timm.create_model(name, **(sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def timm_tokens(model: Any, images: Tensor) -> Tensor:
    """Their tokens after the final norm, wherever it stands."""
    with torch.no_grad():
        tokens: Tensor = model.fc_norm(model.forward_features(images))
    return tokens


@pytest.mark.parametrize(("name", "changes"), TIMM)
def test_a_folder_that_timm_would_read(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """timm's local-dir form: config.json with architecture and pretrained_cfg, weights beside it."""
    model = timm_model(name, **changes)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "license": "apache-2.0"}
    cfg |= {"interpolation": "bilinear", "crop_pct": 0.9}
    files.write_json(
        tmp_path / "config.json",
        {"architecture": f"{name}.some_tag", "pretrained_cfg": cfg, "model_args": {"num_heads": 4, "embed_dim": 32}},
    )
    mae = load(tmp_path)
    assert mae.key_report.layout == "timm"
    assert_close(mae.encode(IMAGES, pool="tokens"), timm_tokens(model, IMAGES))
    assert mae.passport.kind == "encoder"
    assert (mae.passport.mean, mae.passport.std) == ((0.5,) * 3, (0.25,) * 3)
    assert mae.passport.weights_license == "apache-2.0"
    assert (mae.passport.interpolation, mae.passport.crop_pct) == ("bilinear", 0.9)
    for source in (f"local-dir:{tmp_path}", f"timm:local-dir:{tmp_path}"):
        assert gather(source, SourceConfig()).passport == mae.passport
    assert set(mae.key_report.missing) == {name for name in mae.state_dict() if name.startswith("decoder.")}
    assert all(key.startswith(("head.", "attn_pool.")) for key in mae.key_report.unused)


def test_a_timm_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights by name; what timm fetches is replaced by a model with random weights."""
    name = "vit_tiny_patch16_224"
    asked = []
    real = timm.create_model

    def create(wanted: str, **keywords: Any) -> Any:
        if not keywords.get("pretrained"):
            return real(wanted, **keywords)
        asked.append((wanted, keywords["pretrained"]))
        return timm_model(name, img_size=224, patch_size=16, embed_dim=192, depth=1, num_heads=3, num_classes=0)

    monkeypatch.setattr("maekit.weights.sources.timm.create_model", create)
    mae = load(f"timm:{name}.augreg_in21k", img_size=64)
    assert asked == [(f"{name}.augreg_in21k", True)]
    assert mae.config.num_heads == 3
    assert mae.config.size_hw == (64, 64)
    assert mae.passport.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="no pretrained weights of this name; did you mean"):
        load("timm:vit_tiny_patch16_224.augreg_in22k")
    with pytest.raises(UserError, match="no such model"):
        load("timm:vit_teeny")
    with pytest.raises(UserError, match="MAE here needs a timm VisionTransformer"):
        load("timm:resnet50")


def test_names_cannot_be_fetched_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(*words: Any, **keywords: Any) -> Any:
        if keywords.get("pretrained") is False:
            return real(*words, **keywords)
        raise OSError("network is\nunreachable")

    monkeypatch.setattr("maekit.weights.sources.timm.create_model", offline)
    with pytest.raises(UserError, match=r"cannot be fetched \(network is unreachable\).*HF_HOME"):
        load("timm:vit_tiny_patch16_224.augreg_in21k")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"hub:facebook/vit-mae-base: the hub cannot be reached"):
        load("hub:facebook/vit-mae-base")
    with pytest.raises(UserError, match="on the hub: hub:facebook/vit-mae-base"):
        load("facebook/vit-mae-base")


def test_a_missing_network_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their client would try for a minute; the switch is put back afterwards."""

    def unknown_host(*_: Any) -> Any:
        raise OSError("Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("maekit.hub.socket.getaddrinfo", unknown_host)
    with offline_at_once():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr("maekit.hub.socket.getaddrinfo", lambda *_: [])
    with offline_at_once():
        assert not constants.HF_HUB_OFFLINE


def test_a_hub_name_is_a_folder_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hugging_face(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **_: str(tmp_path / file))
    same_as_hugging_face(load("hub:somebody/vit-mae-tiny"), model)


# ---- files of every layout, written by hand ----


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_layout(name: str, suffix: str, tmp_path: Path) -> None:
    """Every tensor stands where the hand-written table says; what has no place, or is not there, is named."""
    official = files.official_full()
    theirs = WRITERS[name](official)
    path = tmp_path / f"x.{suffix}"
    files.save_pth(theirs, path) if suffix == "pth" else files.save_safetensors(theirs, path)
    mae = load(path, **said_for(name))
    expected, own, report = expected_of(name, official), mae.state_dict(), mae.key_report
    for key, value in expected.items():
        assert torch.equal(own[key], value), key
    assert report.layout == name
    assert set(report.loaded) == set(expected)
    assert set(report.missing) == set(own) - set(expected)
    assert len(report.unused) == len(theirs) - len(used_keys(name, theirs))
    assert mae.passport.kind == ("mae" if name in WHOLE else "encoder")
    assert mae.config.pos_embed == ("learned" if name == "pytorch-adventures" else "sincos")
    encoder: Any = mae.encoder
    assert encoder.pos_embed.requires_grad == (name == "pytorch-adventures")
    assert all(words in str(report) for words in ("loaded", "missing", "unused", name))
    assert 1 <= len(report.summary()) <= 2


def used_keys(name: str, theirs: dict[str, Tensor]) -> list[str]:
    """The keys of a hand-written file that have a place in our model."""
    if name in WHOLE:
        return [key for key in theirs if key != "backbone.mask_token"]
    foreign = ("decoder", "mask_token", "classifier", "embed2image", "wfm", "dec_norms")
    return [key for key in theirs if not key.startswith(foreign)]


def test_the_official_files_by_their_names(tmp_path: Path) -> None:
    """Keys cannot tell the target; the names of the released files can."""
    state = files.official_full()
    said: dict[str, Any] = {"num_heads": 4, "decoder_heads": 2}
    for name, target in (
        ("mae_visualize_vit_base.pth", "pixels"), ("mae_visualize_vit_large_ganloss.pth", "pixels"),
        ("mae_pretrain_vit_base_full.pth", "norm-pixels"),
    ):  # fmt: skip
        mae = load(files.save_pth(state, tmp_path / name), **said)
        assert mae.config.target == target
        assert "CC-BY-NC" in mae.passport.weights_license
        assert "CC-BY-NC" in mae.key_report.remarks()[-1]
        assert mae.passport.mean == (0.485, 0.456, 0.406)
        with pytest.raises(UserError, match=f"says {target}"):
            load(tmp_path / name, **said, target="norm-pixels" if target == "pixels" else "pixels")
    path = files.save_pth(state, tmp_path / "mine.pth")
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert all(flag in text for flag in ("--num-heads", "--decoder-heads", "--target")), text
    assert "--mean" not in text
    assert load(path, num_heads=4, encoder_only=True).passport.kind == "encoder"
    mine = load(path, target="pixels", **said, crop_pct=0.7)
    assert "unknown" in mine.passport.weights_license
    assert not any("licence" in line for line in mine.key_report.remarks())
    assert mine.passport.crop_pct == 0.7
    with pytest.raises(UserError, match=r"--crop-pct 1\.5: must lie above 0"):
        load(path, target="pixels", **said, crop_pct=1.5)


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [("cc-by-nc-4.0", True), ("CC BY-NC-SA 4.0", True), ("non-commercial research", True), (facts.META_LICENSE, True),
     ("apache-2.0", False), (facts.UNKNOWN_LICENSE, False), ("NCSA", False)],
)  # fmt: skip
def test_licences_that_forbid_commercial_use(licence: str, forbids: bool) -> None:
    """timm writes them in lower case."""
    assert bool(facts.NON_COMMERCIAL.search(licence)) == forbids


def test_the_arguments_of_a_training_checkpoint_tell_the_target(tmp_path: Path) -> None:
    state = files.official_full()
    for norm_pix_loss, target in ((True, "norm-pixels"), (False, "pixels")):
        arguments = {"norm_pix_loss": norm_pix_loss, "mask_ratio": 0.6, "model": "mae_vit_base_patch16", "lr": None}
        beside = {"optimizer": {"state": {}}, "epoch": 19, "scaler": {"scale": 1.0}, "args": arguments}
        mae = load(files.save_pth(state, tmp_path / "checkpoint-19.pth", **beside), num_heads=4, decoder_heads=2)
        assert (mae.config.target, mae.config.mask_ratio, mae.passport.epochs) == (target, 0.6, 20.0)


def test_heads_of_the_papers_sizes_are_known_and_no_others() -> None:
    """ViT-B by its width and depth, in the official layout; the same tensors under solo-learn's names are asked for."""
    with torch.device("meta"):
        wide: Any = timm.create_model("vit_base_patch16_224", num_classes=0)
    state = {name: torch.zeros(1).expand(value.shape) for name, value in wide.state_dict().items()}
    state["pos_embed"] = sincos_positions(768, (14, 14), 1)

    def known(state: dict[str, Tensor], file_name: str = "a.pth", **given: Any) -> Material:
        return identify(Raw(state), file_name, file_name, SourceConfig(**given), Hints())

    found = known(state)
    assert not found.needs
    assert (found.report.layout, found.passport.model.num_heads) == ("official", 12)
    assert found.passport.model.model == "mae_vit_base_patch16"
    assert found.passport.crop_pct == 0.875, "their scripts score 224 px cut from 256"
    found = known({f"backbone.{key}": value for key, value in state.items()})
    assert found.needs[0].startswith("--num-heads N (or --model NAME)")
    state["pos_embed"] = state["pos_embed"] + 1  # learned positions: any timm model may have them
    assert known(state).report.layout == "timm"
    assert known(state).passport.crop_pct == 1.0
    assert known(state).passport.model.model == "vit_base_patch16_224"
    assert known(state).needs[0].startswith("--num-heads N")
    assert known(state, "mae_finetuned_vit_base.pth").passport.model.num_heads == 12
    said: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = known(state, model="vit_base_patch16_224", **said)
    assert (found.needs, found.passport.model.num_heads) == ([], 12)
    with pytest.raises(UserError, match=r"384 wide, but .* is 768 wide"):
        known(state, model="vit_small_patch16_224", **said)


def test_classifiers_and_linear_probes_give_their_encoder(tmp_path: Path) -> None:
    state = files.official_encoder()
    tuned = {key.replace("norm.", "fc_norm.", 1) if key.startswith("norm.") else key: v for key, v in state.items()}
    tuned |= {"head.weight": torch.zeros(10, files.D), "head.bias": torch.zeros(10)}
    mae = load(files.save_pth(tuned, tmp_path / "a.pth"), **files.ENCODER_SAID)
    assert torch.equal(mae.state_dict()["encoder.norm.weight"], state["norm.weight"])
    assert mae.key_report.unused == ["head.weight", "head.bias"]
    assert "fc_norm" in str(mae.key_report)
    probe = state | {"head.0.running_mean": torch.zeros(32), "head.0.num_batches_tracked": torch.tensor(3)}
    probe |= {"head.1.weight": torch.zeros(10, 32)}
    mae = load(files.save_pth(probe, tmp_path / "b.pth"), **files.ENCODER_SAID)
    assert len(mae.key_report.unused) == 3


def test_decoders_of_another_kind_are_left_out_and_said(tmp_path: Path) -> None:
    state = files.official_full()
    for index in range(2):
        state[f"decoder_blocks.{index}.mlp.fc1.weight"] = torch.zeros(32, 16)
    mae = load(files.save_pth(state, tmp_path / "a.pth"), num_heads=4)
    assert mae.passport.kind == "encoder"
    assert "MLPs are 2 times as wide" in str(mae.key_report)
    assert len(mae.key_report.unused) == len(files.decoder_shapes())


def test_an_untrained_decoder_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    mae = load(files.save_pth(files.official_encoder(), tmp_path / "a.pth"), **files.ENCODER_SAID)
    with pytest.raises(UserError, match="its decoder is not trained"):
        require_decoder(mae, "a.pth")
    require_decoder(load(files.save_pth(files.official_full(), tmp_path / "b.pth"), **said_for("official")), "b.pth")
    assert "mae_visualize_vit_large.pth" in facts.files_with_decoder(1024)
