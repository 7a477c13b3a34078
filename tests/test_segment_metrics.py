"""The confusion matrix and what is read from it, against scikit-learn; views of an image, by hand and by each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score
from torch import Tensor, nn

from maekit.models.dense_heads import resized
from maekit.models.segmentation import Scores, Segmenter
from maekit.training.segmentation_inference import View, image_scores, pad_to, predict_classes, window_starts
from maekit.training.segmentation_metrics import Confusion, score, score_table

VOID = -1


def maps(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Predicted and true classes of 3 images, and the number of classes."""
    random = np.random.default_rng(seed)
    predicted = random.integers(0, 5, (3, 9, 7))
    truth = np.where(random.random((3, 9, 7)) < 0.6, predicted, random.integers(0, 5, (3, 9, 7)))
    truth[random.random(truth.shape) < 0.2] = VOID
    if kind == "absent class":  # neither predicted nor true
        predicted[predicted == 2], truth[truth == 2] = 3, 3
    if kind == "only predicted":
        truth[truth == 2] = 3
        predicted[0, 0, 0], truth[0, 0, 0] = 2, 1
    if kind == "only true":
        predicted[predicted == 2] = 3
        truth[0, 0, 0] = 2
    if kind == "one class":
        predicted[:], truth[truth != VOID] = 0, 0
    return predicted, truth, 1 if kind == "one class" else 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random", "absent class", "only predicted", "only true", "one class"])
def test_agrees_with_scikit_learn(kind: str, seed: int) -> None:
    predicted, truth, num = maps(kind, seed)
    confusion = Confusion(num, VOID)
    for one, other in zip(predicted, truth, strict=True):  # image by image
        confusion.add(torch.from_numpy(one), torch.from_numpy(other).to(torch.int16))
    known = truth != VOID
    y_true, y_pred = truth[known], predicted[known]
    np.testing.assert_array_equal(confusion.matrix_KK.numpy(), confusion_matrix(y_true, y_pred, labels=range(num)))
    result = score(confusion.matrix_KK)
    seen = sorted(set(y_true) | set(y_pred))
    iou = jaccard_score(y_true, y_pred, labels=seen, average=None)
    np.testing.assert_allclose([result.iou_K[i] for i in seen], iou, rtol=1e-12)
    assert result.miou == pytest.approx(iou.mean(), rel=1e-12)
    assert all(math.isnan(result.iou_K[i]) for i in range(num) if i not in seen)
    assert result.pixel_accuracy == pytest.approx(accuracy_score(y_true, y_pred), rel=1e-12)
    recall = recall_score(y_true, y_pred, labels=sorted(set(y_true)), average="macro")
    assert result.mean_accuracy == pytest.approx(recall, rel=1e-12)
    assert result.pixels == known.sum()


def test_all_void_is_no_score() -> None:
    confusion = Confusion(3, VOID)
    confusion.add(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), VOID))
    result = score(confusion.matrix_KK)
    assert result.pixels == 0 and confusion.matrix_KK.sum() == 0
    assert all(math.isnan(value) for value in (result.miou, result.mean_accuracy, result.pixel_accuracy, *result.iou_K))
    assert result.to_json(["a", "b", "c"])["miou"] is None
    assert score_table(result, ["a", "b", "c"], "nothing").row_count == 5


def test_a_split_is_one_matrix_and_no_mean_over_images() -> None:
    """By hand: image 1 has 1 pixel of class 1, missed; image 2 has 9, all found. IoU of class 1 is 9/10, not 1/2."""
    confusion = Confusion(2, VOID)
    confusion.add(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]))
    confusion.add(torch.tensor([[1] * 9 + [0]]), torch.tensor([[1] * 9 + [0]]))
    assert score(confusion.matrix_KK).iou_K == (10 / 11, 9 / 10)


def test_void_does_not_count() -> None:
    predicted, truth = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, VOID]])
    confusion = Confusion(2, VOID)
    confusion.add(predicted, truth)
    assert score(confusion.matrix_KK).miou == 1.0


# ---- inference ----


class Toy(nn.Module):
    """A segmenter whose scores are a 3 x 3 convolution of the image: it sees borders, so padding can be noticed."""

    patch_size = 8
    normalize: Any = Segmenter.normalize

    def __init__(self, see: Callable[[Tensor], None] = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.3))
        self.see = see

    def forward(self, images_BCHW: Tensor) -> Scores:
        assert not any(side % self.patch_size for side in images_BCHW.shape[2:])
        self.see(images_BCHW)
        return Scores(self.conv(images_BCHW), None)


