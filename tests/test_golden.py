"""The golden loss: 20 steps on bundled images, one thread, float32. What should not alter numbers keeps it.

Numbers that change on purpose are stored anew by running this file: python tests/test_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from maekit import cli

FLAGS = (
    "pretrain digits --steps 20 --log-every 1 --eval-every 100 --probe-every 0 --panel-every 0 --device cpu "
    "--precision fp32 --compile off --crop random-resized --flip --target norm-pixels --in-chans 3 --clip-grad 1"
)
GOLDEN = [
    1.592012, 1.538988, 1.237048, 1.043845, 0.925627, 0.845957, 0.899497, 0.866652, 0.83049, 0.825539, 0.817937,
    0.801871, 0.776045, 0.81645, 0.810071, 0.779241, 0.791629, 0.783465, 0.774476, 0.771444,
    0.688178,
]  # fmt: skip
"""Training loss of steps 1 to 20, then the held-out loss."""


def losses(out: Path) -> list[float]:
    """Loss of each of the 20 steps, then the held-out loss."""
    torch.set_num_threads(1)
    assert cli.main([*FLAGS.split(), "--out", str(out)]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["loss"] for record in records if record["kind"] == "step"]
    return [*steps, records[-1]["loss"]]


def test_twenty_steps_give_the_stored_losses(tmp_path: Path) -> None:
    """rtol 1e-4: other machines sum in another order."""
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN, rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print([round(loss, 6) for loss in losses(Path(folder) / "run")], file=sys.stderr)
