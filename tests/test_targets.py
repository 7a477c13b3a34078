"""Patches, targets and their inverses, the fill from visible patches and the trivial losses, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from torch import Tensor

from maekit.models.mae import MaskedAutoencoder
from maekit.models.masking import make_masks
from maekit.models.targets import (
    bilinear_fill,
    fill_grid,
    make_target,
    patchify,
    take_patches,
    target_spectrum,
    trivial_losses,
    undo_target,
    unpatchify,
)
from maekit.training.monitor import reconstruct, statistics_note
from maekit.weights.passport import Passport
from maekit.weights.store import load


def random_patches(batch: int = 3, num: int = 24, size: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, num, size, dtype=torch.float64, generator=generator) * 2 + 5


# ---- patches ----


def test_patchify_by_hand() -> None:
    """A patch is flattened (row, column, channel): the channel is the fastest."""
    image = torch.tensor([[[1, 2], [3, 4]], [[10, 20], [30, 40]]]).unsqueeze(0)
    assert patchify(image, 2).tolist() == [[[1, 10, 2, 20, 3, 30, 4, 40]]]
    assert patchify(image, 1).tolist() == [[[1, 10], [2, 20], [3, 30], [4, 40]]]


def test_patches_are_row_major() -> None:
    """In an image that is wider than high, patches are counted along the rows."""
    image = torch.arange(24).reshape(1, 1, 4, 6)
    assert patchify(image, 2).tolist() == [
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    ]


@pytest.mark.parametrize(("channels", "grid_hw", "patch"), [(1, (2, 3), 2), (3, (3, 1), 4), (5, (2, 2), 3)])
def test_unpatchify_is_the_inverse(channels: int, grid_hw: tuple[int, int], patch: int) -> None:
    """Both ways round, for any channels and shape."""
    image = torch.rand(2, channels, grid_hw[0] * patch, grid_hw[1] * patch)
    patches = patchify(image, patch)
    assert patches.shape == (2, grid_hw[0] * grid_hw[1], patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, grid_hw), image)


def test_take_patches() -> None:
    """Each sample's own ids, in their order."""
    patches = torch.arange(12).reshape(2, 3, 2)
    assert take_patches(patches, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


# ---- targets ----


def test_normalised_target_by_hand() -> None:
    """Unbiased variance plus 1e-6: (1, 2, 3) has mean 2 and variance 1."""
    target = make_target(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "norm-pixels")
    root = math.sqrt(1 + 1e-6)
    torch.testing.assert_close(target, torch.tensor([-1 / root, 0, 1 / root]).double(), rtol=0, atol=1e-7)


def test_normalised_target_has_mean_0_and_variance_1() -> None:
    """Whatever the patch's brightness and contrast; a flat patch becomes zero, not infinite."""
    target = make_target(random_patches() * torch.linspace(1, 100, 24)[:, None], "norm-pixels")
    assert target.mean(dim=-1).abs().max() < 1e-9
    assert (target.var(dim=-1) - 1).abs().max() < 1e-5
    assert not make_target(torch.full((1, 1, 12), 0.7), "norm-pixels").abs().max() > 1e-3


def test_pixel_target_is_the_pixels() -> None:
    """Nothing is changed, and nothing is brought back."""
    patches = random_patches()
    assert make_target(patches, "pixels") is patches
    ids = torch.arange(24).expand(3, -1)
    assert undo_target(patches, "pixels", "true-patch", patches, ids[:, :6], ids[:, 6:], (4, 6)) is patches


def test_true_patch_statistics_are_the_exact_inverse() -> None:
    """A perfect prediction, un-normalised by the hidden patch's own statistics, is the hidden patch."""
    patches = random_patches()
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    hidden = take_patches(patches, masks.ids_masked_BM)
    perfect = make_target(hidden, "norm-pixels")
    ids = (masks.ids_keep_BV, masks.ids_masked_BM)
    torch.testing.assert_close(undo_target(perfect, "norm-pixels", "true-patch", patches, *ids, (4, 6)), hidden)
    assert torch.equal(undo_target(perfect, "norm-pixels", "none", patches, *ids, (4, 6)), perfect)


def test_visible_statistics_leak_nothing() -> None:
    """Other hidden pixels leave the picture as it was; other visible pixels change it; true-patch would leak."""
    patches = random_patches()
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    ids = (masks.ids_keep_BV, masks.ids_masked_BM)
    prediction = random_patches()[:, :18]
    other = torch.where(masks.masked_BN.unsqueeze(-1), patches * 3 - 7, patches)

    def drawn(statistics: str, seen: Tensor) -> Tensor:
        return undo_target(prediction, "norm-pixels", statistics, seen, *ids, (4, 6))

    assert torch.equal(drawn("visible", patches), drawn("visible", other))
    assert not torch.equal(drawn("true-patch", patches), drawn("true-patch", other))
    assert not torch.equal(drawn("visible", patches), drawn("visible", patches * 3 - 7))


def test_visible_statistics_by_hand() -> None:
    """With one visible patch, its mean and deviation serve every hidden one."""
    patches = torch.tensor([[[1.0, 3.0], [7.0, 7.0], [0.0, 9.0]]])
    prediction = torch.tensor([[[0.0, 1.0], [-1.0, 2.0]]])
    drawn = undo_target(
        prediction, "norm-pixels", "visible", patches, torch.tensor([[0]]), torch.tensor([[1, 2]]), (1, 3)
    )
    root = math.sqrt(2 + 1e-6)
    torch.testing.assert_close(drawn, torch.tensor([[[2.0, 2 + root], [2 - root, 2 + 2 * root]]]))


# ---- the fill ----


def fill(values: list[float], visible: list[int], grid_hw: tuple[int, int]) -> list[float]:
    filled = fill_grid(torch.tensor(values, dtype=torch.float64)[None, :, None], torch.tensor([visible]), grid_hw)
    return filled[0, :, 0].tolist()


def test_fill_by_hand() -> None:
    """Weights 1 / distance, visible patches keep their value."""
    near, far = 1.0, 1 / math.sqrt(2)
    assert fill([10, 20], [0, 2], (1, 3)) == pytest.approx([10, 15, 20])
    assert fill([10, 20], [0, 1], (1, 3)) == pytest.approx([10, 20, (10 / 2 + 20) / 1.5])
    assert fill([1, 2], [0, 1], (2, 2)) == pytest.approx(
        [1, 2, (near * 1 + far * 2) / (near + far), (far * 1 + near * 2) / (near + far)]
    )
    assert fill([7], [3], (2, 2)) == pytest.approx([7] * 4)


def test_fill_follows_the_ids_not_their_order() -> None:
    """The value belongs to its id, in whatever order the visible patches come."""
    assert fill([20, 10], [2, 0], (1, 3)) == pytest.approx([10, 15, 20])
    ascending = fill([1, 2, 3, 4, 5, 6], [0, 3, 7, 8, 11, 14], (3, 5))
    assert fill([4, 1, 6, 3, 2, 5], [8, 0, 14, 7, 3, 11], (3, 5)) == pytest.approx(ascending)


def test_fill_takes_four_and_breaks_ties_by_number() -> None:
    """Eight visible patches a knight's move from the centre of 5 x 5: the four of the smallest numbers count."""
    knight = [1, 3, 5, 9, 15, 19, 21, 23]
    values = [1.0, 2.0, 3.0, 4.0, 100.0, 100.0, 100.0, 100.0]
    assert fill(values, knight, (5, 5))[12] == pytest.approx(2.5)
    assert fill(values[::-1], knight[::-1], (5, 5))[12] == pytest.approx(2.5)


def test_fill_is_per_sample() -> None:
    """Two samples with different masks in one batch are filled as each alone."""
    values = torch.rand(2, 3, 2)
    ids = torch.tensor([[0, 5, 7], [1, 2, 8]])
    together = fill_grid(values, ids, (3, 3))
    for index in range(2):
        torch.testing.assert_close(
            fill_grid(values[index : index + 1], ids[index : index + 1], (3, 3))[0], together[index]
        )


def test_bilinear_fill_keeps_a_constant_image() -> None:
    """Each channel's colour comes back at every pixel, whatever the mask."""
    image = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(2, 3, 12, 16)
    patches = patchify(image, 4)
    masks = make_masks("random", (3, 4), 0.75, range(2), seed=0)
    torch.testing.assert_close(bilinear_fill(patches, masks.ids_keep_BV, (3, 4), 4), patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [2, 3])
def test_bilinear_fill_keeps_a_ramp_inside(axis: int) -> None:
    """A linear ramp with one hidden inner patch is reproduced, but for the half patch at the edges (clamped)."""
    size = [20, 28]
    ramp = torch.arange(size[axis - 2], dtype=torch.float64)
    image = (ramp[:, None] if axis == 2 else ramp[None, :]).expand(1, 2, *size).contiguous()
    visible = torch.tensor([[number for number in range(35) if number != 17]])
    filled = unpatchify(bilinear_fill(patchify(image, 4), visible, (5, 7), 4), 4, (5, 7))
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(filled[inside], image[inside], rtol=0, atol=1e-6)
    assert filled.select(axis, 0).unique().tolist() == pytest.approx([1.5])


def test_bilinear_fill_uses_no_hidden_pixels() -> None:
    """The trivial predictor sees what the model sees."""
    patches = random_patches()
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    other = torch.where(masks.masked_BN.unsqueeze(-1), -patches, patches)
    first, second = (bilinear_fill(seen, masks.ids_keep_BV, (4, 6), 4) for seen in (patches, other))
    assert torch.equal(first, second)


# ---- trivial losses ----


def test_trivial_pixel_losses_by_hand() -> None:
    """2 x 2 patches of one pixel, 1 and 2 visible, 3 and 4 hidden: the mean says 1.5, the fill is worked above."""
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], dtype=torch.float64)
    ids = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    far = 1 / math.sqrt(2)
    third, fourth = (1 + far * 2) / (1 + far), (far * 1 + 2) / (1 + far)
    expected = [(1.5**2 + 2.5**2) / 2, ((3 - third) ** 2 + (4 - fourth) ** 2) / 2]
    assert trivial_losses(patches, *ids, "pixels", (2, 2), 1)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_trivial_pixel_mean_is_per_image_and_channel() -> None:
    """Images of one colour each are predicted exactly by both: the mean is not one over the batch or the channels."""
    colours = torch.rand(3, 2, 1, 1, dtype=torch.float64).expand(3, 2, 8, 12)
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    losses = trivial_losses(patchify(colours, 2), masks.ids_keep_BV, masks.ids_masked_BM, "pixels", (4, 6), 2)
    assert losses.max() < 1e-10


