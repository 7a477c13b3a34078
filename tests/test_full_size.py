"""ViT-B in full size, with random weights in every tensor, to and from Hugging Face and timm: `make test-slow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from maekit import cli
from maekit.config import ModelConfig
from maekit.models.masking import make_masks
from maekit.weights.store import load, random_model

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
BOUND: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def scramble(model: torch.nn.Module) -> Any:
    """Noise on every parameter, small beside what ViT-B multiplies, so that activations keep their size."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def same_as_hugging_face(mae: Any, theirs: Any) -> None:
    """Loss, each prediction and the encoder's tokens, with one mask given to them as noise."""
    masks = make_masks("random", (14, 14), 0.75, range(2), seed=0)
    order = torch.cat([masks.ids_keep_BV, masks.ids_masked_BM], dim=1)
    noise = torch.zeros(order.shape).scatter(1, order, torch.arange(196.0).expand(order.shape))
    with torch.no_grad():
        expected, out = theirs(IMAGES, noise=noise), mae(IMAGES, masks.ids_keep_BV)
        everything = theirs.vit(IMAGES, noise=noise).last_hidden_state
        own = mae.encode_patches(patches(mae, masks.ids_keep_BV), masks.ids_keep_BV)
    assert out.pred_BMP.std() > 0.05
    assert_close(out.loss, expected.loss, **BOUND)
    assert_close(out.pred_BMP, torch.take_along_dim(expected.logits, out.ids_masked_BM.unsqueeze(-1), dim=1), **BOUND)
    assert_close(own, everything, **BOUND)


def patches(mae: Any, ids_BV: Tensor) -> Tensor:
    from maekit.models.targets import patchify, take_patches

    return take_patches(patchify(IMAGES, mae.patch_size), ids_BV)


@pytest.mark.slow
def test_hugging_face_there_and_back(tmp_path: Path) -> None:
    """Their model saved by themselves and loaded by us; written again by us and loaded by them; equal to the bit."""
    transformers: Any = pytest.importorskip("transformers")
    theirs = scramble(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(norm_pix_loss=True)))
    theirs.save_pretrained(tmp_path / "theirs")
    said = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    mae = load(tmp_path / "theirs", **said)  # type: ignore[arg-type]
    same_as_hugging_face(mae, theirs)

    ours = scramble(random_model(ModelConfig()))
    save_file(dict(ours.state_dict()), tmp_path / "ours.safetensors", metadata=ours.passport.to_metadata())
    # positions that are not sine-cosine cannot be told apart from fixed ones in their layout: ours say what they are
    words = ["convert", str(tmp_path / "ours.safetensors"), "--to", "hf", "--out", str(tmp_path / "hf")]
    assert cli.main(words) == 0
    same_as_hugging_face(ours, transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval())
    again = load(tmp_path / "hf")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_timm_there_and_back(name: str, tmp_path: Path) -> None:
    """Their weights in our model, and ours written for them, by features of whole images."""
    theirs = scramble(timm.create_model(name, num_classes=0))
    images = IMAGES if "224" in name else torch.randn(2, 3, 256, 256)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    said = {"model": name, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_heads": theirs.blocks[0].attn.num_heads}
    mae = load(tmp_path / "theirs.safetensors", **said)
    with torch.no_grad():
        tokens = theirs.fc_norm(theirs.forward_features(images))
        assert tokens.std() > 0.05
        assert_close(mae.encode(images, "tokens"), tokens, **BOUND)
    save_file(dict(mae.state_dict()), tmp_path / "ours.safetensors", metadata=mae.passport.to_metadata())
    words = ["convert", str(tmp_path / "ours.safetensors"), "--to", "timm", "--out", str(tmp_path / "timm")]
    assert cli.main([*words, "--pool", "tokens"]) == 0
    back: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(back(images), tokens, **BOUND)
