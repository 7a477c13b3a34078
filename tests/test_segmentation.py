"""Segmenter and heads: against loops and products by hand, where their inputs come from, and what the loss counts.

The encoder is 32 wide with patches of 4 px; images of 16 x 24 px have a grid of 4 x 6.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from maekit.config import UserError
from maekit.config.segmentation import HeadConfig
from maekit.models.dense_heads import BINS, LinearHead, PyramidPooling, UperNet
from maekit.models.segmentation import Scores, Segmenter, chosen_blocks, loss_denominator, pixel_loss
from maekit.weights.segmenters import dense_encoder
from maekit.weights.store import random_model

VOID = -1


def segmenter(
    kind: Any = "upernet", crop: tuple[int, int] = (16, 24), auxiliary: bool = True, **head: Any
) -> Segmenter:
    torch.manual_seed(0)
    model = random_model(tiny_config(depth=4))
    head_config = HeadConfig(kind, 8, auxiliary=auxiliary and kind == "upernet", **head)
    return Segmenter(dense_encoder(model, crop, 0.0), head_config, 5, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def images(height: int = 16, width: int = 24, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- the encoder under a head ----


@pytest.mark.parametrize("kind", ["upernet", "fpn", "linear"])
@pytest.mark.parametrize("size", [(16, 24), (8, 8), (40, 12), (4, 4)])
def test_scores_have_the_size_of_the_image(kind: str, size: tuple[int, int]) -> None:
    model = segmenter(kind).eval()
    assert model(images(*size)).main.shape == (2, 5, *size)
    assert model(images(*size)).auxiliary is None


def test_maps_are_the_encoders_own_outputs() -> None:
    """At the encoder's own size against timm's forward pass; the last block's map has the last norm, others none."""
    model = segmenter().eval()
    encoder: Any = model.encoder
    batch = images()
    kept: list[Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _m, _i, out: kept.append(out))
    normed = encoder.forward_features(batch)
    outputs, kept = [*kept[:3], normed], []
    for index, found in enumerate(model.feature_maps(batch)):
        expected = outputs[index][:, 1:].transpose(1, 2).reshape(2, 32, 4, 6)
        torch.testing.assert_close(found, expected)


def test_other_sizes_get_resized_positions() -> None:
    """As an encoder that is built at the other size and given timm's resized table."""
    model = segmenter(crop=(16, 24)).eval()
    other = segmenter(crop=(16, 24)).eval()
    encoder: Any = other.encoder
    table = resample_abs_pos_embed(encoder.pos_embed, [8, 5], [4, 6], num_prefix_tokens=1)
    bigger: Any = segmenter(crop=(32, 20)).eval()
    state = {name: value for name, value in model.state_dict().items() if name != "encoder.pos_embed"}
    bigger.load_state_dict(state | {"encoder.pos_embed": table})
    torch.testing.assert_close(model(images(32, 20)).main, bigger(images(32, 20)).main)
    assert not torch.allclose(model.positions((8, 5))[:, 1:], encoder.pos_embed[:, 1:2])
    assert model.positions((4, 6)) is model.encoder.pos_embed


def test_resized_positions_follow_new_weights() -> None:
    """What was made for a grid is not kept when other weights are loaded."""
    model = segmenter().eval()
    before = model.positions((8, 5)).clone()
    table = model.encoder.pos_embed
    assert table is not None and not table.requires_grad
    with torch.no_grad():
        table.mul_(2)
    torch.testing.assert_close(model.positions((8, 5)), 2 * before)


def test_learned_positions_learn_at_other_sizes() -> None:
    torch.manual_seed(0)
    model = random_model(tiny_config(depth=4, pos_embed="learned"))
    dense = Segmenter(dense_encoder(model, (16, 24), 0.0), HeadConfig("fpn", 8), 5, (0.5,) * 3, (0.5,) * 3)
    dense(images(32, 20)).main.square().mean().backward()
    table = dense.encoder.pos_embed
    assert table is not None and table.grad is not None and bool((table.grad[:, 1:] != 0).any())


def test_uint8_images_are_normalised() -> None:
    model = segmenter().eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normal = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(pixels).main, model(normal).main)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(UserError, match="multiples of the patch of 4 px"):
        segmenter()(images(18, 24))
    with pytest.raises(UserError, match=r"--crop 18: not a multiple of the patch of 4 px: take --crop 16"):
        segmenter(crop=(18, 18))


