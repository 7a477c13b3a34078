"""What a program of one's own hands to a model: every mistake is named with what would mend it, none goes unsaid."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from torch import Tensor, nn

import maekit
from maekit.config import UserError
from maekit.models.classifier import Classifier
from maekit.models.mae import MaskedAutoencoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(tiny_config(), MEAN, STD).eval()


def tiny_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(tiny_config(), ("a", "b"), MEAN, STD).eval()


MISTAKES: dict[str, tuple[Any, str]] = {
    "array": (PIXELS.numpy(), r"a numpy\.ndarray, not a torch tensor: torch\.from_numpy"),
    "tensors": ([PIXELS[0]], r"a list, not a torch tensor: torch\.stack"),
    "pictures": ([Image.new("RGB", (24, 16))], r"a list, not a torch tensor: maekit\.read_images"),
    "path": ("photo.jpg", r"a str, not a torch tensor: maekit\.read_images"),
    "no batch": (PIXELS[0], r"\[3, 16, 24\].*images\[None\]"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), r"\[3, 16, 24, 3\].*permute\(0, 3, 1, 2\)"),
    "size": (PIXELS[..., :16], r"\[3, 3, 16, 16\].*img_size"),
    "channels": (PIXELS[:, :1], r"\[3, 1, 16, 24\].*in_chans"),
    "none": (PIXELS[:0], "a batch of none"),
    "int64": (PIXELS.long(), r"images of int64.*to\(torch\.uint8\)"),
    "uint16": (PIXELS.to(torch.uint16), "images of uint16.*/ 65535"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_batch_of_images_is_refused(mistake: str) -> None:
    images, words = MISTAKES[mistake]
    mae, classifier = tiny_mae(), tiny_classifier()
    for ask in (mae, mae.encode, classifier, classifier.encode, classifier.predict):
        with pytest.raises(UserError, match=words):
            ask(images)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"ids_keep": [[0, 1]] * 3}, r"a list, not a torch tensor"),
        ({"ids_keep": torch.tensor([[0, 1]])}, r"1 rows for 3 images.*expand\(3, -1\)"),
        ({"ids_keep": torch.ones(3, 24, dtype=torch.bool)}, r"numbers.*not booleans"),
        ({"seed": -1}, "seed=-1: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"seed": 0.5}, r"seed=0\.5: must be a whole number"),
        ({"sample_ids": [1, 2]}, r"3 images need as many whole numbers \[3\], not int64 of shape \[2\]"),
        ({"sample_ids": [0.5, 1, 2]}, "not float64"),
    ],
)
def test_what_gives_no_masks_is_refused(named: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny_mae()(PIXELS, **named)
    assert torch.isfinite(tiny_mae()(PIXELS, seed=np.int64(3), sample_ids=np.arange(3)).loss)


@pytest.mark.parametrize("made", [tiny_mae, tiny_classifier])
def test_pixels_that_nobody_has_normalised_are_told(made: Callable[[], Any]) -> None:
    """Floats of 0..1 and 0..255 warn, once a model; what is normalised does not, of whatever image."""
    with pytest.warns(UserWarning, match=r"floats from 0 to 255.*model\.normalize\(images / 255\)"):
        made().encode(PIXELS.float())
    model = made()
    with pytest.warns(UserWarning, match=r"floats from 0 to 1,.*model\.normalize\(images\)"):
        model.encode(PIXELS / 255)
    own_units = MaskedAutoencoder(tiny_config(), (1000.0,) * 3, (50.0,) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(PIXELS / 255)
        made().encode(model.normalize(PIXELS))
        made().encode(PIXELS)
        for gray in (0, 128, 255):  # blank: nothing of it lies below the mean, or all
            made().encode(model.normalize(torch.full_like(PIXELS, gray)))
        plain = MaskedAutoencoder(tiny_config(), (0.0,) * 3, (1.0,) * 3)  # normalised images are pixels in 0..1 here
        plain.encode(plain.normalize(PIXELS))
        with torch.no_grad():
            own_units.encode(own_units.normalize(1000.0 + PIXELS.float()))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_precision_are_taken(kind: torch.dtype) -> None:
    mae = tiny_mae()
    expected = mae.encode(PIXELS)
    found = mae.encode(mae.normalize(PIXELS).to(kind))
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=0.05)
    small = copy.deepcopy(mae).to(kind)
    for images in (PIXELS, mae.normalize(PIXELS)):
        assert torch.allclose(small.encode(images).float(), expected, atol=0.1)
    assert small(PIXELS).loss.dtype == (torch.float64 if kind == torch.float64 else torch.float32)


class Features(nn.Module):
    """As others put a model into theirs."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.model.encode(images_BCHW)


