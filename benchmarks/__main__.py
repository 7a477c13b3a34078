"""`make bench`: every speed and memory goal in one table: work | ours | peer | ratio | goal | floor.

    python -m benchmarks                    CPU set: under 10 minutes on 2 cores without AMX, alone on the machine
    python -m benchmarks --full             also lists 1,000,000 files instead of 50,000
    python -m benchmarks --accelerator      one GPU: ViT-B, L and H at 224 px and cifar10, beside Hugging Face
    python -m benchmarks --only 3 6 7       some rows only

The goals of rows 1 and 2 hold for a CPU with AMX matrix units, where maekit chooses bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import tyro

from benchmarks import loader, startup, step
from benchmarks.timing import peaks, say_machine, show, write_json
from maekit import recipes
from maekit.config import UserError
from maekit.environment import environment
from maekit.runtime import choose_precision

PAPER = "in1k-vit-base"
TUTORIAL: dict[str, Any] = {
    "img_size": (48,), "patch_size": 6, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0,
    "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4, "target": "pixels", "batch_size": 256,
    "model": "vit_tiny_patch16_224",
}  # fmt: skip
"""The Keras tutorial's sizes (6 + 2 blocks). Its heads are four of 128 values, each as wide as the model itself, which
timm's VisionTransformer has no setting for: here they are four of 32. The encoder's MLPs are twice as wide as it,
the decoder's four times. The peer has the same sizes as ours."""
TINY: dict[str, Any] = {
    "img_size": (16,), "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 8,
    "decoder_depth": 1, "decoder_heads": 2, "batch_size": 4, "model": "vit_tiny_patch16_224", "compile": "off",
    "turn": 1, "rounds": 2, "warmup": 1,
}  # fmt: skip


@dataclass
class BenchConfig:
    """All goals in one table."""

    accelerator: bool = False
    """The set for one GPU instead of the CPU set."""
    full: bool = False
    """List 1,000,000 files, not 50,000."""
    only: tuple[int, ...] = ()
    """Rows by number. Default: all."""
    rounds: int = 4
    """Rounds of the large steps that count; the small ones have more."""
    threads: int | None = None
    """Threads on a CPU. Default: torch's choice."""
    tiny: bool = False
    """Models of a few thousand weights, to see whether everything runs: its numbers say nothing."""
    device: str = "auto"
    """cpu or cuda. Default: cpu, and cuda with --accelerator."""
    json: str | None = None
    """File for all numbers."""


class Row(NamedTuple):
    """One line of the table. `value`: what is held against goal and floor; above them is better unless `lower`."""

    number: int
    work: str
    ours: str
    peer: str = "-"
    value: float | None = None
    spread: str = ""
    goal: float | None = None
    floor: float | None = None
    lower: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def verdict(self) -> str:
        """goal, floor, or below; empty where nothing is asked for, or where the goal is for other machines."""
        if self.value is None or self.goal is None or self.note:
            return ""
        floor = self.goal if self.floor is None else self.floor
        sign = -1 if self.lower else 1
        if sign * self.value >= sign * self.goal:
            return "goal"
        return "floor" if sign * self.value >= sign * floor else "below"

    def cells(self) -> list[str]:
        """The line as text."""
        least = "<= " if self.lower else ""
        asked = [f"{least}{one:g}{self.unit}" if one is not None else "-" for one in (self.goal, self.floor)]
        ratio = f"{self.value:.3g}{self.unit}{self.spread}" if self.value is not None else "-"
        return [f"{self.number}. {self.work}", self.ours, self.peer, ratio, *asked, self.verdict or self.note]


@dataclass
class Bench:
    """What the rows share: the machine, and every raw number for the JSON."""

    config: BenchConfig
    device: torch.device
    peaks: dict[str, Any]
    raw: dict[str, Any] = field(default_factory=dict)

    def step(self, recipe: str, **settings: Any) -> dict[str, Any]:
        """One comparison of steps; `--tiny` shrinks it."""
        base = {"rounds": self.config.rounds, "warmup": 1, "memory": False, "threads": self.config.threads}
        small = TINY if self.config.tiny else {}
        values = {**vars(recipes.get(recipe)), **base, "device": str(self.device), **settings, **small}
        result = step.measure(step.StepConfig(**values), self.peaks)
        self.raw.setdefault("steps", []).append({**result, "asked": {**settings, **small}})
        return result


