"""How good frozen features are: k-NN, linear classifiers, effective rank. All read features; none trains an encoder.

Shapes: S samples, D features, K or C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
"""Wu et al. 2018 (arXiv 1805.01978) use 200 and 0.07 on ImageNet; 20 suits sets of some thousand images."""
KNN_BLOCK = 2**26
"""Similarities that are in memory at once: 256 MiB."""
AXES_ROWS = 10_000
"""Samples, about, that principal axes are taken from."""


def knn_accuracy(
    train_SD: Tensor,
    train_labels_S: Tensor,
    test_SD: Tensor,
    test_labels_S: Tensor,
    *,
    neighbours: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> float:
    """Share of test samples whose nearest training samples vote for the right class, as `knn_predict` has it."""
    voted = knn_predict(train_SD, train_labels_S, test_SD, (neighbours,), (temperature,))[neighbours, temperature]
    return int((voted == test_labels_S).sum()) / len(test_labels_S)


def knn_predict(
    train_SD: Tensor,
    train_labels_S: Tensor,
    test_SD: Tensor,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], Tensor]:
    """The classes [S] that the nearest training samples vote for, by (neighbours, temperature), from one search.

    Cosine similarity of the features, centred on the training mean; votes weighted by exp(similarity / temperature)
    (arXiv 1805.01978, section 3.4). Ties go to the smaller class. More neighbours than there are: all vote.
    """
    centre = train_SD.mean(dim=0)
    train, test = F.normalize(train_SD - centre, dim=1), F.normalize(test_SD - centre, dim=1)
    classes, most = int(train_labels_S.max()) + 1, min(max(neighbours), len(train))
    found: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in neighbours for t in temperatures}
    for part in test.split(max(1, min(1024, KNN_BLOCK // len(train)))):
        similarity, nearest = (part @ train.T).topk(most, dim=1)
        labels = train_labels_S[nearest]
        for temperature in temperatures:
            # Against the nearest one's: the order of the classes stays, and exp does not overflow.
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            votes = torch.zeros(len(part), classes, device=part.device, dtype=part.dtype)
            counted = 0
            for k in sorted(set(neighbours)):
                votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
                counted = min(k, most)
                found[k, temperature].append(votes.argmax(dim=1))
    return {key: torch.cat(voted) for key, voted in found.items()}


def standardisation(features_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature [D], as a batch normalisation takes them.

    The paper's epsilon (its code's 1e-6) is inside of the root: a feature that is constant here may differ a little in
    the images that are scored, such as a border of another gray, and must not outweigh all others there.
    """
    variance, mean = torch.var_mean(features_SD, dim=0, correction=0)
    return mean, (variance + 1e-6).sqrt()


def ridge_accuracy(train_SD: Tensor, train_labels_S: Tensor, test_SD: Tensor, test_labels_S: Tensor) -> float:
    """Accuracy of a closed-form linear classifier on standardised features: quick enough to run during training."""
    from sklearn.linear_model import RidgeClassifier  # seconds of import that a run without labels need not pay

    mean, deviation = standardisation(train_SD)
    classifier = RidgeClassifier(alpha=0.01 * len(train_SD))
    classifier.fit(((train_SD - mean) / deviation).cpu().numpy(), train_labels_S.cpu().numpy())
    return float(classifier.score(((test_SD - mean) / deviation).cpu().numpy(), test_labels_S.cpu().numpy()))


def ridge_predict(
    train_SD: Tensor, train_labels_S: Tensor, num_classes: int, test_SD: Tensor, strengths: Sequence[float]
) -> dict[float, Tensor]:
    """Classes [S] by least squares on one-hot labels and standardised features, for each strength of the penalty.

    Milliseconds where L-BFGS takes seconds. A strength s stands for a penalty of s x |w|^2 beside the mean of the
    squared errors.
    """
    mean, deviation = standardisation(train_SD)
    precise = torch.device("cpu") if train_SD.device.type == "mps" else train_SD.device
    train = ((train_SD - mean) / deviation).to(precise)
    targets_SC = F.one_hot(train_labels_S, num_classes).to(precise, train.dtype)
    prior_C = targets_SC.mean(dim=0)
    # Products in the features' own precision, which is where the time goes; what is solved in float64, which MPS lacks.
    covariance_DD = (train.T @ train).double() / len(train)
    one_DD = torch.eye(len(covariance_DD), dtype=covariance_DD.dtype, device=precise)
    along_DC = (train.T @ (targets_SC - prior_C)).double() / len(train)
    test = ((test_SD - mean) / deviation).to(precise)
    found = {}
    for strength in strengths:
        factor_DD = torch.linalg.cholesky(covariance_DD + strength * one_DD)
        weight_DC = torch.cholesky_solve(along_DC, factor_DD)
        found[strength] = (test @ weight_DC.to(test.dtype) + prior_C).argmax(dim=1).to(test_SD.device)
    return found


def rankme(features_SD: Tensor) -> float:
    """Effective number of dimensions: exp of the entropy of the normalised singular values (arXiv 2210.02885)."""
    values = torch.linalg.svdvals(features_SD.cpu().double())
    share = values / values.sum() + 1e-7
    return float((-(share * share.log()).sum()).exp())


