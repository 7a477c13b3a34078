"""What is written about results: every command parses, and recipes state the numbers that RESULTS.md has.

RESULTS.md has one table that the recipes' headers are held against: "What the recipes state", a row for each number. In
a header, the numbers before "(RESULTS.md" are held against it; those after it, or without it, are of others.
In commands, single capitals stand for what is filled in: S a seed, T a tool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from maekit import cli, recipes
from maekit.config import PretrainConfig, UserError, adapt_durations
from maekit.models.mae import model_problems

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
FILLED = {"S": "0", "T": "timm"}
STATED = "## What the recipes state"


class Parsed(Exception):
    """Ends a command when its flags are read."""


def parsed(command: str, patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The config that a command's flags give and the default that they changed; nothing is run."""
    found: list[Any] = []

    def stop(kind: Any, prog: str, words: Any, default: Any = None) -> Any:
        found.extend([real(kind, prog, words, default), default])
        raise Parsed

    real = cli.parse
    words = [FILLED.get(word, word) for word in shlex.split(command)[1:]]
    with patch.context() as context:
        context.setattr(cli, "parse", stop)
        with contextlib.suppress(Parsed):
            cli.COMMANDS[words[0]](words[1:])  # `recipes` takes no flags, and prints
    return (found[0], found[1]) if found else (None, None)


def code(text: str) -> list[str]:
    """Code spans, and the lines of code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [" ".join(span.split()) for span in spans] + [line for block in blocks for line in block.splitlines()]


def commands(page: Path, program: str) -> list[str]:
    return [line for line in code(page.read_text()) if line.startswith(f"{program} ")]


def wrong_with(command: str, patch: pytest.MonkeyPatch) -> list[str]:
    """Why a command could not start, whatever its data are."""
    words = command.split()
    if words[1].startswith("--"):
        return []
    if words[1] not in cli.COMMANDS:
        return [f"no command {words[1]}"]
    try:
        config, base = parsed(command, patch)
    except SystemExit:
        return ["its flags do not parse"]
    except UserError as error:
        return list(error.problems)
    if isinstance(config, PretrainConfig):
        adapt_durations(config, base)
        return config.problems() + model_problems(config)
    return list(config.problems()) if hasattr(config, "problems") else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {command: wrong_with(command, monkeypatch) for command in commands(page, "maekit")}
    assert not {command: wrong for command, wrong in found.items() if wrong}
    assert found or page.name != "RESULTS.md"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in commands(page, "make")} <= set(targets)
    modules = {command.split()[2] for command in commands(page, "python") if command.split()[1] == "-m"}
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("maekit pretrain cifar11 --data CIFAR", "no such recipe"),
        ("maekit pretrain cifar10 --data CIFAR --mask-ration 0.8", "do not parse"),
        ("maekit pretrain cifar10 --data CIFAR --mask-ratio 0.99", "--mask-ratio 0.99"),
        ("maekit pretrain cifar10 --data CIFAR --num-heads 5", "--num-heads 5"),
        ("maekit pretrain cifar10 --epochs 3 --steps 4 --data CIFAR", "either as --epochs or as --steps"),
        ("maekit prob RUN --data CIFAR", "no command prob"),
        ("maekit probe RUN --data CIFAR --seed T", "do not parse"),
    ],
)
def test_a_wrong_command_is_found(
    command: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in " ".join(wrong_with(command, monkeypatch))


def test_code_is_found_where_it_stands() -> None:
    text = "see `maekit probe\nRUN --data D` and\n\n```bash\nmaekit resume RUN\n# no `span`\n```\n`make bench`\n"
    assert code(text) == ["maekit probe RUN --data D", "make bench", "maekit resume RUN", "# no `span`"]


# ---- recipes and RESULTS.md ----


def stated(text: str) -> dict[tuple[str, str], str]:
    """(recipe, measure) -> what the table says."""
    part = text.partition(f"{STATED}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \|$", part, re.MULTILINE)
    return {(recipe, measure.strip()): value.strip() for recipe, measure, value in rows}


def promised(expected: str) -> dict[str, str]:
    """Measure -> number, of a header's "Expected" up to "(RESULTS.md"."""
    own, mark, _ = expected.partition("(RESULTS.md")
    found = re.findall(r"([A-Za-z][\w -]*?) (\d+(?:\.\d+)?)(?: \+- \d+(?:\.\d+)?)? %", own) if mark else []
    return {measure.strip(): number for measure, number in found}