def versus(
    number: int,
    work: str,
    result: dict[str, Any],
    goal: float | None = None,
    floor: float | None = None,
    note: str = "",
) -> Row:
    """A row of images/s."""
    ratio = result["ratio"]
    return Row(
        number, work, say(result["ours"]), say(result["peer"]), ratio["median"],
        f" ({ratio['low']:.2f} to {ratio['high']:.2f})", goal, floor, note=note,
    )  # fmt: skip


def say(side: dict[str, Any]) -> str:
    """One side in a cell."""
    return (
        f"{side['images_per_s']:,.4g} images/s, {side['share_of_peak']:.0%} of peak ({side['name']}, {side['setting']})"
    )


def against_fp32(bench: Bench) -> Row:
    result = bench.step(PAPER, batch_size=16)
    return versus(1, "ViT-B/16 step, batch 16, vs HF default", result, 4.0, 2.8, without_amx(bench))


def against_bf16(bench: Bench) -> Row:
    result = bench.step(PAPER, batch_size=16, peer_precision="bf16", peer_attention="quicker")
    return versus(2, "ViT-B/16 step, batch 16, vs HF bfloat16", result, 2.2, 1.5, without_amx(bench))


def without_amx(bench: Bench) -> str:
    """Why the goal of rows 1 and 2 says nothing here; empty where it does."""
    return "" if choose_precision("auto", bench.device).value == "bf16" else "goal is for AMX"


def tutorial(bench: Bench) -> Row:
    result = bench.step("digits", **TUTORIAL, in_chans=3, mask_ratio=0.75, crop="none", rounds=2 * bench.config.rounds)
    return versus(3, "Keras tutorial's sizes (6 + 2), batch 256, vs HF", result)


def cross(bench: Bench) -> Row:
    work = "ViT-B/16 step, cross decoder of 25 %, vs our self"
    result = bench.step(PAPER, batch_size=16, decoder="cross", peer="self", predict_share=0.25)
    return versus(4, work, result, 1.5, 1.3)


def memory(bench: Bench) -> Row:
    """Two steps of each side in a process of its own; hardly any is timed."""
    values = {
        **vars(recipes.get(PAPER)),
        "batch_size": 16,
        "device": str(bench.device),
        **(TINY if bench.config.tiny else {}),
    }
    config = step.StepConfig(**{**values, "threads": bench.config.threads})
    device, precision = step.settle(config)
    sides: tuple[Literal["ours", "peer"], ...] = ("ours", "peer")
    used = [step.peak_memory(config, side, device, precision) for side in sides]
    bench.raw["memory"] = used
    ours, peer = (f"{one / 1e9:.2f} GB" for one in used)
    return Row(5, "peak memory of a ViT-B/16 step, batch 16, vs HF", ours, peer, used[0] / used[1], "", 0.5, 0.7, True)


def loading(bench: Bench) -> list[Row]:
    """Folder, packed, in memory: images/s of one core."""
    small: dict[str, Any] = {"images": 8, "small": 64, "turn": 4, "rounds": 2} if bench.config.tiny else {}
    result = bench.raw["loader"] = loader.measure(loader.LoaderConfig(**small))
    rows = []
    asked = (("folder", 6, "folder of JPEGs", 2.0, 1.4), ("packed", 7, "packed at 256 px", 4.0, 2.5))
    for name, number, work, goal, floor in (*asked, ("memory", 7, "in memory, 32 px", None, None)):
        one, title = result[name], f"{work}, images/s of a core, vs official style"
        if one is None:
            rows.append(Row(number, title, "this maekit has no `pack`", goal=goal, floor=floor))
            continue
        ours, peer = (f"{one[side]['median']:,.4g} images/s" for side in ("ours", "peer"))
        ratio = one["ratio"]
        spans = f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        rows.append(Row(number, title, ours, peer, ratio["median"], spans, goal, floor))
    return rows


def listing(bench: Bench) -> Row:
    count = 200 if bench.config.tiny else 1_000_000 if bench.config.full else 50_000
    one = bench.raw["listing"] = loader.listing(count)
    ours, peer = (f"{one['seconds'][s][0]:.2f} s, {one['memory'][s] / 1e6:.1f} MB" for s in ("ours", "peer"))
    return Row(8, f"listing {count:,} files, vs torchvision", ours, peer, one["ratio"]["median"])