Axes = tuple[Tensor, Tensor]
"""Principal axes [D, R] of standardised features, and the variance along each [R]."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on standardised features: logits = ((x - mean) / deviation) @ weight + bias."""

    mean_D: Tensor
    deviation_D: Tensor
    weight_DK: Tensor
    bias_K: Tensor
    decay: float

    def predict(self, features_SD: Tensor) -> Tensor:
        """Classes [S]."""
        return (((features_SD - self.mean_D) / self.deviation_D) @ self.weight_DK + self.bias_K).argmax(dim=1)

    def accuracy(self, features_SD: Tensor, labels_S: Tensor) -> float:
        """Share of samples classified rightly."""
        return int((self.predict(features_SD) == labels_S).sum()) / len(labels_S)


def fit_linear(
    features_SD: Tensor,
    labels_S: Tensor,
    num_classes: int,
    decay: float,
    start: LinearProbe | None = None,
    axes: Axes | None = None,
) -> LinearProbe:
    """One of `fit_linear_path`."""
    return next(fit_linear_path(features_SD, labels_S, num_classes, (decay,), start, axes))


def fit_linear_path(
    features_SD: Tensor,
    labels_S: Tensor,
    num_classes: int,
    decays: Sequence[float],
    start: LinearProbe | None = None,
    axes: Axes | None = None,
) -> Iterator[LinearProbe]:
    """Multinomial logistic regression by L-BFGS on standardised features, for one decay after the other.

    Standardising is the paper's batch normalisation without affine (appendix A.1) computed over the whole set.
    decays: factors of the squared weights in the mean loss, best from large to small: each fit begins where the last
    one ended; the bias is free.
    start: where the first fit begins, default zero. The minimum is the same; one of similar samples is nearer to it.
    axes: `principal_axes` of similar samples, which take seconds to find where features are thousands; left out where
        samples are fewer than features.
    """
    mean, deviation = standardisation(features_SD)
    inputs_SD = (features_SD - mean) / deviation
    axes_DR, variance_R = axes if axes is not None and len(inputs_SD) >= mean.numel() else _axes_of(inputs_SD)
    turned_SR = inputs_SD @ axes_DR
    if start is None:
        weight_KR, bias_K = turned_SR.new_zeros(num_classes, len(variance_R)), turned_SR.new_zeros(num_classes)
    else:
        weight_KR, bias_K = start.weight_DK.T @ axes_DR, start.bias_K
    for decay in decays:
        # The loss's curvature at zero weights, along the axes: x x' / K + 2 decay.
        scale_R = (variance_R / num_classes + max(2 * decay, 1e-6)).rsqrt()
        weight_KR, bias_K = _minimise(turned_SR, labels_S, decay, scale_R, weight_KR, bias_K)
        yield LinearProbe(mean, deviation, axes_DR @ weight_KR.T, bias_K, decay)


def principal_axes(features_SD: Tensor) -> Axes:
    """The axes along which a fit to these features is searched, for fits to others like them; a whole basis.

    Raises:
        AssertionError: fewer samples than features.
    """
    assert len(features_SD) >= features_SD.shape[1], features_SD.shape
    mean, deviation = standardisation(features_SD)
    return _axes_of((features_SD - mean) / deviation)


def _axes_of(inputs_SD: Tensor) -> Axes:
    """Axes [D, R] that span all inputs, and the variance along each; of fewer samples than features as many as samples.

    Taken from a part of many samples: that decides how fast a fit is, not where it goes.
    """
    samples, width = inputs_SD.shape
    some_SD = inputs_SD[:: max(1, samples // max(AXES_ROWS, 2 * width))]
    precise = torch.device("cpu") if inputs_SD.device.type == "mps" else inputs_SD.device
    if samples >= width:
        variance_R, axes_DR = torch.linalg.eigh((some_SD.T @ some_SD).to(precise) / len(some_SD))
        return axes_DR.to(inputs_SD.device), variance_R.clamp_min(0).to(inputs_SD.device)
    variance_R, left_SR = torch.linalg.eigh((some_SD @ some_SD.T).to(precise) / samples)
    kept_R = variance_R > 1e-6 * variance_R[-1]
    variance_R, left_SR = variance_R[kept_R].to(inputs_SD.device), left_SR[:, kept_R].to(inputs_SD.device)
    return some_SD.T @ (left_SR / (samples * variance_R).sqrt()), variance_R


def _minimise(
    inputs_SR: Tensor, labels_S: Tensor, decay: float, scale_R: Tensor, weight_KR: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights [K, R] and biases [K] of the least mean cross-entropy + decay x |weights|^2, searched from those given.

    L-BFGS works on u, where the weights are u x scale and the loss's curvature in u is about 1: 20 to 50 evaluations
    come to a minimum that plain L-BFGS is far from after 60 (raw pixels, decay 1e-5: a loss of 1.476 against 1.632).
    """
    # [K, R] as in F.linear: the gradient of an [S, R] @ [R, K] product takes 7 times as long where R >> K (MKL, AVX2).
    u_KR, bias_K = (weight_KR / scale_R).requires_grad_(), bias_K.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [u_KR, bias_K], max_iter=100, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight_KR = u_KR * scale_R
        loss = F.cross_entropy(F.linear(inputs_SR, weight_KR, bias_K), labels_S) + decay * weight_KR.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (u_KR * scale_R).detach(), bias_K.detach()
