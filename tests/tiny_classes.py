"""The smallest encoders and classifiers as files, for the tests of fine-tuning and of what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maekit.config import ModelConfig
from maekit.models.classifier import Classifier, Pool
from maekit.models.mae import MaskedAutoencoder
from maekit.weights.passport import HeadFacts, Passport
from maekit.weights.written import write_weights

MEAN, STD = (0.3,), (0.38,)
DIGITS = tuple(str(digit) for digit in range(10))
SHAPE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": (8,), "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2,
    "num_heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
TRAINING = (
    "--data digits --batch-size 64 --warmup-steps 2 --lr 3e-3 --log-every 1 --device cpu --precision fp32 --compile "
    "off --workers 0 --crop-pct 1"
).split()


def write_encoder(folder: Path, **changes: Any) -> Path:
    """A pretraining's weights of 8 x 8 gray images, untrained."""
    torch.manual_seed(1)
    model = MaskedAutoencoder(ModelConfig(**{**SHAPE, **changes}), MEAN, STD)
    folder.mkdir(parents=True, exist_ok=True)
    passport = Passport(model=model.config, mean=MEAN, std=STD, grid=model.grid_hw, weights_license="cc0-1.0")
    write_weights(folder / "model.safetensors", model, passport)
    return folder


def write_classifier(
    folder: Path, classes: tuple[str, ...] = DIGITS, pool: Pool = "mean", **changes: Any
) -> Classifier:
    """A classifier with opinions, untrained; its file is FOLDER/model.safetensors."""
    torch.manual_seed(2)
    model = Classifier(ModelConfig(**{**SHAPE, **changes}), classes, MEAN * changes.get("in_chans", 1),
                       STD * changes.get("in_chans", 1), pool)  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", model, passport_of(model))
    return model.eval()


def passport_of(model: Classifier, **changes: Any) -> Passport:
    """A passport that fits."""
    mean, std = (tuple(one.flatten().tolist()) for one in (model.mean, model.std))
    fields: dict[str, Any] = {
        "model": model.config, "mean": mean, "std": std, "kind": "classifier", "classes": model.classes,
        "head": HeadFacts(kind="linear", pool=model.pool), "grid": model.grid_hw,
    }  # fmt: skip
    return Passport(**fields | changes)


def write_images(folder: Path, classes: dict[str, int], size: int = 8) -> Path:
    """Gray images of noise in one folder per class."""
    random = np.random.default_rng(3)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (size, size), np.uint8)).save(folder / name / f"{index}.png")
    return folder
