"""Predicting a part of the hidden patches: which, what is scored and measured, settings, and whole runs."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from test_cross import cross_model, random_images
from tiny_runs import DIGITS, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maekit import cli
from maekit.config import PretrainConfig
from maekit.data.loader import Batch
from maekit.models import encoder
from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import choose_predicted, make_masks, num_predicted
from maekit.models.targets import patchify, take_patches, trivial_losses
from maekit.rng import Purpose, random_bits
from maekit.training.monitor import heldout_masks, reconstruct, training_trivial
from maekit.training.optim import peak_learning_rate

# ---- which hidden patches are predicted ----


@pytest.mark.parametrize(
    ("num_patches", "hidden", "share", "count"),
    [(196, 147, 0.25, 49), (196, 147, None, 147), (196, 147, 0.75, 147), (64, 48, 0.001, 1), (24, 15, 0.6, 14),
     (10, 7, 0.75, 7), (10, 7, 0.69, 6), (10, 7, 0.8, 7)],
)  # fmt: skip
def test_counts_by_hand(num_patches: int, hidden: int, share: float | None, count: int) -> None:
    """int(N x share), at least one, at most the hidden ones; all without a share."""
    assert num_predicted(num_patches, hidden, share) == count


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_the_choice_is_a_part_of_the_hidden_and_the_samples_own(kind: str) -> None:
    """Hidden patches, none twice, a function of (seed, epoch, id) and the mask's set alone; visible ones stay."""
    model = cross_model(mask=kind, predict_share=0.25)
    whole = cross_model(mask=kind).draw_masks(range(50), seed=3, epoch=2)
    masks = model.draw_masks(range(50), seed=3, epoch=2)
    assert torch.equal(masks.ids_keep_BV, whole.ids_keep_BV)
    assert masks.ids_masked_BM.shape == (50, 6) and masks.ids_masked_BM.dtype == torch.int64
    for chosen, hidden in zip(masks.ids_masked_BM.tolist(), whole.ids_masked_BM.tolist(), strict=True):
        assert len(set(chosen)) == 6 and set(chosen) < set(hidden)
    other_batch = model.draw_masks([7, 49, 0], seed=3, epoch=2).ids_masked_BM
    assert torch.equal(other_batch, masks.ids_masked_BM[[7, 49, 0]])
    reordered = dataclasses.replace(whole, ids_masked_BM=whole.ids_masked_BM.flip(1))
    assert torch.equal(choose_predicted(reordered, 6, range(50), seed=3, epoch=2).ids_masked_BM, masks.ids_masked_BM)
    for key in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 1}):
        assert not torch.equal(choose_predicted(whole, 6, range(50), **key).ids_masked_BM, masks.ids_masked_BM)
    assert not torch.equal(choose_predicted(whole, 6, range(1, 51), seed=3, epoch=2).ids_masked_BM, masks.ids_masked_BM)


def test_the_choice_is_uniform_and_part_of_the_format() -> None:
    """Each hidden patch is taken as often as any other, whatever the mask's order; stored numbers never change."""
    masks = make_masks("block", (4, 6), 0.75, np.zeros(4000, np.int64), seed=0)  # 4,000 times the same mask
    chosen = choose_predicted(masks, 6, range(4000), seed=0).ids_masked_BM
    counts = torch.bincount(chosen.flatten(), minlength=24)[masks.ids_masked_BM[0]].double()
    assert counts.sum() == 4000 * 6
    deviation = math.sqrt(4000 * (6 / 18) * (12 / 18))
    assert (counts - 4000 * 6 / 18).abs().max() < 4.5 * deviation
    keys = random_bits([3], 24, seed=1, purpose=Purpose(9), epoch=2)[0]
    hidden = cross_model().draw_masks([3], seed=1, epoch=2).ids_masked_BM[0].tolist()
    by_hand = sorted(hidden, key=lambda number: int(keys[number]))[:6]
    drawn = cross_model(predict_share=0.25).draw_masks([3], seed=1, epoch=2)
    assert drawn.ids_masked_BM.tolist() == [by_hand] == [[3, 10, 4, 16, 5, 14]]


@torch.no_grad()
def test_the_training_loss_is_that_of_the_chosen() -> None:
    """Target and loss are those of the predicted patches alone; whoever names hidden patches gets all of them."""
    model = cross_model(predict_share=0.25)
    images = random_images(3)
    out = model(images, seed=5, sample_ids=[7, 1, 9])
    assert torch.equal(out.ids_masked_BM, model.draw_masks([7, 1, 9], seed=5).ids_masked_BM)
    truth = take_patches(patchify(images, 4), out.ids_masked_BM)
    normal = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    assert out.pred_BMP.shape == normal.shape == (3, 6, 48)
    assert out.loss.item() == pytest.approx((out.pred_BMP - normal).square().mean().item(), rel=1e-6)
    assert model(images, out.ids_keep_BV).pred_BMP.shape == (3, 18, 48)


# ---- what is measured and drawn ----


def batches_of(images: Tensor) -> Iterator[Batch]:
    for start in (0, 4):
        yield Batch(images[start : start + 4], np.arange(start, start + 4), [])


