"""The tutorial's probe: its training loop by hand, where its dropout is and what its frozen normalisation does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maekit.config import ModelConfig, UserError
from maekit.data.loader import Batch, Ids, MemoryPool
from maekit.data.parts import ArrayPart
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.rng import Purpose, shuffled
from maekit.training.keras_probe import Labelled, frozen_features, keras_probe, live_dropout, reading

SIZES: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": (12,), "patch_size": 6, "embed_dim": 8, "depth": 2, "num_heads": 2,
    "mlp_ratio": 2.0, "mlp_act": "both", "class_token": False, "decoder_dim": 4, "decoder_depth": 1, "decoder_heads": 1,
}  # fmt: skip


def tiny_model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(ModelConfig(**SIZES), (0.0,) * 3, (1.0,) * 3).eval()


def split(count: int, seed: int, config: ModelConfig) -> Labelled:
    """Images of three classes that differ in colour."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    pixels = random.integers(0, 120, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 100
    part = ArrayPart(pixels.astype(np.uint8), labels, ["a", "b", "c"], 3)
    pool = MemoryPool(part, reading(config, "-"), torch.device("cpu"), (8, 8))
    return Labelled(pool, np.arange(count), torch.from_numpy(labels))


def test_the_loop_by_hand() -> None:
    """Seven epochs of 2 batches of 8 and one of 3, without dropout: the layer is the one of a loop over samples."""
    model, epochs = tiny_model(), 7
    train, test = split(19, 1, model.config), split(11, 2, model.config)
    found = keras_probe(model, train, test, num_classes=3, epochs=epochs, batch_size=8, dropout=0.0)

    limit = math.sqrt(6 / (8 + 3))
    weight = (limit * (2 * torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) - 1)).double().numpy()
    bias, total, step = np.zeros(3), 2 * epochs, 0
    moved_w, moved_b, warmup = np.zeros((8, 3)), np.zeros(3), int(0.1 * 2 * epochs)
    assert warmup == 1
    for epoch in range(epochs):
        order, hits = shuffled(np.arange(19), seed=0, purpose=Purpose.ORDER, epoch=epoch), 0
        for start in (0, 8, 16):
            ids = order[start : start + 8]
            (batch,) = train.pool.train_batches([(epoch, ids)])
            with torch.no_grad():
                features = model.encode(batch.images, pool="mean").double().numpy() / math.sqrt(1.001)
            slope_w, slope_b = np.zeros((8, 3)), np.zeros(3)
            for row, sample in enumerate(ids):
                logits = features[row] @ weight + bias
                share = np.exp(logits - logits.max())
                share /= share.sum()
                hits += int(logits.argmax()) == int(train.labels[sample])
                for k in range(3):
                    error = (share[k] - (k == int(train.labels[sample]))) / len(ids)
                    slope_w[:, k] += error * features[row]
                    slope_b[k] += error
            if step < warmup:
                lr = 0.1 * step / warmup
            elif step <= total:
                lr = 0.05 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            else:
                lr = 0.0
            moved_w, moved_b = 0.9 * moved_w - lr * slope_w, 0.9 * moved_b - lr * slope_b
            weight, bias, step = weight + moved_w, bias + moved_b, step + 1
    np.testing.assert_allclose(found.weight_DK, weight, atol=1e-5)
    np.testing.assert_allclose(found.bias_K, bias, atol=1e-5)
    assert found.train == pytest.approx(hits / 19)
    (whole,) = test.pool.eval_batches(test.ids, 20)
    with torch.no_grad():
        logits_BK = model.encode(whole.images, pool="mean").numpy() / math.sqrt(1.001) @ weight + bias
    assert found.test == pytest.approx((logits_BK.argmax(axis=1) == test.labels.numpy()).mean())


def test_it_learns_and_its_seed_decides() -> None:
    """Colours can be told apart (a third is chance); the same seed gives the same layer, another one another."""
    model = tiny_model()
    train, test = split(300, 1, model.config), split(100, 2, model.config)
    torch.manual_seed(5)
    before = torch.rand(1, generator=torch.default_generator).item()
    first, again, other = (
        keras_probe(model, train, test, num_classes=3, epochs=20, batch_size=64, seed=seed) for seed in (0, 0, 1)
    )
    torch.manual_seed(5)
    assert torch.rand(1).item() == before
    assert first.test > 0.6
    assert torch.equal(first.weight_DK, again.weight_DK)
    assert not torch.equal(first.weight_DK, other.weight_DK)


