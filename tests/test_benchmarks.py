"""The benchmarks measure what they say: order of turns, ratios, equal sizes and batches, fields of the JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY

from benchmarks import __main__ as bench
from benchmarks import contenders, loader, startup, step, timing
from maekit.config import PretrainConfig, UserError

SQUARE = {**TINY, "img_size": (16,), "batch_size": 4}
QUICK = {**SQUARE, "rounds": 2, "warmup": 1, "memory": False, "device": "cpu", "precision": "fp32", "compile": "off"}
PEAKS = {"fp32": 1e9, "bf16": 2e9, "tf32": False}


def test_turns_alternate_and_warm_up_is_not_counted() -> None:
    """A fake clock that counts calls: with one warm-up round, A has turns 2 and 4 of 0..5, B 3 and 5."""
    order: list[str] = []

    def clock(work: Any) -> float:
        work()
        return float(len(order) - 1)

    found = timing.alternate({"A": lambda: order.append("A"), "B": lambda: order.append("B")}, 2, 1, clock)
    assert order == ["A", "B"] * 3
    assert found == {"A": [2.0, 4.0], "B": [3.0, 5.0]}


def test_ratios_are_taken_round_by_round() -> None:
    """Twice, three and four times as fast: the median is 3, whatever the machine did meanwhile."""
    found = timing.speedup([1.0, 10.0, 2.0], [2.0, 30.0, 8.0])
    assert found == timing.Spread(3.0, 2.5, 3.5, 3)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)


def test_the_peak_counts_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n^3 over the quickest of several products."""
    seconds = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(timing, "device_clock", lambda device: lambda work: next(seconds))
    assert timing.matmul_peak(torch.device("cpu"), "fp32", 3, side=10) == 2 * 1000 / 0.25


def test_both_sides_step_on_equal_models_and_batches() -> None:
    """Hugging Face's model has our number of trained weights, its batch our number of images; a step changes all."""
    config = PretrainConfig(**SQUARE, target="norm-pixels")
    cpu = torch.device("cpu")
    ours, theirs = contenders.Ours(config, cpu, "fp32", "off"), contenders.HuggingFace(config, cpu, "fp32", False)
    models = (ours.trial.model, theirs.model)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    assert counts[0] == counts[1]
    assert ours.images.shape == theirs.images.shape
    assert theirs.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    sides: tuple[contenders.Contender, ...] = (ours, theirs)
    for one, model in zip(sides, models, strict=True):
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
        before = [parameter.clone() for parameter in matrices]
        one.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, matrices, strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_in_parts_makes_the_same_step() -> None:
    """With --accum the masks and the gradient are those of the whole batch, but for the order of summation."""
    weights = []
    for parts in (1, 2):
        config = PretrainConfig(**SQUARE, target="norm-pixels", accum=parts)
        ours = contenders.Ours(config, torch.device("cpu"), "fp32", "off")
        with torch.no_grad():
            ours.images.copy_(torch.arange(ours.images.numel()).reshape(ours.images.shape) * 37 % 251)
        ours.trial.optimizer = torch.optim.SGD(  # type: ignore[assignment]
            ours.trial.model.parameters(), lr=0.1
        )
        before = torch.nn.utils.parameters_to_vector(ours.trial.model.parameters()).detach().clone()
        ours.step()
        weights.append(torch.nn.utils.parameters_to_vector(ours.trial.model.parameters()).detach() - before)
    assert "in 2 parts" in ours.setting
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)
    assert weights[0].abs().max() > 1e-3


