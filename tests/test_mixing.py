"""What a batch is trained on when a classifier is fine-tuned: mixed images, soft labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maekit.config import FinetuneConfig, UserError
from maekit.training.finetuning import check_boxes
from maekit.training.mixing import Mixing, soft_loss


def test_mixup_with_smoothing_is_a_hand_calculations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, two classes, blend 1/4, smoothing 0.1: labels (0.95, 0.05) and (0.05, 0.95) before the blend."""
    monkeypatch.setattr(np.random, "beta", lambda *_, **__: 0.25)
    mixing = Mixing(FinetuneConfig(mixup=0.8, cutmix=0.0, smoothing=0.1, erase=0.0), 2, torch.device("cpu"))
    images = torch.tensor([8.0, 4.0]).reshape(2, 1, 1, 1).repeat(1, 1, 2, 2)
    mixed, targets = mixing(images, torch.tensor([0, 1]))
    assert mixed[:, 0, 0, 0].tolist() == [0.25 * 8 + 0.75 * 4, 0.25 * 4 + 0.75 * 8]
    torch.testing.assert_close(targets, torch.tensor([[0.275, 0.725], [0.725, 0.275]]))
    # Logits (0, ln 3) are the probabilities 1/4 and 3/4.
    loss = soft_loss(torch.tensor([[0.0, np.log(3)], [0.0, np.log(3)]]), targets)
    by_hand = -np.mean([0.275 * np.log(1 / 4) + 0.725 * np.log(3 / 4), 0.725 * np.log(1 / 4) + 0.275 * np.log(3 / 4)])
    assert float(loss) == pytest.approx(by_hand, rel=1e-6)


def test_without_mixing_labels_are_only_smoothed() -> None:
    mixing = Mixing(FinetuneConfig(mixup=0.0, cutmix=0.0, smoothing=0.1, erase=0.0), 5, torch.device("cpu"))
    images, targets = mixing(torch.ones(1, 1, 2, 2), torch.tensor([3]))
    assert images.eq(1).all()
    torch.testing.assert_close(targets, torch.tensor([[0.02, 0.02, 0.02, 0.92, 0.02]]))


@pytest.mark.parametrize(("shares", "ok"), [((0.5, 0.52), False), ((0.0, 0.03), False), ((0.5, 0.6), True)])
def test_boxes_of_cutmix_need_a_pixel_to_choose_from(shares: tuple[float, float], ok: bool) -> None:
    """What passes, timm can draw; what it cannot is said before the run, not in its midst."""
    config = FinetuneConfig(cutmix_minmax=shares, mixup=0.0, erase=0.0)
    images, labels = torch.rand(2, 1, 32, 32), torch.tensor([0, 1])
    mixing = Mixing(config, 2, torch.device("cpu"))
    if ok:
        check_boxes(config, (32, 32))
        mixing(images, labels)
        return
    with pytest.raises(UserError, match="of 32 pixels"):
        check_boxes(config, (32, 32))
    with pytest.raises(ValueError, match=r"low >= high|high <= 0"):
        mixing(images, labels)