def test_the_frozen_normalisation_is_a_factor() -> None:
    """The mean of the patch tokens over sqrt(1 + 0.001), one number for every image and channel."""
    model, images = tiny_model(), torch.rand(5, 3, 12, 12)
    ratio = frozen_features(model, images) / model.encode(images, pool="mean").detach()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / math.sqrt(1.001)))


def test_dropout_is_where_the_tutorial_has_it() -> None:
    """Three places a block, 18 in its 6 blocks; nothing else changes its mode, and afterwards all is as before."""
    model, images = tiny_model(), torch.rand(4, 3, 12, 12)
    calm = frozen_features(model, images)
    before = {name: (module.training, getattr(module, "p", None)) for name, module in model.named_modules()}
    with live_dropout(model, 0.1):
        live = sorted(
            name for name, module in model.encoder.named_modules()
            if isinstance(module, torch.nn.Dropout) and module.training and module.p == 0.1
        )  # fmt: skip
        assert not torch.equal(frozen_features(model, images), frozen_features(model, images))
    places = ("attn.attn_drop", "mlp.drop1", "mlp.drop2")
    assert live == [f"blocks.{block}.{place}" for block in range(2) for place in places]
    assert before == {name: (module.training, getattr(module, "p", None)) for name, module in model.named_modules()}
    assert torch.equal(frozen_features(model, images), calm)


@pytest.mark.parametrize("fused", [True, False])
def test_each_dropout_acts(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a share of nearly 1 in one place alone, that branch gives nearly nothing: also in the fused kernel."""
    model, images = tiny_model(), torch.rand(2, 3, 12, 12)
    use_fused_attention(model, fused)
    block: Any = model.encoder.blocks[0]
    seen: dict[str, Tensor] = {}
    block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.update(mixed=inputs[0]))
    block.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    block.mlp.register_forward_hook(lambda _, inputs, output: seen.update(out=output))
    with live_dropout(model, 0.5):
        shares = []
        for _ in range(40):
            frozen_features(model, images)
            shares.append([float((seen[name] == 0).float().mean()) for name in ("hidden", "out")])
            shares[-1].append(float(seen["mixed"].abs().mean()))
    hidden, out, _ = np.mean(shares, axis=0)
    assert hidden == pytest.approx(0.5, abs=0.06)
    assert out == pytest.approx(0.5, abs=0.06)
    assert np.std([share[2] for share in shares]) > 0


class _Broken:
    """A pool in which image 0 cannot be read and image 1 stands in for it."""

    def __init__(self, pool: Any) -> None:
        self.pool, self.unreadable = pool, {0: "damaged"}

    def train_batches(self, shares: Any) -> Any:
        return self.pool.train_batches((epoch, np.where(ids == 0, 1, ids)) for epoch, ids in shares)

    def eval_batches(self, ids: Ids, batch_size: int) -> Any:
        for batch in self.pool.eval_batches(np.where(ids == 0, 1, ids), batch_size):
            yield Batch(batch.images, batch.sample_ids, [])


def test_a_stand_in_is_not_counted() -> None:
    """The label of an unreadable image has no say: whatever it is, the layer and the score are the same."""
    model = tiny_model()
    found = []
    for label in (0, 2):
        train, test = split(20, 1, model.config), split(12, 2, model.config)
        train.labels[0] = test.labels[0] = label
        broken = [Labelled(_Broken(one.pool), one.ids, one.labels) for one in (train, test)]
        found.append(keras_probe(model, *broken, num_classes=3, epochs=2, batch_size=8, dropout=0.0))
    assert torch.equal(found[0].weight_DK, found[1].weight_DK)
    assert found[0].test == found[1].test
    assert found[0].test * 11 == pytest.approx(round(found[0].test * 11))


def test_nothing_to_fit_on_is_refused() -> None:
    model = tiny_model()
    some, none = split(10, 1, model.config), split(10, 1, model.config)._replace(ids=np.arange(0))
    for pair, words in (((none, some), "training"), ((some, none), "test")):
        with pytest.raises(UserError, match=f"no labelled {words} images"):
            keras_probe(model, *pair, num_classes=3)
