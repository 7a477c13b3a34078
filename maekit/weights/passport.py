"""What a weights file says about itself: a JSON passport in the header of the safetensors file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from maekit.config import ModelConfig, UserError
from maekit.configfile import from_json

FORMAT = 1
_KEY = "maekit"


@dataclass(kw_only=True)
class Passport:
    """Everything about a model that its tensors cannot tell."""

    model: ModelConfig
    """Architecture, masking and target, with every default resolved."""
    mean: tuple[float, ...]
    """Per-channel mean of the pixels in 0..1 that the input is normalised by."""
    std: tuple[float, ...]
    """Per-channel standard deviation that the input is normalised by."""
    format: int = FORMAT
    """Version of this passport's layout."""
    kind: str = "mae"
    """mae: encoder and decoder of a pretraining run."""
    eps: float = 1e-6
    """LayerNorm's epsilon."""
    grid: tuple[int, int] = (0, 0)
    """Patches along height and width."""
    steps: int = 0
    """Optimiser steps trained."""
    epochs: float = 0.0
    """Passes over the training data."""
    data: str = ""
    """Short name of the data."""
    fingerprint: str = ""
    """Hash of the data's names and sizes."""
    recipe: str = ""
    """Recipe that the run was started from."""
    weights_license: str = "unspecified: trained by the owner of the run"
    """Licence of the weights."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions of the run."""

    def to_metadata(self) -> dict[str, str]:
        """The header entries of a safetensors file."""
        return {"format": "pt", _KEY: json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def from_metadata(metadata: dict[str, str] | None, source: str) -> Passport:
        """The passport read back.

        Raises:
            UserError: no passport, a newer format, or values that do not fit.
        """
        text = (metadata or {}).get(_KEY)
        if text is None:
            raise UserError(f"{source}: no maekit passport in this file's header, so it is not known what it is")
        passport = from_json(Passport, text, f"{source}, passport")
        if passport.format != FORMAT:
            raise UserError(f"{source}: passport format {passport.format}, this maekit reads {FORMAT}: upgrade maekit")
        return passport
