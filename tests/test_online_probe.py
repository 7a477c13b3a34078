"""Of how many held-out images the accuracies of a run's online probes are; unreadable images are counted once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_classes import write_images
from tiny_runs import folder_words

from maekit import cli
from maekit.data.loader import split_heldout
from maekit.data.sources import open_source
from maekit.data.splits import Split
from maekit.viz.plots import collect, figure_of


def test_the_number_of_images_stands_beside_the_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log, on the screen, and beside the curves; unlabelled ones do not count."""
    folder = write_images(tmp_path / "set", {"cat": 45, "dog": 15})
    assert cli.main([*folder_words(folder), "--epochs", "1", "--probe-every", "1", "--out", str(tmp_path / "run")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probes = [record for record in records if record["kind"] == "probe"]
    assert [record["images"] for record in probes] == [8] * len(probes) != []
    said = " ".join(capsys.readouterr().out.split())
    largest = probes[0]["largest_class"]
    part = open_source(str(folder)).train
    _, heldout_ids = split_heldout(len(part), 0.02, 8)
    assert part.labels is not None
    assert largest == np.bincount(part.labels[heldout_ids]).max() / 8 > 0.5
    assert f"% of 8 images (always the largest class: {largest:.1%}), rank" in said
    axes = figure_of(collect(records), title="t").axes
    assert "accuracy, % of 8 held-out images" in [one.get_ylabel() for one in axes]


def test_an_image_that_two_sources_cannot_read_is_counted_once(tmp_path: Path) -> None:
    """A part that is opened for gray and for colour has the same keys; the same number in another part has not."""
    train = write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    test = write_images(tmp_path / "test", {"cat": 3, "hen": 3})
    pool: Any = SimpleNamespace(unreadable={2: "broken"})

    def keys(folder: Path, in_chans: int) -> dict[tuple[str, int], str]:
        part = open_source(str(folder), in_chans=in_chans).train
        return Split(part, pool, np.arange(6), torch.zeros(6)).unreadable()

    assert len(keys(train, 1) | keys(train, 3)) == 1
    assert len(keys(train, 1) | keys(test, 1)) == 2
