"""The paper's linear probe: a LARS step by hand, a sweep against separate runs, batch and schedule, what it reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from maekit.training.linear_probe import EPOCHS, RATES, LarsSweep, scaled_batch, schedule, train_sweep


def blobs(samples: int, classes: int = 3, width: int = 6, distance: float = 3.0) -> tuple[Tensor, Tensor]:
    """Overlapping classes in dimensions of very different scale."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    features = torch.randn(samples, width, generator=generator) + distance * torch.eye(width)[labels]
    return features * torch.tensor([1, 100, 0.01, 1, 1, 5][:width]) + 5, labels


def test_two_lars_steps_by_hand() -> None:
    """Trust ratio 0.001 x |w| / |g| on the weights although nothing decays, none on the bias; momentum 0.9; the rate
    comes after the momentum."""
    labels = torch.arange(30) % 3
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(2)) + torch.eye(6)[labels]
    sweep = LarsSweep(6, 3, (2.0,), seed=1)
    weight, bias = sweep.weights[0].detach().double().T, sweep.biases[0].detach().double()
    normal = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    normal = normal.double()
    one_hot = torch.eye(3, dtype=torch.float64)[labels]
    moving_weight, moving_bias = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for share in (0.5, 1.0):
        sweep.update(features, labels, share)
        error = ((normal @ weight + bias).softmax(dim=1) - one_hot) / 30
        slope = normal.T @ error
        trust = 0.001 * math.sqrt(float((weight**2).sum())) / math.sqrt(float((slope**2).sum()))
        moving_weight = 0.9 * moving_weight + trust * slope
        moving_bias = 0.9 * moving_bias + error.sum(dim=0)
        weight = weight - 2.0 * share * moving_weight
        bias = bias - 2.0 * share * moving_bias
        torch.testing.assert_close(sweep.weights[0].double().T, weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sweep.biases[0].double(), bias, rtol=1e-4, atol=1e-6)
    assert trust < 0.01, "without the ratio the step would be a hundred times as long"


def test_a_sweep_is_its_separate_runs() -> None:
    """Classifiers that are trained side by side do not feel each other: each ends as it does alone."""
    features, labels = blobs(300)
    rates = (0.3, 6.4, 30.0)
    together = train_sweep(features, labels, 3, rates, epochs=5, seed=3)
    for place, rate in enumerate(rates):
        alone = train_sweep(features, labels, 3, (rate,), epochs=5, seed=3)
        torch.testing.assert_close(together.weights[place], alone.weights[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(together.predict(features)[place], alone.predict(features)[0])
    assert not torch.allclose(together.weights[0], together.weights[1], rtol=0.1)


def test_predictions_use_running_statistics() -> None:
    """A sample's class does not depend on the others it is predicted with; the logits are those of torch's modules."""
    features, labels = blobs(400)
    sweep = train_sweep(features, labels, 3, (3.2, 6.4), epochs=20)
    whole = sweep.predict(features)
    assert torch.equal(whole[:, 7:9], sweep.predict(features[7:9]))
    plain = nn.Sequential(nn.BatchNorm1d(6, affine=False, eps=1e-6), nn.Linear(6, 3)).eval()
    plain[0].load_state_dict(sweep.norm.state_dict())
    plain[1].weight.data, plain[1].bias.data = sweep.weights[1].data, sweep.biases[1].data
    assert torch.equal(whole[1], plain(features).argmax(dim=1))
    assert sweep.training
    assert sweep.accuracies(features, labels)[1] == pytest.approx(float((whole[1] == labels).float().mean()))


def test_it_separates_what_can_be_separated() -> None:
    """Far apart classes, scales from 0.01 to 100: some rate gets nearly all right; rows of two views count as one."""
    features, labels = blobs(600, distance=9.0)
    assert max(train_sweep(features, labels, 3, RATES).accuracies(features, labels)) > 0.99
    steps: list[int] = []
    both = features.repeat(2, 1), labels.repeat(2)
    train_sweep(*both, 3, RATES, images=600, epochs=3, on_progress=lambda done, total: steps.append(total))
    assert steps == [3 * (600 // 256)] * (3 * (600 // 256))


@pytest.mark.parametrize(
    ("images", "batch"), [(1_281_167, 16384), (5_000_000, 16384), (50_000, 1024), (1438, 256), (100, 100), (1, 1)]
)
def test_the_batch_is_the_papers_in_proportion(images: int, batch: int) -> None:
    """ImageNet gets 16384, and CIFAR the next power of two above 50,000 x 16384 / 1,281,167 = 639."""
    assert scaled_batch(images) == batch


def test_the_schedule_is_the_papers() -> None:
    """A ninth of warm-up from 0, the whole rate at its end, half of it half-way down, nearly nothing at the end."""
    shares = [schedule(step, 9 * EPOCHS) for step in range(9 * EPOCHS)]
    assert shares[0] == 0
    assert shares[45] == pytest.approx(0.5)
    assert shares[90] == 1.0 == max(shares)
    assert shares[90 + 360] == pytest.approx(0.5)
    assert 0 < shares[-1] < 1e-4


def statistics(sweep: LarsSweep) -> tuple[Tensor, Tensor]:
    mean, variance = sweep.norm.running_mean, sweep.norm.running_var
    assert mean is not None and variance is not None
    return mean, variance


def test_a_short_training_is_scored_by_the_statistics_of_its_rows() -> None:
    """Thirty steps leave 0.04 of a batch norm's first mean, 0, and features around 1,000 would be far off."""
    labels = torch.arange(60) // 20
    features = 1000 + 6 * torch.eye(3)[labels] + torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    sweep = train_sweep(features, labels, 3, RATES, epochs=30)
    mean, variance = statistics(sweep)
    assert torch.allclose(mean, features.mean(dim=0), rtol=1e-4)
    assert torch.allclose(variance, features.var(dim=0), rtol=1e-3)
    assert max(sweep.accuracies(features, labels)) > 0.9


def test_the_statistics_of_a_short_training_are_of_mixed_rows() -> None:
    """Batches in the order of the classes would each have the variance of one class alone."""
    labels = torch.arange(600) // 300
    features = 10.0 * labels[:, None] + torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    sweep = train_sweep(features, labels, 2, RATES, epochs=2)  # two batches of 256 an epoch
    assert scaled_batch(600) == 256
    assert torch.allclose(statistics(sweep)[1], features.var(dim=0), rtol=0.1)


def test_a_long_training_keeps_the_statistics_that_ran_along() -> None:
    """So that published cards keep their numbers."""
    features, labels = blobs(60)
    sweep = train_sweep(features, labels, 3, RATES, epochs=100)
    assert sweep.norm.momentum == 0.1
