"""Run a maekit command and write down which samples and masks each step of this process saw.

torchrun --nproc_per_node 2 tests/record_samples.py FOLDER pretrain ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from maekit import cli
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import Masks


def record(folder: Path) -> None:
    """From now on every draw of training masks adds a line [ids, visible patches] to this process's file."""
    draw = MaskedAutoencoder.draw_masks
    path = folder / f"rank{os.environ.get('RANK', '0')}.jsonl"

    def drawn(self: MaskedAutoencoder, sample_ids: Any, *, seed: int, epoch: int = 0, views: int = 1) -> Masks:
        masks = draw(self, sample_ids, seed=seed, epoch=epoch, views=views)
        with path.open("a") as file:
            file.write(json.dumps([[int(i) for i in sample_ids], masks.ids_keep_BV.tolist()]) + "\n")
        return masks

    MaskedAutoencoder.draw_masks = drawn  # type: ignore[method-assign]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    record(Path(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