def agrees(number: str, value: str) -> bool:
    """Whether a header's number is the table's, rounded to the digits that the header gives."""
    digits = len(number.partition(".")[2])
    return f"{float(value.split()[0]):.{digits}f}" == number


def disagreements(text: str, headers: dict[str, str]) -> list[str]:
    table, found = stated(text), []
    elsewhere = text.partition(f"{STATED}\n")[0] + "\n## " + text.partition(f"{STATED}\n")[2].partition("\n## ")[2]
    for recipe, expected in headers.items():
        promises = promised(expected)
        found += [f"{recipe}: {name} {number} % stands in no row" for name, number in promises.items()
                  if (recipe, name) not in table]  # fmt: skip
        for (name, measure), value in table.items():
            if name == recipe and not agrees(promises.get(measure, "-1"), value):
                found.append(f"{recipe}: {measure} is {value} here, {promises.get(measure)} in the recipe")
    found += [f"a row for {recipe}, which is no recipe" for recipe, _ in table if recipe not in headers]
    found += [f"{value} stands in no table that says how it was measured" for value in table.values()
              if value not in elsewhere]  # fmt: skip
    return found


def test_recipes_state_what_results_has() -> None:
    text = (ROOT / "RESULTS.md").read_text()
    assert stated(text)
    assert not disagreements(text, {name: recipes.header(name).get("expected", "") for name in recipes.names()})


GOOD = f"| mean | 83.0 +- 2.2 |\n\n{STATED}\n\n| `a` | linear probe | 83.0 +- 2.2 |\n\n## Next\n"


@pytest.mark.parametrize(
    ("text", "expected", "words"),
    [
        (GOOD, "linear probe 83 +- 2 % (RESULTS.md, 3 seeds); others reach 12 %.", ""),
        (GOOD, "linear probe 83.0 % (RESULTS.md).", ""),
        (GOOD, "linear probe 84 % (RESULTS.md).", "linear probe is 83.0 +- 2.2 here, 84 in the recipe"),
        (GOOD, "linear probe 83 %, k-NN 80 % (RESULTS.md).", "k-NN 80 % stands in no row"),
        (GOOD, "see RESULTS.md.", "None in the recipe"),
        (GOOD.replace("`a`", "`b`"), "", "a row for b, which is no recipe"),
        (GOOD.replace("83.0", "83.1", 1), "linear probe 83 % (RESULTS.md).", "stands in no table"),
    ],
)
def test_a_disagreement_is_found(text: str, expected: str, words: str) -> None:
    found = disagreements(text, {"a": expected})
    assert not found if not words else words in " ".join(found)


# ---- the ablation ----


def test_each_row_of_the_ablation_adds_to_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1 and 3 to 7: the same command with more flags; what the last one changes is what it says, and no more."""
    page = (ROOT / "docs" / "ablation.md").read_text().partition("## Search")[0]
    rows = re.findall(r"^\| (\d) \|.*\| `(maekit pretrain [^`]+) --out runs/ablation-(\d)` \|$", page, re.MULTILINE)
    assert [number for number, _, _ in rows] == [out for _, _, out in rows] == list("1345678")
    for (_, before, _), (_, after, _) in itertools.pairwise(rows[:-1]):
        assert after.startswith(before)
        assert len(after) > len(before)
    configs = []
    for _, command, _ in rows[-2:]:
        config, base = parsed(command, monkeypatch)
        adapt_durations(config, base)
        configs.append(dataclasses.asdict(config))
    one, other = configs
    rest = {"recipe", "train_images", "mean", "std"}
    rest |= {"probe_every", "panel_every", "save_every"}  # what is seen of it
    rest |= {"decoder", "decoder_dim", "decoder_depth", "predict_share", "mask_ratio", "batch_size", "lr"}  # the search
    unread = {"resize_to", "blr"}  # of other crops; the rate is given
    same = {"embed_dim": 192, "num_heads": 3, "mlp_ratio": 4.0, "class_token": True}  # the model's own, in the recipe
    assert all(one[name] == value and other[name] in (value, None) for name, value in same.items())
    assert {name for name in one if one[name] != other[name]} - unread - same.keys() == rest