def image(height: int = 19, width: int = 29) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_whole_image_is_padded_by_the_mean_and_cut_back() -> None:
    """Scores of real pixels are those of an image that was padded by hand; nothing of the padding comes back."""
    model: nn.Module = Toy()
    normal = (image()[None].float() / 255 - 0.4) / 0.3
    by_hand = torch.zeros(1, 3, 24, 32)
    by_hand[:, :, :19, :29] = normal
    expected = model(by_hand).main[:, :, :19, :29]
    assert torch.equal(image_scores(model, normal, View()), expected)  # type: ignore[arg-type]
    assert torch.equal(predict_classes(model, image(), View()), expected[0].argmax(0))  # type: ignore[arg-type]


def test_a_window_over_all_of_the_image_is_the_whole_image() -> None:
    model: nn.Module = Toy()
    normal = (image()[None].float() / 255 - 0.4) / 0.3
    whole = image_scores(model, normal, View())  # type: ignore[arg-type]
    for window in (32, 40, 400):
        assert torch.equal(image_scores(model, normal, View(window=(window, window))), whole)  # type: ignore[arg-type]


def test_windows_are_averaged_where_they_overlap() -> None:
    """Against a loop over pixels, on windows of 16 every 8 px of an image of 24 x 32 after padding."""
    model: nn.Module = Toy()
    normal = (image()[None].float() / 255 - 0.4) / 0.3
    padded = pad_to(normal, 8)
    tops, lefts = [0, 8], [0, 8, 16]
    assert window_starts(24, 16, 8) == tops and window_starts(32, 16, 8) == lefts
    values: dict[tuple[int, int], list[Tensor]] = {}
    for top in tops:
        for left in lefts:
            scores = model(padded[:, :, top : top + 16, left : left + 16]).main[0]
            for row in range(16):
                for column in range(16):
                    values.setdefault((top + row, left + column), []).append(scores[:, row, column])
    found = image_scores(model, normal, View(window=(16, 16), stride=8))  # type: ignore[arg-type]
    assert found.shape == (1, 4, 19, 29)
    for row in range(19):
        for column in range(29):
            expected = torch.stack(values[row, column]).mean(dim=0)
            torch.testing.assert_close(found[0, :, row, column], expected)


def test_oblong_windows() -> None:
    """Two windows of the full height and half the width, beside each other: each half by itself."""
    model: Any = Toy()
    normal = torch.randn(1, 3, 16, 32)
    halves = [image_scores(model, half, View()) for half in normal.chunk(2, dim=3)]
    found = image_scores(model, normal, View(window=(16, 16), stride=16))
    assert torch.allclose(found, torch.cat(halves, dim=3), atol=1e-5)


def test_a_stride_beyond_the_window_leaves_no_pixel_out() -> None:
    model: nn.Module = Toy()
    normal = (image()[None].float() / 255 - 0.4) / 0.3
    found = image_scores(model, normal, View(window=(8, 8), stride=20))  # type: ignore[arg-type]
    assert torch.equal(found, image_scores(model, normal, View(window=(8, 8), stride=8)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 32, 20), (96, 32, 32), (33, 32, 32), (32, 32, 5), (8, 8, 1)]
)
def test_windows_cover_a_side_and_stay_inside(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    covered = {place for start in starts for place in range(start, start + window)}
    assert covered == set(range(length))
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


def test_flip_and_scales_average_probabilities() -> None:
    model: nn.Module = Toy()
    normal = (image(16, 24)[None].float() / 255 - 0.4) / 0.3
    larger = torch.nn.functional.interpolate(normal, size=(32, 48), mode="bilinear", antialias=True)
    total = torch.zeros(1, 4, 16, 24)
    for seen in (normal, larger):
        total += resized(model(seen).main, (16, 24)).softmax(1)
        total += resized(model(seen.flip(3)).main.flip(3), (16, 24)).softmax(1)
    found = predict_classes(model, image(16, 24), View(scales=(1.0, 2.0), flip=True))  # type: ignore[arg-type]
    assert torch.equal(found, total[0].argmax(0))


def test_scores_and_not_classes_are_resized() -> None:
    """With a shorter side of 8 the model sees a small image; the classes come at the image's own size."""
    sizes: list[tuple[int, ...]] = []
    model: nn.Module = Toy(lambda images: sizes.append(tuple(images.shape[2:])))
    found = predict_classes(model, image(16, 32), View(short_side=8))  # type: ignore[arg-type]
    normal = (image(16, 32)[None].float() / 255 - 0.4) / 0.3
    small = torch.nn.functional.interpolate(normal, size=(8, 16), mode="bilinear", antialias=True)
    assert sizes == [(8, 16)]
    assert torch.equal(found, resized(model(small).main, (16, 32))[0].argmax(0))