def test_our_masks_are_drawn_anew_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample ids move on, as in training."""
    ours = contenders.Ours(PretrainConfig(**SQUARE), torch.device("cpu"), "fp32", "off")
    seen: list[Any] = []
    real = ours.trial.step

    def watched(images: Any, ids: Any, masks: Any) -> None:
        seen.append(masks.ids_keep_BV)
        real(images, ids, masks)

    monkeypatch.setattr(ours.trial, "step", watched)
    ours.step()
    ours.step()
    wanted = [ours.trial.model.draw_masks(ids, seed=0).ids_keep_BV for ids in (range(4), range(4, 8))]
    assert [one.tolist() for one in seen] == [one.tolist() for one in wanted]


def test_operations_by_the_formula() -> None:
    """ViT-B/16 at 224 px: 58.7 GFLOP for a training step on an image with every patch embedded and predicted; the
    needed work is 1 to 2 % less.
    """
    config = PretrainConfig()
    whole, needed = contenders.whole_flops(config), contenders.needed_flops(config)
    assert whole == pytest.approx(58.7e9, rel=2e-3)
    assert 0.98 < needed / whole < 0.99


def test_a_step_beside_hugging_face() -> None:
    """Every field of the JSON; speeds and shares follow from the seconds."""
    result = step.measure(step.StepConfig(**QUICK), PEAKS)
    json.dumps(result)
    for side in ("ours", "peer"):
        one = result[side]
        assert len(one["seconds"]) == 2
        assert one["images_per_s"] == pytest.approx(4 / (sum(one["seconds"]) / 2))
        assert one["share_of_peak"] == pytest.approx(one["flops_per_s"] / 1e9)
    # one formula for both, so that shares compare as images/s do
    shares = result["ours"]["share_of_peak"] / result["peer"]["share_of_peak"]
    assert shares == pytest.approx(result["ours"]["images_per_s"] / result["peer"]["images_per_s"])
    assert result["ratio"]["number"] == 2
    assert result["environment"]["versions"]["torch"]
    assert len(step.table(result)[0]) == len(step.COLUMNS)


def test_peers_that_are_absent_or_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the flag."""
    monkeypatch.setitem(sys.modules, "lightly.models", None)
    for changes, words in (
        ({"peer": "lightly"}, "--peer lightly: needs lightly"),
        ({"img_size": (16, 24)}, "--peer hf: it knows square images"),
        ({"rounds": 0}, "--rounds"),
    ):
        with pytest.raises(UserError, match=words):
            step.measure(step.StepConfig(**{**QUICK, **changes}), PEAKS)


def test_ours_beside_lightly() -> None:
    """The same number of trained weights but lightly's second, unused mask token; its loss is finite."""
    pytest.importorskip("lightly", reason="needs the [bench] extra: lightly")
    config = PretrainConfig(**SQUARE)
    theirs = contenders.Lightly(config, torch.device("cpu"), "fp32", False)
    assert bool(theirs.loss(theirs.images).isfinite())
    theirs.step()
    assert len(step.measure(step.StepConfig(**QUICK, peer="lightly"), PEAKS)["peer"]["seconds"]) == 2


def test_memory_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child gets the whole config and says its bytes last: those by which its peak exceeds what it began with."""
    words: list[str] = []

    def child(arguments: list[str], **_: Any) -> Any:
        words.extend(arguments)

        class Done:
            returncode, stderr, stdout = 0, "", "warning of some kind\n12345\n"

        return Done()

    monkeypatch.setattr(step.subprocess, "run", child)
    config = step.StepConfig(**{**QUICK, "decoder_depth": 1})
    assert step.peak_memory(config, "peer", torch.device("cpu"), "fp32") == 12345
    got = step.from_json(step.StepConfig, words[-1], "child")
    assert (got.memory_of, got.decoder_depth, got.img_size) == ("peer", 1, (16,))
    monkeypatch.setattr(step, "resident", {"VmRSS": 100, "VmHWM": 350}.__getitem__)
    assert step.grown_memory(got) == 250


def test_every_form_of_data(tmp_path: Path) -> None:
    """Folder and memory beside the official pipeline, on the same images; no `pack` is no error."""
    pytest.importorskip("skimage", reason="needs the [demo] extra: scikit-image")
    config = loader.LoaderConfig(images=6, small=32, turn=4, rounds=2, img_size=32)
    result = loader.measure(config)
    assert result["corpus"]["images"] == 6
    for name in ("folder", "memory"):
        assert result[name]["ours"]["median"] > 0
        assert result[name]["ratio"]["number"] == 2
    assert len(loader.table(result)) == 3
    assert result["packed"] is None or result["packed"]["ours"]["median"] > 0


def test_packed_shards_are_read_where_there_is_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `maekit pack`'s own main, at 256 px; without that command there is no part."""
    pytest.importorskip("skimage", reason="needs the [demo] extra: scikit-image")
    asked: list[Any] = []

    def pack(config: Any) -> None:
        asked.append((config.data, config.size))
        loader.write_small_parquet(Path(config.out) / "part-0.parquet", 8)

    monkeypatch.setattr(
        loader.importlib, "import_module", lambda name: SimpleNamespace(main=pack, PackConfig=SimpleNamespace)
    )
    part = loader.packed("photos", tmp_path)
    assert part is not None
    assert (len(part), asked) == (8, [("photos", 256)])

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(loader.importlib, "import_module", absent)
    assert loader.packed("photos", tmp_path) is None


