"""One training step of any recipe or model beside a peer's, in turn in one process.

    python -m benchmarks.step in1k-vit-base --batch-size 16 --peer hf --peer-precision bf16
    python -m benchmarks.step cifar10 --peer self --decoder cross --predict-share 0.25 --json step.json

The recipe comes first (in1k-vit-base where none is given), then any of its fields, then how to measure. A share of the
peak is (images/s x the operations that an image needs, by maekit's count for both sides) / the matrix products' peak
of the same run, so the ratio of two shares is the ratio of images/s; the JSON also has the peer's own count.

Peak memory: on CUDA what torch allocates, measured alone; on a CPU the growth of a fresh process (VmHWM) from when
all is imported to the end of the second step, so the allocator's waste counts too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.contenders import Contender, HuggingFace, Lightly, Ours, needed_flops, quicker_hugging_face
from benchmarks.timing import (
    alternate,
    device_clock,
    forget_peak,
    peaks,
    resident,
    say_machine,
    show,
    speedup,
    spread,
    write_json,
)
from maekit import recipes
from maekit.compiling import choose_compile
from maekit.config import PretrainConfig, UserError
from maekit.configfile import from_json, to_json
from maekit.environment import environment
from maekit.models.mae import model_problems
from maekit.runtime import choose_device, choose_precision

Side = Literal["ours", "peer"]
ROOT = Path(__file__).resolve().parents[1]
"""Where `-m benchmarks.step` is found."""


@dataclass(kw_only=True)
class StepConfig(PretrainConfig):
    """A training step of a recipe beside a peer's."""

    peer: Literal["hf", "lightly", "self", "none"] = "hf"
    """Who is compared: Hugging Face, lightly, maekit's own self decoder, or nobody."""
    peer_precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Arithmetic of the peer; auto: as ours. Ours is --precision."""
    peer_compile: Literal["on", "off"] = "off"
    """torch.compile for the peer, whose default is off. Ours is --compile."""
    peer_attention: Literal["default", "quicker", "sdpa", "eager"] = "default"
    """Hugging Face's attention; quicker: both kernels are tried, the faster one is kept."""
    rounds: int = 5
    """Rounds that count; each side has its turn in every one."""
    warmup: int = 2
    """Rounds before them."""
    turn: int | None = None
    """Steps in one turn. Default: 10 on CUDA, so that the host works ahead as in training; 1 elsewhere."""
    threads: int | None = None
    """Threads on a CPU. Default: torch's choice."""
    memory: bool = True
    """Also measure peak memory."""
    memory_of: tyro.conf.Suppress[str] = ""
    """A child process of a CPU's memory measurement: which side it is."""
    json: str | None = None
    """File for all numbers."""


def settle(config: StepConfig) -> tuple[torch.device, str]:
    """Our device and precision; refuses what cannot be measured.

    Raises:
        UserError: all that is wrong with the config.
    """
    config.data = config.data or "noise"
    problems = config.problems() + model_problems(config)
    if min(config.rounds, config.warmup + 1, config.turn or 1, config.threads or 1) < 1:
        problems.append("--rounds, --turn and --threads must be above 0, and --warmup not below 0")
    if problems:
        raise UserError(*problems)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device).value
    return device, choose_precision(config.precision, device).value


def build(config: StepConfig, side: Side, device: torch.device, precision: str) -> Contender:
    """One side, ready to step."""
    if side == "ours":
        return Ours(config, device, precision, choose_compile(config.compile, device).value)
    theirs = precision if config.peer_precision == "auto" else config.peer_precision
    compiled = config.peer_compile == "on"
    if config.peer == "self":
        own = choose_compile(config.compile, device).value
        return Ours(own_self(config), device, precision, own)
    if config.peer == "lightly":
        return Lightly(config, device, theirs, compiled)
    if config.peer_attention == "quicker":
        return quicker_hugging_face(config, device, theirs, compiled)
    return HuggingFace(config, device, theirs, compiled, config.peer_attention)


def own_self(config: StepConfig) -> StepConfig:
    """The same with the paper's decoder."""
    return dataclasses.replace(config, decoder="self", predict_share=None)


