"""Several masks an image: each view has its own key, and the loss is the mean over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from conftest import TINY
from tiny_runs import DIGITS, assert_same_run, metrics, run

from maekit import cli
from maekit.config import PretrainConfig
from maekit.models.mae import MaskedAutoencoder
from maekit.tasks import pretrain
from maekit.training.step import part_loss

CROSS: dict[str, Any] = {"decoder": "cross", "predict_share": 0.25}


@pytest.mark.parametrize("change", [{}, CROSS, {"mask": "block"}], ids=str)
def test_each_view_has_its_own_mask(change: dict[str, Any]) -> None:
    """The first is the one that a single view has; all depend on their key alone, not on the batch around them."""
    model = MaskedAutoencoder(PretrainConfig(**(TINY | change)), (0.5,) * 3, (0.25,) * 3)
    three = model.draw_masks([5, 9], seed=3, epoch=2, views=3)
    single = model.draw_masks([9], seed=3, epoch=2)
    alone = model.draw_masks([9], seed=3, epoch=2, views=3)
    for whole, one, again in zip(*((m.ids_keep_BV, m.ids_masked_BM) for m in (three, single, alone)), strict=True):
        assert len(whole) == 6
        assert torch.equal(whole[3:4], one)
        assert torch.equal(whole[3:], again)
        assert len({tuple(sorted(row.tolist())) for row in whole}) >= 5, "views share a mask"


@pytest.mark.parametrize("change", [{}, CROSS], ids=str)
def test_the_loss_is_the_mean_over_views(change: dict[str, Any]) -> None:
    """Against a loop over images and views, each with its own mask in a batch of one."""
    config = PretrainConfig(**(TINY | {"precision": "fp32", "masks_per_image": 3} | change))
    torch.manual_seed(0)
    model = MaskedAutoencoder(config, (0.5,) * 3, (0.25,) * 3)
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    masks = model.draw_masks([5, 9], seed=config.seed, epoch=1, views=3)
    losses = [
        model(images[i // 3 : i // 3 + 1], masks.ids_keep_BV[i : i + 1], ids_masked=masks.ids_masked_BM[i : i + 1]).loss
        for i in range(6)
    ]
    found = part_loss(model, config, images, masks)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_a_run_with_two_masks_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, counts images, and resumes exactly."""
    tiny_runs.without_pictures(monkeypatch)
    words = [*DIGITS, "--steps", "6", "--masks-per-image", "2"]
    assert run(words, tmp_path / "alone") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each image under 2 masks" in said
    assert "images seen 768" in said
    assert run([*DIGITS, "--steps", "6"], tmp_path / "one") == 0
    assert metrics(tmp_path / "one")[-1]["loss"] != metrics(tmp_path / "alone")[-1]["loss"]
    with monkeypatch.context() as patch:
        watch = pretrain.watch

        def stop(job: Any, *rest: Any) -> bool:
            if job.position.step == 3:
                job.stop.number = 15
            return watch(job, *rest)

        patch.setattr(pretrain, "watch", stop)
        assert run(words, tmp_path / "run") == 143
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "alone", tmp_path / "run")