def test_loaders_yield_equal_batches(tmp_path: Path) -> None:
    """Both sides hand over as many images of the same size, and go on without end."""
    pytest.importorskip("skimage", reason="needs the [demo] extra: scikit-image")
    loader.write_corpus(tmp_path, 3, (100, 75))
    part = loader.open_source(str(tmp_path)).train
    assert part.size(0) == (75, 100)
    pool = loader.StreamPool(part, PretrainConfig(img_size=(32,)), torch.device("cpu"), 0)
    ours = loader.our_batches(pool, len(part), 2)
    assert isinstance(part, loader.FilePart)
    theirs = loader.official_files(part, 32, 2)
    for _ in range(4):
        assert next(ours).shape == next(theirs).shape == (2, 3, 32, 32)


def test_listing_counts_files_and_memory() -> None:
    """All files are found; a million would take as many bytes a file."""
    found = loader.listing(1500)
    assert found["files"] == 1500
    assert 0 < found["memory"]["ours"] < found["memory"]["peer"]


def test_fresh_processes_are_timed() -> None:
    """One of them, once."""
    found = startup.measure(1, 0, {"nothing": ["-c", ""]})
    assert 0 < found["nothing"].median < 60


@pytest.mark.parametrize(
    ("value", "goal", "floor", "lower", "verdict"),
    [
        (4.0, 4.0, 2.8, False, "goal"),
        (2.8, 4.0, 2.8, False, "floor"),
        (2.7, 4.0, 2.8, False, "below"),
        (0.5, 0.5, 0.7, True, "goal"),
        (0.6, 0.5, 0.7, True, "floor"),
        (0.8, 0.5, 0.7, True, "below"),
        (0.4, 0.3, None, True, "below"),
        (9.0, None, None, False, ""),
    ],
)
def test_verdicts(value: float, goal: float | None, floor: float | None, lower: bool, verdict: str) -> None:
    """Against goal and floor, from either side; a goal for other machines is not judged."""
    row = bench.Row(1, "w", "o", "p", value, "", goal, floor, lower)
    assert row.verdict == verdict
    assert row._replace(note="elsewhere").verdict == ""
    assert len(row.cells()) == len(bench.COLUMNS)


def test_the_table_of_the_cpu_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make bench` with tiny models: every row, with goal and floor, on the terminal and in the JSON."""
    monkeypatch.setattr(step, "peak_memory", lambda config, side, *_: {"ours": 3, "peer": 4}[side])
    monkeypatch.setattr(startup, "measure", lambda *_: {"import maekit": timing.Spread(0.2, 0.1, 0.3, 5)})
    path = tmp_path / "bench.json"
    assert bench.main(bench.BenchConfig(tiny=True, threads=1, json=str(path))) == 0
    rows = json.loads(path.read_text())["rows"]
    assert sorted({row["number"] for row in rows}) == list(range(1, 10))
    by_number = {row["number"]: row for row in rows}
    assert (by_number[5]["value"], by_number[5]["verdict"]) == (0.75, "below")
    assert (by_number[9]["value"], by_number[9]["verdict"]) == (0.2, "goal")
    assert (by_number[1]["goal"], by_number[1]["floor"]) == (4.0, 2.8)
    said = capsys.readouterr().out
    assert "<= 0.5x" in said
    assert "GFLOP/s in float32" in said


def test_the_accelerators_set_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a tiny size, in bfloat16: four recipes beside Hugging Face; what was measured before an error is kept."""
    path = tmp_path / "rows.json"
    config = bench.BenchConfig(accelerator=True, tiny=True, device="cpu", threads=1, only=(4, 2), json=str(path))

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(bench.ACCELERATOR_SET, 4, broken)
        with pytest.raises(RuntimeError):
            bench.main(config)
    assert [row["number"] for row in json.loads(path.read_text())["rows"]] == [2]
    with pytest.raises(UserError, match="--only 9: the rows are 1 to 4"):
        bench.measure(bench.BenchConfig(accelerator=True, device="cpu", only=(9,)))
    assert bench.main(bench.BenchConfig(accelerator=True, tiny=True, device="cpu", threads=1)) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("in1k-vit-base", "in1k-vit-large", "in1k-vit-huge", "cifar10"))
    assert "bf16" in said
    with pytest.raises(UserError, match="--only 12"):
        bench.measure(bench.BenchConfig(only=(12,)))