def test_dense_encoder_keeps_the_weights_and_adds_drop_path() -> None:
    model = random_model(tiny_config(depth=3))
    encoder: Any = dense_encoder(model, (32, 32), 0.2)
    own = model.encoder.state_dict()
    for name, value in encoder.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(value, own[name]), name
    assert encoder.pos_embed.shape == (1, 65, 32)
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_short_encoders_feed_all_four_levels(depth: int) -> None:
    encoder: Any = dense_encoder(random_model(tiny_config(depth=depth)), (16, 16), 0.0)
    model = Segmenter(encoder, HeadConfig("upernet", 8), 3, (0.5,) * 3, (0.2,) * 3).eval()
    assert len(model.block_ids) == 4 and model(images(16, 16)).main.shape[1:] == (3, 16, 16)


def test_pixels_and_floats_are_normalised_alike() -> None:
    model = segmenter().eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normal = model.normalize(pixels)
    assert torch.allclose(model.normalize(pixels / 255), normal)
    assert torch.allclose(normal, (pixels / 255 - model.mean) / model.std)
    assert torch.equal(model(pixels).main, model(normal).main)


# ---- heads ----


def test_linear_head_is_batch_norm_and_a_product() -> None:
    model = segmenter("linear")
    model.train()
    batch = images()
    found = model(batch).main
    head = model.head
    assert isinstance(head, LinearHead) and head.classifier.bias is not None
    tokens = model.encoder.forward_features(batch)[:, 1:]  # [B, N, D]
    flat = tokens.flatten(0, 1).double()
    normal = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    scores = normal @ head.classifier.weight[:, :, 0, 0].double().T + head.classifier.bias.double()
    grid = scores.view(2, 4, 6, 5).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(found, F.interpolate(grid, size=(16, 24), mode="bilinear"), rtol=1e-4, atol=1e-5)