def measure(config: StepConfig, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """Both sides in turn: seconds, images/s, shares of the peak, memory, and the ratio of images/s round by round.

    about: the machine's peaks, where they are known.
    """
    device, precision = settle(config)
    about = about or peaks(device)
    turn = config.turn or (10 if device.type == "cuda" else 1)
    sides: list[Side] = ["ours"] if config.peer == "none" else ["ours", "peer"]
    memory = {side: peak_memory(config, side, device, precision) for side in sides} if config.memory else {}
    contenders = {side: build(config, side, device, precision) for side in sides}

    def turns(contender: Contender) -> None:
        for _ in range(turn):
            contender.step()

    works = {side: (lambda one=one: turns(one)) for side, one in contenders.items()}
    seconds = alternate(works, config.rounds, config.warmup, device_clock(device))  # type: ignore[arg-type]
    result: dict[str, Any] = {"recipe": config.recipe, "batch": config.batch_size, "peaks": about}
    for side, one in contenders.items():
        each = [value / turn for value in seconds[side]]
        speed = config.batch_size / spread(each).median
        flops = needed_flops(own_self(config) if one.name == "maekit self" else config)
        result[side] = {
            "name": one.name,
            "setting": one.setting,
            "seconds": each,
            "images_per_s": speed,
            "flops_per_s": speed * flops,
            "share_of_peak": speed * flops / about["bf16" if one.setting.startswith("bf16") else "fp32"],
            "flops_per_s_own_count": speed * one.flops,
            "peak_memory": memory.get(side),
        }
    if config.peer != "none":
        result["ratio"] = speedup(seconds["ours"], seconds["peer"])._asdict()
        if memory:
            result["memory_ratio"] = memory["ours"] / memory["peer"] if memory["peer"] else math.nan
    result["environment"] = environment(device)
    return result


def peak_memory(config: StepConfig, side: Side, device: torch.device, precision: str) -> int:
    """Peak bytes of one side alone over two steps."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        contender = build(config, side, device, precision)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            contender.step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    words = ["-m", "benchmarks.step", "child", to_json(dataclasses.replace(config, memory_of=side))]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError("the process that measures memory failed: " + "".join(done.stderr.splitlines()[-1:]))
    return int(done.stdout.split()[-1])


def grown_memory(config: StepConfig) -> int:
    """In a process of its own: how far it grows from here over two steps of one side."""
    device, precision = settle(config)
    side: Side = "ours" if config.memory_of == "ours" else "peer"
    if side == "peer" and config.peer in ("hf", "lightly"):  # what is imported is not counted
        with contextlib.suppress(ImportError):  # building it says what is missing
            importlib.import_module(
                "transformers.models.vit_mae.modeling_vit_mae" if config.peer == "hf" else "lightly.models.modules"
            )
    if config.peer_attention == "quicker":
        config.peer_attention = "default"  # one model only
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the threads and their buffers
    forget_peak()
    before = resident("VmRSS")
    contender = build(config, side, device, precision)
    for _ in range(2):
        contender.step()
    return resident("VmHWM") - before


def table(result: dict[str, Any]) -> list[list[str]]:
    """The rows that people read."""
    rows = []
    for side in ("ours", "peer"):
        if side in result:
            one = result[side]
            memory = f"{one['peak_memory'] / 1e9:.2f} GB" if one["peak_memory"] else "-"
            rows.append(
                [f"{one['name']}: {one['setting']}", str(spread(one["seconds"])), f"{one['images_per_s']:,.4g}",
                 f"{one['flops_per_s'] / 1e12:.3g}", f"{one['share_of_peak']:.0%}", memory]
            )  # fmt: skip
    return rows


COLUMNS = ("side", "s/step: median (quartiles)", "images/s", "TFLOP/s", "of the peak", "peak memory")


def main(words: Sequence[str]) -> int:
    """Measure, print, write."""
    name, rest = ("in1k-vit-base", words) if not words or words[0].startswith("-") else (words[0], words[1:])
    try:
        if name == "child":
            print(grown_memory(from_json(StepConfig, rest[0], "child")))
            return 0
        base = StepConfig(**vars(recipes.get(name)))
        if not {"--batch-size"} & {word.partition("=")[0] for word in rest}:
            base.batch_size = min(base.batch_size, 16)
        config = tyro.cli(StepConfig, prog=f"python -m benchmarks.step {name}", args=list(rest), default=base)
        result = measure(config)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    print(say_machine(choose_device(config.device).value, result["peaks"]))
    show(f"{name}, {config.model}, batch {config.batch_size}", COLUMNS, table(result))
    if "ratio" in result:
        ratio = result["ratio"]
        print(
            f"ours / peer: {ratio['median']:.2f} x the images/s (quartiles {ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    write_json(config.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