def test_trivial_loss_and_training_loss_score_the_same_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loss's trivial predictors are measured on the predicted patches, not on all hidden ones."""
    model = cross_model(predict_share=0.25, target="pixels")
    images = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    loss = MaskedAutoencoder.loss

    def noted(self: MaskedAutoencoder, pred_BMP: Tensor, hidden_BMP: Tensor) -> Tensor:
        seen.append(hidden_BMP)
        return loss(self, pred_BMP, hidden_BMP)

    monkeypatch.setattr(MaskedAutoencoder, "loss", noted)
    model(model.normalize(images), seed=2)
    masks = model.draw_masks(range(8), seed=2)
    patches = patchify(model.normalize(images), 4)
    assert torch.equal(seen[0], take_patches(patches, masks.ids_masked_BM))
    by_hand = trivial_losses(patches, masks.ids_keep_BV, masks.ids_masked_BM, "pixels", (4, 6), 4)
    assert training_trivial(model, batches_of(images), seed=2) == pytest.approx(
        by_hand.mean(dim=1).min().item(), rel=1e-6
    )
    whole = make_masks("random", (4, 6), 0.75, range(8), seed=2)
    of_all = trivial_losses(patches, whole.ids_keep_BV, whole.ids_masked_BM, "pixels", (4, 6), 4)
    assert abs(of_all.mean(dim=1).min() / by_hand.mean(dim=1).min() - 1) > 1e-3


@torch.no_grad()
def test_held_out_loss_and_panels_take_every_hidden_patch() -> None:
    """Comparable between runs with and without a share; a panel shows the whole image."""
    model = cross_model(predict_share=0.25).eval()
    keep, masked = heldout_masks(model, np.arange(2))
    assert masked.shape == (2, 18)
    assert (torch.cat([keep, masked], dim=1).sort(dim=1).values == torch.arange(24)).all()
    for shown in reconstruct(model, torch.rand(2, 3, 16, 24), keep, masked, "true-patch"):
        assert shown.pred_MP.shape == (18, 48) and len(shown.ids_masked_M) == 18


# ---- settings and learning rate ----


def problems(**changes: Any) -> list[str]:
    return PretrainConfig(data="-", **changes).problems()


def test_settings_that_do_not_fit() -> None:
    """A share needs cross and at most the mask ratio; cross needs a block. All at once, each with its flags."""
    assert problems(decoder="cross", predict_share=0.75) == problems(decoder="cross", predict_share=0.01) == []
    for share in (0.0, -0.5, 0.8, math.nan):
        (problem,) = problems(decoder="cross", predict_share=share)
        assert f"--predict-share {share:g}: " in problem and "--mask-ratio 0.75" in problem
    (problem,) = problems(predict_share=0.25)
    assert "--predict-share 0.25" in problem and "--decoder self" in problem and "--decoder cross" in problem
    for decoder in ("self", "cross"):
        (problem,) = problems(decoder=decoder, decoder_depth=0)
        assert "--decoder-depth 0" in problem
    assert len(problems(decoder="cross", decoder_depth=0, predict_share=2.0, mask_ratio=1.5, decoder_dim=30)) == 5


def test_peak_learning_rate_counts_predictions() -> None:
    """A third of the hidden patches gives a third of the rate; --lr is taken as it is."""
    config = PretrainConfig(decoder="cross", blr=1.5e-4, batch_size=4096, predict_share=0.25)
    lr, reason = peak_learning_rate(config)
    assert lr == pytest.approx(8e-4)
    assert reason.startswith("0.0008 = 0.00015 x 4096 / 256 x 0.25 / 0.75 (")
    assert peak_learning_rate(dataclasses.replace(config, predict_share=None))[0] == pytest.approx(2.4e-3)
    assert peak_learning_rate(dataclasses.replace(config, lr=0.1))[0] == 0.1


# ---- whole runs ----


def test_runs_are_resumed_and_checkpointed_bit_for_bit(tmp_path: Path) -> None:
    """A run with a share that is stopped and resumed, with and without checkpointing, is the run left alone."""
    words = [*DIGITS, "--decoder", "cross", "--predict-share", "0.25", "--steps", "6", "--eval-every", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert run(words, tmp_path / "alone") == 0
        blocks: list[Any] = []

        def noted(block: Any, *inputs: Tensor, use_reentrant: bool) -> Any:
            blocks.append(block)
            return checkpoint(block, *inputs, use_reentrant=use_reentrant)

        patch.setattr(encoder, "checkpoint", noted)
        assert run(words, tmp_path / "again", "--grad-checkpoint") == 0
        assert len(blocks) == 6 * 3  # two blocks of the encoder and one of the decoder in each step

    def stop(part: int, loss: Tensor) -> Tensor:
        if part == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        tiny_runs.spoil_loss(patch, stop)
        assert run(words, tmp_path / "stopped") == 143
    assert len(tiny_runs.metrics(tmp_path / "stopped")) < len(tiny_runs.metrics(tmp_path / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.without_pictures(patch)
        assert cli.main(["resume", str(tmp_path / "stopped")]) == 0
    tiny_runs.assert_same_run(tmp_path / "alone", tmp_path / "stopped")
    tiny_runs.assert_same_run(tmp_path / "alone", tmp_path / "again")