@pytest.mark.parametrize("size", [4, 48])
def test_zero_predictor_of_normalised_pixels(size: int) -> None:
    """Its loss is (n - 1) / n for patches of n values, as the variance is the unbiased one: about 1."""
    patches = random_patches(size=size) * 100
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    patch = math.isqrt(size // (3 if size == 48 else 1))
    zero, filled = trivial_losses(patches, masks.ids_keep_BV, masks.ids_masked_BM, "norm-pixels", (4, 6), patch)
    assert zero.tolist() == pytest.approx([(size - 1) / size] * 3, rel=1e-6)
    assert (filled > zero).all()  # on noise a guess is worse than none


def test_fill_predictor_of_normalised_pixels_sees_structure() -> None:
    """On a ramp the fill, normalised by its own statistics, beats zero by far."""
    ramp = torch.arange(24, dtype=torch.float64).expand(1, 1, 16, 24)
    keep = torch.tensor([[number for number in range(24) if number not in (8, 9, 15)]])
    hidden = torch.tensor([[8, 9, 15]])
    zero, filled = trivial_losses(patchify(ramp, 4), keep, hidden, "norm-pixels", (4, 6), 4)
    assert zero.item() == pytest.approx(15 / 16, rel=1e-5)
    assert filled < 0.05


# ---- spectral targets ----

SPECTRAL = ["norm-pixels-highpass", "norm-pixels-whitened"]


def filtered_by_loops(patch_P: list[float], side: int, channels: int, kind: str, cut: int) -> list[float]:
    """Each channel's cosine transform by its definition, its frequencies weighted, and back: four loops deep."""
    places = [(i, j) for i in range(side) for j in range(side)]

    def wave(u: int, i: int) -> float:
        return math.sqrt((2 if u else 1) / side) * math.cos(math.pi * u * (2 * i + 1) / (2 * side))

    out = [0.0] * len(patch_P)
    for channel in range(channels):
        value = {(i, j): patch_P[(i * side + j) * channels + channel] for i, j in places}
        for u, v in places:
            amount = sum(value[i, j] * wave(u, i) * wave(v, j) for i, j in places)
            amount *= float(u + v >= cut) if kind == "norm-pixels-highpass" else math.sqrt(u * u + v * v)
            for i, j in places:
                out[(i * side + j) * channels + channel] += amount * wave(u, i) * wave(v, j)
    return out


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize(("side", "channels", "cut"), [(4, 3, 2), (3, 1, 1), (2, 2, 2), (5, 1, 4)])
def test_spectral_targets_by_loops(kind: str, side: int, channels: int, cut: int) -> None:
    """Normalised first, then filtered; float32's rounding of the matrix is all that differs."""
    patches = random_patches(1, 3, side * side * channels)
    filter_PP = target_spectrum(kind, side, channels, cut)
    found = make_target(patches, kind, filter_PP)[0]
    normal = make_target(patches, "norm-pixels")[0]
    for index in range(3):
        expected = filtered_by_loops(normal[index].tolist(), side, channels, kind, cut)
        assert found[index].tolist() == pytest.approx(expected, abs=2e-6)


def test_highpass_by_hand() -> None:
    """2 x 2: without the mean a slope stays, without the slopes the checkerboard alone; colours are filtered apart."""
    cuts = {cut: target_spectrum("norm-pixels-highpass", 2, 1, cut) for cut in (1, 2)}
    patch = torch.tensor([4.0, 0.0, 2.0, 2.0])  # mean 2; rows 2 and 2, columns 3 and 1; (a - b - c + d) / 4 = 1
    assert cuts[1] is not None
    assert cuts[2] is not None
    torch.testing.assert_close(patch @ cuts[1], torch.tensor([2.0, -2.0, 0.0, 0.0]))
    torch.testing.assert_close(patch @ cuts[2], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    two = target_spectrum("norm-pixels-highpass", 2, 2, 2)
    assert two is not None
    both = torch.stack([patch, torch.tensor([5.0, 5.0, 5.0, 5.0])], dim=1).flatten() @ two
    torch.testing.assert_close(both.reshape(4, 2)[:, 0], patch @ cuts[2])
    torch.testing.assert_close(both.reshape(4, 2)[:, 1], torch.zeros(4), rtol=0, atol=1e-6)
    assert target_spectrum("norm-pixels", 2, 1, 2) is None


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_targets_are_undone(kind: str) -> None:
    """A perfect prediction with the hidden patch's own statistics is the hidden patch, whatever the target left out."""
    patches = random_patches(size=48)  # 4 x 4 x 3
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    ids = (masks.ids_keep_BV, masks.ids_masked_BM)
    hidden = take_patches(patches, masks.ids_masked_BM)
    filter_PP = target_spectrum(kind, 4, 3, 2)
    perfect = make_target(hidden, kind, filter_PP)
    drawn = undo_target(perfect, kind, "true-patch", patches, *ids, (4, 6), 4, filter_PP)
    torch.testing.assert_close(drawn, hidden, rtol=0, atol=1e-5)
    assert undo_target(perfect, kind, "none", patches, *ids, (4, 6), 4, filter_PP) is perfect


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_pictures_from_visible_patches_leak_nothing(kind: str) -> None:
    """What the target leaves out is the fill's then: with no prediction, its low frequencies are what is drawn."""
    patches = random_patches(size=48)
    masks = make_masks("random", (4, 6), 0.75, range(3), seed=0)
    ids = (masks.ids_keep_BV, masks.ids_masked_BM)
    filter_PP = target_spectrum(kind, 4, 3, 2)
    prediction = random_patches(size=48)[:, :18]
    other = torch.where(masks.masked_BN.unsqueeze(-1), patches * 3 - 7, patches)

    def drawn(seen: Tensor, predicted: Tensor) -> Tensor:
        return undo_target(predicted, kind, "visible", seen, *ids, (4, 6), 4, filter_PP)

    assert torch.equal(drawn(patches, prediction), drawn(other, prediction))
    assert not torch.equal(drawn(patches, prediction), drawn(patches * 3 - 7, prediction))
    fill = take_patches(bilinear_fill(patches, masks.ids_keep_BV, (4, 6), 4), masks.ids_masked_BM)
    means = drawn(patches, torch.zeros_like(prediction)).reshape(3, 18, 16, 3).mean(dim=2)
    torch.testing.assert_close(means, fill.reshape(3, 18, 16, 3).mean(dim=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_trivial_losses(kind: str) -> None:
    """Zero, whose loss is the target's own mean square; and the target of the fill, which is exact where it fits."""
    ramp = torch.linspace(0, 1, 24, dtype=torch.float64).expand(1, 3, 16, 24)
    noise = torch.rand(1, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = make_masks("random", (4, 6), 0.5, range(1), seed=0)
    filter_PP = target_spectrum(kind, 4, 3, 2)
    for image in (ramp, noise):
        patches = patchify(image, 4)
        hidden = take_patches(patches, masks.ids_masked_BM)
        fill = take_patches(bilinear_fill(patches, masks.ids_keep_BV, (4, 6), 4), masks.ids_masked_BM)
        target, guess = (make_target(values, kind, filter_PP) for values in (hidden, fill))
        found = trivial_losses(patches, masks.ids_keep_BV, masks.ids_masked_BM, kind, (4, 6), 4, filter_PP)
        assert found[:, 0].tolist() == pytest.approx([float((target**2).mean()), float(((guess - target) ** 2).mean())])


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("statistics", ["true-patch", "visible", "none"])
def test_a_model_with_a_spectral_target_is_drawn(kind: str, statistics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that predicts its own target perfectly has the loss 0 and, by the true patches' statistics, the image."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny_config(target=kind), (0.4,) * 3, (0.3,) * 3).eval()
    images = torch.rand(2, 3, 16, 24)
    normal = patchify(model.normalize(images), 4)
    ids = torch.arange(24).expand(2, -1)
    keep, masked = ids[:, :6], ids[:, 6:]
    perfect = make_target(take_patches(normal, masked), kind, model.spectrum)
    assert model(model.normalize(images), keep).loss.item() > 0.1
    monkeypatch.setattr(model.decoder, "forward", lambda *_: perfect)
    assert float(model(model.normalize(images), keep).loss) == 0
    shown = reconstruct(model, images, keep, masked, statistics)
    truth = take_patches(patchify(images, 4), masked)
    same = torch.allclose(torch.from_numpy(shown[0].pred_MP), truth[0], atol=1e-4)
    assert same == (statistics == "true-patch")
    note = statistics_note(model, statistics)
    assert "target leaves out" in note


@pytest.mark.parametrize("kind", SPECTRAL)
def test_a_spectral_target_comes_back_from_a_file(kind: str, tmp_path: Path) -> None:
    """The matrix is no weight: target and cut stand in the passport, and the loss is the same to the bit."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny_config(target=kind, target_cut=3), (0.4,) * 3, (0.3,) * 3)
    passport = Passport(model=model.config, mean=(0.4,) * 3, std=(0.3,) * 3, grid=model.grid_hw)
    save_file(model.state_dict(), tmp_path / "m.safetensors", passport.to_metadata())
    assert "spectrum" not in model.state_dict()
    loaded = load(tmp_path / "m.safetensors")
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(loaded(images).loss, model(images).loss)
    assert (loaded.config.target, loaded.config.target_cut) == (kind, 3)
