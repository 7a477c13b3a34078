"""The classifier against timm's own, and its files: with the head, as an encoder, resized, and from other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_classes as tiny
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

import maekit
from maekit.config import FinetuneConfig, SourceConfig, UserError
from maekit.models.classifier import HEAD_STD, Classifier
from maekit.models.mae import MaskedAutoencoder
from maekit.terminal import make_console
from maekit.training.finetuning import build_model, load_start, make_optimizer
from maekit.weights.heads import foreign_classes
from maekit.weights.store import load_as, load_classifier

CLASSES = ("cat", "dog", "eel")
RGB = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


def trained(pool: Any, **changes: Any) -> Classifier:
    """A classifier all of whose numbers are far from their first values."""
    torch.manual_seed(0)
    model = Classifier(tiny_config(**changes), CLASSES, *RGB, pool)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def timms(model: Classifier, pool: str) -> Any:
    config = model.config
    theirs: Any = timm.create_model(
        config.model, num_classes=len(model.classes), global_pool=pool, img_size=config.size_hw,
        patch_size=config.patch_size, embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads,
        reg_tokens=config.reg_tokens,
    )  # fmt: skip
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
@pytest.mark.parametrize("registers", [0, 2])
def test_logits_are_timms(pool: str, theirs: str, registers: int) -> None:
    model = trained(pool, reg_tokens=registers)
    images = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    expected = timms(model, theirs)(model.normalize(images))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(model.normalize(images)), expected, rtol=1e-5, atol=1e-5)


def test_a_prediction_is_what_the_logits_say() -> None:
    model = trained("mean").train()
    images = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    said = model.predict(images)
    assert model.training, "predict must leave the mode as it was"
    logits = timms(model, "avg")(model.normalize(images)).double()
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(said.probabilities.double(), expected, rtol=1e-5, atol=1e-6)
    assert said.class_ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert said.names == [CLASSES[k] for k in said.class_ids]
    with pytest.raises(UserError, match=r"takes \[batch, 3, 16, 24\]"):
        model.predict(images[:, :, :8])


def test_the_head_begins_without_an_opinion_and_the_encoder_as_it_was_trained() -> None:
    mae = MaskedAutoencoder(tiny_config(embed_dim=64), *RGB)
    torch.nn.init.normal_(mae.get_parameter("encoder.norm.weight"))
    for pool, kept in (("mean", False), ("cls", True)):
        model = Classifier(dataclasses.replace(mae.config, drop_path=0.3), ["a"] * 500, *RGB, pool)  # type: ignore[arg-type]
        assert model.take_encoder(mae.encoder.state_dict()) == ([] if kept else ["norm.weight", "norm.bias"])
        assert HEAD_STD == 2e-5
        assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
        assert not model.head.bias.any()
        own, theirs = model.encoder.state_dict(), mae.encoder.state_dict()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
        if not kept:
            assert torch.equal(model.get_parameter("fc_norm.weight"), torch.ones(64)), (
                "the paper's norm after pooling starts anew"
            )
        assert [round(block.drop_path1.drop_prob, 6) if hasattr(block.drop_path1, "drop_prob") else 0.0
                for block in model.encoder.blocks] == [0.0, 0.3]  # fmt: skip
        assert model.encoder.pos_embed.requires_grad, "positions are trained in fine-tuning"


def test_features_need_no_class_token_but_cls_does() -> None:
    with pytest.raises(UserError, match="--pool cls"):
        Classifier(tiny_config(class_token=False), CLASSES, *RGB, "cls")


def test_rates_and_decay_of_each_layer_are_a_hand_calculations() -> None:
    """Two blocks, decay 1/2: 1/8 for what comes before them, 1/4 and 1/2 for the blocks, 1 for what comes after."""
    model = Classifier(tiny_config(), CLASSES, *RGB)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(config: FinetuneConfig) -> dict[str, tuple[float, float]]:
        groups = make_optimizer(model, config, 1.0).param_groups
        found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
        return found

    plain = of(FinetuneConfig(layer_decay=0.5, weight_decay=0.1))
    expected = {
        "encoder.cls_token": (0.125, 0.0), "encoder.pos_embed": (0.125, 0.0),
        "encoder.patch_embed.proj.weight": (0.125, 0.1), "encoder.patch_embed.proj.bias": (0.125, 0.0),
        "encoder.blocks.0.attn.qkv.weight": (0.25, 0.1), "encoder.blocks.0.norm1.weight": (0.25, 0.0),
        "encoder.blocks.1.mlp.fc2.weight": (0.5, 0.1), "encoder.blocks.1.mlp.fc2.bias": (0.5, 0.0),
        "fc_norm.weight": (1.0, 0.0), "fc_norm.bias": (1.0, 0.0), "head.weight": (1.0, 0.1), "head.bias": (1.0, 0.0),
    }  # fmt: skip
    assert {name: plain[name] for name in expected} == expected
    norms = of(FinetuneConfig(layer_decay=0.5, weight_decay=0.1, norm_weight_decay=True))
    changed = {name for name in norms if norms[name] != plain[name]}
    assert changed == {name for name in norms if "norm" in name}
    biases = of(FinetuneConfig(layer_decay=0.5, weight_decay=0.1, bias_weight_decay=True))
    assert {name for name in biases if biases[name] != plain[name]} == {
        name for name in biases if name.endswith(".bias") and "norm" not in name
    }


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_file_comes_back_as_classifier_and_as_encoder(tmp_path: Path, pool: Any) -> None:
    model = tiny.write_classifier(tmp_path, pool=pool)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        back = maekit.load(source)
        assert isinstance(back, Classifier)
        assert torch.equal(back(images), model(images))
        assert (back.classes, back.pool, back.passport.kind) == (tiny.DIGITS, pool, "classifier")
        assert not back.key_report.unused
    encoder = load_as(tmp_path, SourceConfig())
    assert encoder.passport.kind == "encoder"
    assert {"head.weight", "head.bias"} <= set(encoder.key_report.unused), "nothing is left out in silence"
    own = model.encoder.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in encoder.encoder.state_dict().items() if name in own)
    last = model.get_parameter("fc_norm.weight" if pool == "mean" else "encoder.norm.weight")
    assert torch.equal(encoder.get_parameter("encoder.norm.weight"), last)
    assert isinstance(maekit.load(tmp_path, encoder_only=True), MaskedAutoencoder)


def test_a_classifier_at_another_size_still_has_its_head(tmp_path: Path) -> None:
    model = tiny.write_classifier(tmp_path)
    back = maekit.load(tmp_path, img_size=(8, 16))
    assert isinstance(back, Classifier)
    assert back.grid_hw == (2, 4)
    assert torch.equal(back.head.weight, model.head.weight)
    assert back.predict(torch.zeros(1, 1, 8, 16, dtype=torch.uint8)).probabilities.shape == (1, 10)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"head.weight": torch.zeros(7, 16)}, "head.weight has shape"),
        ({"head.bias": None}, "head.bias is missing"),
        ({"encoder.blocks.0.attn.qkv.weight": torch.zeros(48, 8)}, "attn.qkv.weight has shape"),
        ({"head.extra": torch.zeros(1)}, "head.extra is unknown"),
    ],
)
def test_weights_that_do_not_fit_their_passport_are_refused(
    tmp_path: Path, tensors: dict[str, Any], words: str
) -> None:
    model = tiny.write_classifier(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: value for name, value in {**load_file(path), **tensors}.items() if value is not None}
    save_file(state, path, tiny.passport_of(model).to_metadata())
    with pytest.raises(UserError, match=words):
        maekit.load(path)


def test_what_is_no_classifier_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    run = tiny.write_encoder(tmp_path / "run")
    with pytest.raises(UserError, match="no classifier; train one: maekit finetune"):
        load_classifier(str(run), SourceConfig())
    with pytest.raises(UserError, match="random weights are no classifier"):
        load_classifier("random:vit_tiny_patch16_224", SourceConfig())


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_others_fine_tuned_files_are_classifiers_too(tmp_path: Path, pool: str, theirs: str) -> None:
    """The layout of the official fine-tuned weights, which is timm's."""
    model = trained(pool, img_size=(16, 16))
    other = timms(model, theirs)
    path = tmp_path / "tuned.pth"
    torch.save({"model": other.state_dict()}, path)
    said = SourceConfig(num_heads=4, mean=RGB[0], std=RGB[1])
    assert isinstance(load_as(path, said), MaskedAutoencoder)
    back = load_classifier(str(path), said)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(back(images), other(back.normalize(images)), rtol=1e-5, atol=1e-5)
    assert back.classes == ("class 0", "class 1", "class 2")
    assert back.passport.crop_pct == 0.875  # their code scores 224 px cut from 256
    assert load_as(path, said).passport.crop_pct == 1.0


def test_the_released_classifier_knows_the_names_of_imagenets_folders() -> None:
    names = foreign_classes("ImageNet-1k", 1000)
    assert (names[0], names[388], len(set(names))) == ("n01440764", "n02510455", 1000), "tench and giant panda"
    assert foreign_classes("", 2) == ("class 0", "class 1")


def test_patches_are_left_out_in_training_only(tmp_path: Path) -> None:
    """Of 4 patches and a class token, 0.5 leave 2 patches, others for each image; a score sees all."""
    config = FinetuneConfig(source=str(tiny.write_encoder(tmp_path / "run")), patch_drop=0.5)
    start = load_start(config, make_console())
    model = build_model(config, start, tiny.DIGITS, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    images = torch.rand(1, 1, 8, 8).repeat(32, 1, 1, 1)
    model.train()(images)
    model.eval()(images)
    assert [tokens.shape[1] for tokens in seen] == [3, 5]
    some, whole = seen
    assert torch.equal(some[:, 0], whole[:, 0])
    kept_BVN = (some[:, 1:, None] == whole[:, None, 1:]).all(dim=-1)
    assert kept_BVN.sum(dim=(1, 2)).eq(2).all() and len({tuple(one) for one in kept_BVN.any(dim=1).tolist()}) > 3