def test_a_model_is_copied_pickled_compiled_and_exported() -> None:
    mae = tiny_mae()
    expected = mae.encode(PIXELS)
    for same in (copy.deepcopy(mae), pickle.loads(pickle.dumps(mae))):
        assert torch.equal(same.encode(PIXELS), expected)
    compiled = torch.compile(mae, backend="eager")  # masks are drawn by NumPy, which dynamo cannot follow
    for seed in (0, 1):
        assert torch.equal(compiled(PIXELS, seed=seed).loss, mae(PIXELS, seed=seed).loss)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Features(mae), (PIXELS,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3):
        assert torch.allclose(exported(PIXELS[:count]), expected[:count], atol=1e-6)
    normal = mae.normalize(PIXELS).requires_grad_()
    mae.encode(normal).square().sum().backward()
    assert normal.grad is not None and normal.grad.abs().sum() > 0


def test_the_first_line_says_what_a_model_is() -> None:
    first = repr(tiny_mae()).splitlines()[1]
    assert "images [B, 3, 16, 24], patches of 4 px, 2 blocks of width 32, 75 % hidden" in first
    assert "2 classes" in repr(tiny_classifier()).splitlines()[1]


def test_image_files_are_read_as_the_commands_read_them(tmp_path: Path) -> None:
    """The same pixels as uint8 of the right size; in the order of the names; what cannot be read is all named."""
    mae = tiny_mae()
    for number in range(2):
        Image.fromarray(PIXELS[number].permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    read = maekit.read_images([tmp_path / "1.png", str(tmp_path / "0.png")], mae)
    assert torch.allclose(read, mae.normalize(PIXELS[[1, 0]]), atol=1e-6)
    assert maekit.read_images(tmp_path / "1.png", mae).shape == (1, 3, 16, 24)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        maekit.read_images([tmp_path / "bad.png", tmp_path / "gone.png"], mae)
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        str(tmp_path / "bad.png"), str(tmp_path / "gone.png"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="no image"):
        maekit.read_images([], mae)
    mae.passport = maekit.load("random:vit_tiny_patch16_224", img_size=32).passport
    mae.passport.crop_pct = 0.5
    wide = np.zeros((32, 48, 3), np.uint8)
    wide[8:24, 12:36] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert torch.allclose(maekit.read_images(tmp_path / "wide.png", mae), mae.normalize(torch.ones(1, 3, 16, 24)))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"img_size": "32"}, "img_size='32': give one whole number"),
        ({"img_size": -32}, "--img-size -32"),
        ({"in_chans": 0}, "--in-chans 0"),
        ({"mean": (0.1, 0.2), "std": (0.1, 0.2)}, "--mean has 2 values"),
        ({"target": "hog"}, "target='hog': choose pixels or norm-pixels"),
        ({"device": "gpu"}, "device='gpu': choose auto, cpu, cuda or mps"),
        ({"device": "cuda:64"}, "--device cuda:64: no such device"),
    ],
)
def test_what_load_cannot_do_is_said(named: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        maekit.load("random:vit_tiny_patch16_224", **named)


def test_load_takes_the_best_device_by_itself() -> None:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert maekit.load("random:vit_tiny_patch16_224", "auto", img_size=32).mean.device.type == best
