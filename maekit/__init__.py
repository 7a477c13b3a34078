"""maekit: pretrain a vision transformer on your own images by masked autoencoding, and see whether it worked.

    import maekit
    mae = maekit.load("runs/c10")
    images = maekit.read_images(["one.jpg", "two.tif"], mae)
    features = mae.encode(images)
    names = maekit.load("runs/c10/finetune-cifar10").predict(images).names

Importing the package loads no torch and has no side effect; its functions load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maekit.data.centres import read_images
    from maekit.models.classifier import Classifier
    from maekit.models.mae import MaskedAutoencoder
    from maekit.weights.store import load
    from maekit.weights.written import save

    __version__: str

__all__ = ["Classifier", "MaskedAutoencoder", "__version__", "load", "read_images", "save"]

_PLACES = {
    "load": "maekit.weights.store",
    "read_images": "maekit.data.centres",
    "save": "maekit.weights.written",
    "Classifier": "maekit.models.classifier",
    "MaskedAutoencoder": "maekit.models.mae",
}


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # to a type checker, any name would then be one of ours

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from maekit.environment import own_version

            return own_version()
        if name in _PLACES:
            from importlib import import_module

            return getattr(import_module(_PLACES[name]), name)
        raise AttributeError(f"module 'maekit' has no attribute {name!r}")
