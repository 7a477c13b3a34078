"""Which labels a probe with few of them is given: a share of each class, and one at least."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maekit.rng import Purpose, random_bits
from maekit.training.few_labels import draw_labels, label_shares, labels_to_draw


def of_sizes(*sizes: int) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize(
    ("sizes", "share", "drawn"),
    [
        ([5_000] * 10, 0.01, [50] * 10),  # classes of one size: as many of each
        ([384] * 16, 0.01, [4] * 16),  # 3.84 of each, rounded as before
        ([380, 20], 0.1, [38, 2]),  # 40 labels; equal numbers would be 20 and all 20
        ([380, 20], 0.01, [3, 1]),  # 4 labels, of which the rare class gets one, not 0.2
        ([100, 50, 50], 0.02, [1, 1, 1]),  # 4 labels, rounded to one for each class
        ([96, 1, 1, 1, 1], 0.1, [6, 1, 1, 1, 1]),  # 10 labels: single ones of rare classes come from the largest
        ([33, 33, 34], 0.1, [3, 3, 3]),  # 9 labels
        ([40, 35, 25], 0.06, [2, 2, 2]),  # 6 labels: of 2.4, 2.1 and 1.5 the last is furthest below its part
        ([10, 0, 10], 0.2, [2, 0, 2]),  # a number that no image has is no class
        ([20] * 30, 0.01, [0] * 30),  # 6 labels for 30 classes
    ],
)
def test_labels_by_hand(sizes: list[int], share: float, drawn: list[int]) -> None:
    assert labels_to_draw(of_sizes(*sizes), share).tolist() == drawn


def test_any_sizes_give_a_share_of_each_class() -> None:
    """The total is met, every class has one, and no class is a whole label off its part but for such single labels."""
    random = np.random.default_rng(0)
    for _ in range(200):
        sizes = random.integers(1, 10 ** random.integers(1, 4), random.integers(2, 20))
        share = float(random.uniform(0.02, 0.5))
        drawn, classes = labels_to_draw(of_sizes(*sizes), share), len(sizes)
        total = classes * round(share * sizes.sum() / classes)
        assert drawn.sum() == total
        if total:
            part = total * sizes / sizes.sum()
            single = part < 1
            assert (drawn[single] >= 1).all()
            assert (drawn <= sizes).all()
            assert (drawn < np.maximum(part + 1, 1.5)).all()
            if not single.any():
                assert (drawn > part - 1).all()


def equal_numbers(labels: torch.Tensor, images: torch.Tensor, per_class: int, draw: int) -> set[int]:
    """The draws of published cards, written as a loop: of each class those with the lowest keys."""
    keys = random_bits(images.numpy(), 1, seed=draw + 1, purpose=Purpose.SUBSET)[:, 0]
    found: set[int] = set()
    for one in labels.unique():
        own = [(int(key), int(image)) for key, image in zip(keys, images, strict=True) if labels[image] == one]
        found |= {image for _, image in sorted(own)[:per_class]}
    return found


def test_draws_of_equal_classes_are_those_of_earlier_cards() -> None:
    labels = of_sizes(200, 200, 200)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    images = torch.arange(0, 600)[torch.arange(600) % 10 != 3]  # without some that are held out
    for draw in range(3):
        drawn = draw_labels(labels, images, labels_to_draw(labels, 0.1), draw)
        assert set(drawn.tolist()) == equal_numbers(labels, images, 20, draw)


def test_draws_are_fixed_and_nested() -> None:
    """The same in every call, others in another draw; a larger share holds a smaller; a rare class gives all it has."""
    labels = of_sizes(50, 30, 3)
    images = torch.arange(83)
    wanted = np.array([5, 5, 5])
    one, two, again = (draw_labels(labels, images, wanted, draw) for draw in (0, 1, 0))
    assert torch.bincount(labels[one]).tolist() == [5, 5, 3]
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert set(draw_labels(labels, images, np.array([2, 2, 1]), 0).tolist()) <= set(one.tolist())
    some = images[::2]
    assert set(draw_labels(labels, some, wanted, 0).tolist()) <= set(some.tolist())


def test_shares_that_leave_a_class_out_are_passed_over() -> None:
    assert label_shares(of_sizes(*[20] * 30), None) == [0.1]
    assert label_shares(of_sizes(*[20] * 30), (0.01, 0.3)) == [0.3]