def starting(bench: Bench) -> list[Row]:
    some = ("maekit --help", "import maekit")
    commands = {name: startup.COMMANDS[name] for name in (some[1:] if bench.config.tiny else startup.COMMANDS)}
    found = startup.measure(1 if bench.config.tiny else 5, 0 if bench.config.tiny else 1, commands)
    bench.raw["startup"] = {name: one._asdict() for name, one in found.items()}
    scale = f"import torch {found['import torch'].median:.2f} s" if "import torch" in found else "-"
    goals = dict(zip(some, (0.5, 0.3), strict=True))
    return [
        Row(9, name, str(found[name]), scale, found[name].median, "", goals[name], None, True, " s")
        for name in some
        if name in found
    ]


def accelerated(bench: Bench, number: int, recipe: str, batch: int) -> list[Row]:
    """A recipe in bfloat16, beside Hugging Face as it comes, and compiled; the large ones take minutes to compile."""
    rows, large = [], recipe in LARGE
    for compiled in ("off", "on")[: 1 if bench.config.tiny or large else 2]:
        result = bench.step(
            recipe, batch_size=batch, precision="bf16", peer_precision="bf16", peer_compile=compiled, warmup=2,
            memory=bench.device.type == "cuda" and compiled == "off" and not large,
        )  # fmt: skip
        work = f"{recipe} step, batch {batch}, vs HF{' compiled' if compiled == 'on' else ''}"
        rows.append(versus(number, work, result))
        if result["ours"]["peak_memory"]:
            used = [result[side]["peak_memory"] for side in ("ours", "peer")]
            ours, peer = (f"{one / 1e9:.1f} GB" for one in used)
            rows.append(Row(number, f"{recipe} peak memory", ours, peer, result["memory_ratio"], lower=True))
    return rows


LARGE = ("in1k-vit-large", "in1k-vit-huge")
ACCELERATOR_SET: dict[int, Callable[[Bench], Row | list[Row]]] = {
    number: partial(accelerated, number=number, recipe=recipe, batch=batch)
    for number, (recipe, batch) in enumerate(
        (("in1k-vit-base", 512), ("in1k-vit-large", 256), ("in1k-vit-huge", 128), ("cifar10", 128)), 1
    )
}
"""ViT-B, L and H, and the cifar10 recipe."""


CPU_SET: dict[int, Callable[[Bench], Row | list[Row]]] = {
    1: against_fp32, 2: against_bf16, 3: tutorial, 4: cross, 5: memory, 6: loading, 8: listing, 9: starting,
}  # fmt: skip
COLUMNS = ("work", "ours", "peer", "ratio", "goal", "floor", "reached")


def measure(config: BenchConfig) -> tuple[list[Row], dict[str, Any], Bench]:
    """All rows, what goes into the JSON, and the machine.

    Raises:
        UserError: a row that does not exist.
    """
    works = ACCELERATOR_SET if config.accelerator else CPU_SET
    known = set(works) if config.accelerator else {*works, 7}
    if unknown := [number for number in config.only if number not in known]:
        raise UserError(f"--only {unknown[0]}: the rows are 1 to {max(known)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    wanted = "cuda" if config.accelerator else "cpu"
    device = torch.device(wanted if config.device == "auto" else config.device)
    bench = Bench(config, device, peaks(device, 1, 128) if config.tiny else peaks(device))
    rows: list[Row] = []
    for number, work in works.items():
        also = 7 if number == 6 and not config.accelerator else number
        if config.only and not {number, also} & set(config.only):
            continue
        print(f"measuring row {number} ...", file=sys.stderr, flush=True)
        found = work(bench)
        rows += found if isinstance(found, list) else [found]
        write_json(config.json, result_of(bench, rows))  # whatever comes next, this is kept
    return rows, result_of(bench, rows), bench


def result_of(bench: Bench, rows: list[Row]) -> dict[str, Any]:
    """What goes into the JSON."""
    return {
        "rows": [{**row._asdict(), "verdict": row.verdict} for row in rows],
        "peaks": bench.peaks,
        "environment": environment(bench.device),
        "raw": bench.raw,
    }


def main(config: BenchConfig) -> int:
    """Measure, which writes as it goes, and print one table."""
    try:
        rows, _, bench = measure(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show("maekit beside its peers: medians (quartiles of the rounds)", COLUMNS, [row.cells() for row in rows])
    print(say_machine(bench.device, bench.peaks))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchConfig, prog="python -m benchmarks")))
