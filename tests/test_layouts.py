"""Key names of other programs: recognised, renamed to ours and back, without a tensor lost or changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import weight_files as files
from conftest import tiny_config
from torch import Tensor
from weight_files import WHOLE

from maekit.config import UserError
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.layouts import LAYOUTS, bare, recognise

WRITERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "official": dict, "hf": files.hf4, "hf5": files.hf5, "hf5-saved": files.hf5_saved,
    "mmpretrain": files.mmpretrain, "lightly": files.lightly,
    "solo-learn": files.solo_learn, "stable-pretraining": files.stable_pretraining,
    "pytorch-adventures": files.adventures, "crossmae": files.crossmae,
    "timm": lambda state: {key: state[key] for key in files.encoder_shapes()},
}  # fmt: skip


def expected_of(name: str, official: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file of this layout holds, under our names."""
    found = {ours: official[key] for key, ours in files.expected_names().items()}
    if name not in WHOLE:
        found = {key: value for key, value in found.items() if key.startswith("encoder.")}
    if name == "crossmae":
        found = {key: value for key, value in found.items() if not key.startswith("encoder.norm.")}
    if name == "pytorch-adventures":
        found["encoder.pos_embed"] = files.one_dimensional(17, files.D)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_every_layout_is_tested() -> None:
    assert set(WRITERS) == set(LAYOUTS) - {"maekit"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_each_layout_is_recognised_and_renamed(name: str) -> None:
    official = files.official_full()
    state = WRITERS[name](official)
    layout = recognise(state)
    assert layout is not None
    assert layout.name == name
    assert_same(layout.to_maekit(state), expected_of(name, official))


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_is_the_identity(name: str) -> None:
    """Every tensor of a model of ours, through the other layout's names; what it has no place for is left out."""
    layout = LAYOUTS[name]
    own = MaskedAutoencoder(tiny_config(), [0.5] * 3, [0.25] * 3).state_dict()
    there = layout.from_maekit(own)
    has_decoder = bool(layout.decoder_blocks)
    kept = {key: value for key, value in own.items() if has_decoder or key.startswith("encoder.")}
    assert_same(layout.to_maekit(there), kept)
    assert len(there) == len(kept) + (8 + 8) * bool(layout.qkv)  # four blocks; weight and bias; three for one
    found = recognise(there)
    assert found is not None
    # Encoders alone look alike in some: timm's in the official files and CrossMAE's, and both saved forms of HF.
    assert found.name == name or (name == "crossmae" and found.name == "timm")


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_written_is_what_the_other_program_writes(name: str) -> None:
    """from_maekit gives the hand-written file of this layout, key for key."""
    official = files.official_full()
    own = {ours: official[key] for key, ours in files.expected_names().items()}
    expected = WRITERS[name](official)
    expected.pop("backbone.mask_token", None)
    assert_same(LAYOUTS[name].from_maekit(own), expected)


def test_query_key_and_value_are_rows_in_this_order() -> None:
    state = files.hf4(files.official_full())
    whole = LAYOUTS["hf"].to_maekit(state)["encoder.blocks.1.attn.qkv.weight"]
    for part, name in enumerate(("query", "key", "value")):
        rows = state[f"vit.encoder.layer.1.attention.attention.{name}.weight"]
        assert torch.equal(whole[part * files.D : (part + 1) * files.D], rows)


def test_registers_and_odd_names_have_their_places() -> None:
    timm = LAYOUTS["timm"]
    assert timm.ours("reg_token") == ("encoder.reg_token", None)
    assert timm.ours("norm_pre.weight") == ("encoder.norm_pre.weight", None)
    assert timm.ours("head.weight") is None
    assert timm.ours("blocks.x.norm1.weight") is None
    assert LAYOUTS["mmpretrain"].ours("backbone.ln1.weight") == ("encoder.norm.weight", None)
    assert LAYOUTS["mmpretrain"].ours("backbone.layers.11.ln1.weight") == ("encoder.blocks.11.norm1.weight", None)
    assert LAYOUTS["hf"].ours("vit.encoder.layer.0.output.dense.bias") == ("encoder.blocks.0.mlp.fc2.bias", None)
    assert LAYOUTS["hf"].ours("vit.encoder.layer.0.attention.output.dense.bias") == (
        "encoder.blocks.0.attn.proj.bias", None,
    )  # fmt: skip


def test_two_tensors_of_one_name_and_lost_thirds_are_refused() -> None:
    state = files.hf4(files.official_full())
    lost = "vit.encoder.layer.0.attention.attention.key.bias"
    with pytest.raises(UserError, match="not all there"):
        LAYOUTS["hf"].to_maekit({key: value for key, value in state.items() if key != lost})
    with pytest.raises(UserError, match="different shapes"):
        LAYOUTS["hf"].to_maekit(state | {lost: torch.zeros(5)})
    twice = files.official_encoder()
    twice["blocks.00.norm1.weight"] = twice["blocks.0.norm1.weight"]
    assert "encoder.blocks.00.norm1.weight" in LAYOUTS["timm"].to_maekit(twice)  # refused later, as unknown


def test_wrappers_of_a_model_are_taken_away() -> None:
    state = files.official_encoder()
    for prefixes in (("module.",), ("_orig_mod.",), ("module.", "_orig_mod.")):
        wrapped = {"".join(reversed(prefixes)) + key: value for key, value in state.items()}
        found, taken = bare(wrapped)
        assert set(found) == set(state)
        assert sorted(taken) == sorted(prefixes)
    assert bare(state) == (state, [])
    alone = {key.removeprefix("vit."): value for key, value in files.hf4(state).items()}
    assert set(bare(alone)[0]) == set(files.hf4(state))


def test_keys_of_something_else_are_not_recognised() -> None:
    assert recognise(["conv1.weight", "layer1.0.bn1.weight"]) is None
    assert recognise([]) is None