def test_linear_head_leaves_the_encoder_alone() -> None:
    model = segmenter("linear")
    model.train()
    assert not model.encoder.training and model.head.training
    model(images()).main.square().mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_pyramid_pooling_against_a_loop() -> None:
    """Cells of the size 7 x 5 map as intervals [floor(i h / n), ceil((i + 1) h / n)), averaged one number at a time."""
    torch.manual_seed(0)
    pooling = PyramidPooling(3, 4).eval()
    batch = torch.randn(2, 3, 7, 5)
    parts = [batch]
    for bins, branch in zip(BINS, pooling.branches, strict=True):
        cells = torch.zeros(2, 3, bins, bins)
        for i in range(bins):
            for j in range(bins):
                rows = slice(i * 7 // bins, math.ceil((i + 1) * 7 / bins))
                columns = slice(j * 5 // bins, math.ceil((j + 1) * 5 / bins))
                cells[:, :, i, j] = batch[:, :, rows, columns].mean(dim=(2, 3))
        parts.append(F.interpolate(branch(cells), size=(7, 5), mode="bilinear", align_corners=False))
    torch.testing.assert_close(pooling(batch), pooling.bottleneck(torch.cat(parts, dim=1)))


def test_one_image_can_be_trained_on() -> None:
    """Pooled to one cell, one image has one value a channel: plain batch norm would refuse it."""
    for kind in ("upernet", "fpn", "linear"):
        model = segmenter(kind)
        model.train()
        assert model(images(count=1)).main.isfinite().all()


def test_levels_are_4_2_1_and_half_of_the_grid() -> None:
    head = segmenter().head
    assert isinstance(head, UperNet)
    maps = [torch.randn(1, 32, 5, 7) for _ in range(4)]
    assert [tuple(level.shape[2:]) for level in head.pyramid(maps)] == [(20, 28), (10, 14), (5, 7), (3, 4)]


def test_each_level_comes_from_its_block() -> None:
    """A change in one map changes its own level of the pyramid, and no other."""
    head = segmenter().head
    assert isinstance(head, UperNet)
    head.eval()
    maps = [torch.randn(1, 32, 4, 6) for _ in range(4)]
    before = head.pyramid(maps)
    for index in range(4):
        changed = [value + 1 if number == index else value for number, value in enumerate(maps)]
        same = [torch.equal(one, other) for one, other in zip(before, head.pyramid(changed), strict=True)]
        assert same == [number != index for number in range(4)]


def test_the_auxiliary_head_reads_the_third_block_and_only_in_training() -> None:
    model = segmenter()
    model.train()
    out = model(images())
    assert out.auxiliary is not None and out.auxiliary.shape == out.main.shape
    out.auxiliary.square().mean().backward()
    encoder: Any = model.encoder
    graded = [block.mlp.fc1.weight.grad is not None for block in encoder.blocks]
    assert graded == [True, True, True, False]
    assert model.eval()(images()).auxiliary is None


def test_fusing_by_1_x_1_commutes_with_resizing() -> None:
    """On each level's own grid against the literal form: levels resized, joined, then one convolution."""
    torch.manual_seed(0)
    head = UperNet(32, 5, 8, fuse_kernel=1).eval()
    levels = [torch.randn(2, 8, *size) for size in ((16, 24), (8, 12), (4, 6), (2, 3))]
    joined = torch.cat([F.interpolate(level, size=(16, 24), mode="bilinear") for level in levels], dim=1)
    torch.testing.assert_close(head._fused(levels), head.fuse(joined), rtol=1e-4, atol=1e-5)


def conv(value: Tensor, block: Any) -> Tensor:
    """Convolution, batch norm in evaluation, ReLU, written out; a layer norm over all values where that is the norm."""
    convolution, norm, _ = block
    value = F.conv2d(value, convolution.weight, padding=convolution.kernel_size[0] // 2)
    if isinstance(norm, nn.GroupNorm):
        mean, variance = value.mean((1, 2, 3), keepdim=True), value.var((1, 2, 3), keepdim=True, unbiased=False)
    else:
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    normal = (value - mean) / (variance + norm.eps).sqrt()
    return (normal * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)


def to(value: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(value, size=other.shape[2:], mode="bilinear", align_corners=False)


def doubled(value: Tensor, up: Any) -> Tensor:
    """A transposed convolution of 2 x 2 at stride 2: each place becomes four, by a product for each."""
    out = torch.zeros(len(value), up.weight.shape[1], 2 * value.shape[2], 2 * value.shape[3])
    for row in range(2):
        for column in range(2):
            out[:, :, row::2, column::2] = torch.einsum("bihw,io->bohw", value, up.weight[:, :, row, column])
    return out + up.bias[:, None, None]


def settle(head: nn.Module) -> Any:
    """The head in evaluation mode, with norms that do something."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return head.eval()


def test_upernet_by_hand() -> None:
    """The whole head from its description: pyramid, pooling, sums from coarse to fine, smoothing, fusion, classes."""
    head = settle(segmenter().head)
    maps = [torch.randn(2, 32, 4, 6) for _ in range(4)]
    first, norm, _, second = head.pyramid.four
    raised = doubled(maps[0], first)
    raised = (raised - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    levels = [doubled(F.gelu(raised), second), doubled(maps[1], head.pyramid.two), maps[2]]
    half = maps[3].view(2, 32, 2, 2, 3, 2).amax(dim=(3, 5))
    pooled = [to(conv(F.adaptive_avg_pool2d(half, n), branch), half)
              for n, branch in zip((1, 2, 3, 6), head.pooling.branches, strict=True)]  # fmt: skip
    merged = [conv(level, lateral) for level, lateral in zip(levels, head.laterals, strict=True)]
    merged.append(conv(torch.cat([half, *pooled], 1), head.pooling.bottleneck))
    merged[2] = merged[2] + to(merged[3], merged[2])
    merged[1] = merged[1] + to(merged[2], merged[1])
    merged[0] = merged[0] + to(merged[1], merged[0])
    smooth = [conv(level, block) for level, block in zip(merged[:3], head.smooth, strict=True)]
    fused = conv(torch.cat([to(level, smooth[0]) for level in (*smooth, merged[3])], 1), head.fuse)
    expected = F.conv2d(fused, head.classifier[1].weight, head.classifier[1].bias)
    torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-4)


def test_light_fpn_by_hand() -> None:
    head = settle(segmenter("fpn").head)
    last = torch.randn(2, 32, 4, 6)
    first, norm, _, second = head.four
    raised = doubled(last, first)
    raised = (raised - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    levels = [doubled(F.gelu(raised), second), doubled(last, head.two), last, last.view(2, 32, 2, 2, 3, 2).amax((3, 5))]
    sides = [conv(level, lateral) for level, lateral in zip(levels, head.laterals, strict=True)]
    top = sides[3]
    for side in (sides[2], sides[1], sides[0]):
        top = side + to(top, side)
    fused = conv(top, head.smooth)
    expected = F.conv2d(fused, head.classifier[1].weight, head.classifier[1].bias)
    torch.testing.assert_close(head(last[None]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "expected"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3))])
def test_default_blocks(depth: int, expected: tuple[int, ...]) -> None:
    assert chosen_blocks(HeadConfig("upernet"), depth) == expected
    assert chosen_blocks(HeadConfig("linear"), depth) == (depth - 1,)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (HeadConfig("upernet", blocks=(1, 2)), "--blocks 1 2: --head upernet reads 4 blocks"),
        (HeadConfig("fpn", blocks=(1, 2)), "--blocks 1 2: --head fpn reads 1 block"),
        (HeadConfig("upernet", blocks=(1, 2, 4, 3)), "give ascending numbers from 1 to 4"),
        (HeadConfig("linear", blocks=(5,)), "give ascending numbers from 1 to 4"),
        (HeadConfig("linear", blocks=(0,)), "give ascending numbers from 1 to 4"),
    ],
)
def test_wrong_blocks(head: HeadConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        chosen_blocks(head, 4)


def test_blocks_behind_the_last_one_that_is_read_are_left_out() -> None:
    model = segmenter("linear", blocks=(2,)).eval()
    encoder: Any = model.encoder
    encoder.blocks[2] = nn.Identity()  # would change every later token's map
    expected = encoder.blocks[1](encoder.blocks[0](model._embed(images())[0]))[:, 1:]
    found = model.feature_maps(images())[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    trained = segmenter("fpn", blocks=(2,))
    blocks: Any = trained.encoder.blocks
    assert [block.mlp.fc1.weight.requires_grad for block in blocks] == [True, True, False, False]
    assert not any(parameter.requires_grad for parameter in trained.encoder.norm.parameters())


# ---- the loss ----


def by_hand(logits: Tensor, labels: Tensor, weights: list[float]) -> tuple[float, float]:
    """Sum of weighted cross entropies over pixels that are not void, and the sum of the weights, one by one."""
    total = count = 0.0
    for image, truth in zip(logits.double(), labels, strict=True):
        for row in range(truth.shape[0]):
            for column in range(truth.shape[1]):
                true = int(truth[row, column])
                if true == VOID:
                    continue
                values = image[:, row, column]
                total += weights[true] * float(values.exp().sum().log() - values[true])
                count += weights[true]
    return total, count


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_loss_by_hand(weights: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, extra = torch.randn(2, 2, 3, 4, 5, generator=generator)
    labels = torch.randint(VOID, 3, (2, 4, 5), generator=generator)
    weights_K = None if weights is None else torch.tensor(weights)
    main, count = by_hand(logits, labels, weights or [1.0] * 3)
    auxiliary, _ = by_hand(extra, labels, weights or [1.0] * 3)
    denominator = loss_denominator(labels, VOID, weights_K)
    assert float(denominator) == pytest.approx(count)
    found = pixel_loss(Scores(logits, extra), labels, VOID, weights_K, denominator, 0.4)
    assert float(found) == pytest.approx((main + 0.4 * auxiliary) / count, rel=1e-5)


def test_void_pixels_have_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, 5, requires_grad=True)
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    labels[0, :2] = VOID
    pixel_loss(Scores(logits, None), labels, VOID, None, loss_denominator(labels, VOID, None), 0.4).backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, :2].any() and logits.grad[0, :, 2:].all()


def test_a_batch_that_is_void_throughout_loses_nothing() -> None:
    logits = torch.randn(1, 3, 4, 5, requires_grad=True)
    labels = torch.full((1, 4, 5), VOID)
    loss = pixel_loss(Scores(logits, logits), labels, VOID, None, loss_denominator(labels, VOID, None), 0.4)
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad is not None and not logits.grad.any()


def test_loss_is_float32_under_autocast() -> None:
    model = segmenter()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.train()(images())
        loss = pixel_loss(scores, torch.zeros(2, 16, 24, dtype=torch.int64), VOID, None, torch.tensor(768.0), 0.4)
    assert loss.dtype == torch.float32 and loss.isfinite()
