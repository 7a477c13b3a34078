"""The house rules that a machine can check: imports go one way, files and functions stay short, importing does nothing.

The rooms are those of DESIGN's third section: cli, demo -> tasks -> parts -> base; inside the parts:
training, viz -> data, weights -> models. Tasks never import tasks; recipes import config only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

LEVELS = {
    "config": 0, "configfile": 1, "environment": 0, "failures": 0, "helptext": 0, "hub": 1, "processes": 1, "rng": 0,
    "runtime": 1, "seeding": 1, "stopping": 1, "compiling": 2,  # base
    "terminal": 2,
    "keeping": 3,  # base, and reads terminal
    "models": 3, "data": 4, "weights": 4, "training": 5, "viz": 5,  # parts
    "report": 6,
    "recipes": 6, "tasks": 7,
    "": 8,  # the package itself: the public API
    "the entry": 9,
}  # fmt: skip
"""A room imports rooms of lower levels and itself. The first part of a module's name below maekit is its room."""
ENTRY = {"cli", "demo", "__main__"}
ITSELF_NEVER = {"tasks"}
CONFIG_ONLY = {"config", "rng", "recipes"}
NO_TORCH = {"config", "rng", "recipes", ""}
"""These are imported by `maekit --help`, or by everybody."""
HEAVY = {"torch", "torchvision", "timm", "accelerate", "sklearn", "transformers"}


@dataclass(frozen=True)
class Import:
    """One imported module, as its full name, and whether it is only imported when a function runs or types are read."""

    target: str
    line: int
    lazy: bool


def imports_of(source: str, module: str, modules: frozenset[str], is_package: bool = False) -> Iterator[Import]:
    """Every import in a source text, inside functions too, as full names; `modules` are maekit's own."""

    def full(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        base = parts[: len(parts) - node.level + int(is_package)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = full(node)
            for alias in node.names:  # `from maekit import config` imports maekit.config
                below = f"{base}.{alias.name}"
                yield Import(below if below in modules else base, node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(first.value, node.lineno, lazy)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(source), lazy=False)


def room_of(module: str) -> str:
    first = module.split(".")[1] if "." in module else ""
    return "the entry" if first in ENTRY else first


def wrong_imports(source: str, module: str, modules: frozenset[str], is_package: bool = False) -> list[str]:
    """What is wrong with a module's imports, one sentence each."""
    room = room_of(module)
    if room not in LEVELS:
        return [f"{module} stands in no room: give {room!r} a level in {Path(__file__).name}"]
    found = []
    for one in imports_of(source, module, modules, is_package):
        top = one.target.split(".")[0]
        where = f"{module}:{one.line} imports {one.target}: "
        if top in HEAVY and room in NO_TORCH and not (room == "" and one.lazy):
            found.append(where + "it must be imported without torch and its kin")
        if top != "maekit" or one.target == module:
            continue
        to = room_of(one.target)
        if to not in LEVELS:
            found.append(where + "no such room")
        elif room == "" and not one.lazy and to != "config":
            found.append(where + "the public API is loaded lazily, inside functions")
        elif room in CONFIG_ONLY and to not in ("config", room):
            found.append(where + f"{room} imports config only")
        elif room == to and room in ITSELF_NEVER:
            found.append(where + f"{room} never import {to}")
        elif room != to and LEVELS[to] >= LEVELS[room]:
            found.append(where + f"the arrow from {room} to {to or 'the package itself'} does not go down")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files() -> list[Path]:
    return sorted((ROOT / "maekit").rglob("*.py"))


def long_functions(source: str) -> list[tuple[str, int]]:
    """Names and lines of the functions above the limit, nested ones too."""
    return [
        (node.name, length)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def test_imports_go_one_way() -> None:
    paths = package_files()
    modules = frozenset(module_name(path) for path in paths)
    assert {"maekit", "maekit.config", "maekit.viz.panels"} <= modules, "the reader finds no files"
    found = []
    for path in paths:
        source = path.read_text(encoding="utf-8")
        found += wrong_imports(source, module_name(path), modules, path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


MODULES = frozenset({"maekit", "maekit.config", "maekit.rng", "maekit.models.mae", "maekit.data.loader", "maekit.viz",
                     "maekit.weights.layouts", "maekit.training.optim", "maekit.tasks.probe"})  # fmt: skip


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("maekit.models.mae", "from maekit.data.loader import Loader", "models to data does not go down"),
        ("maekit.models.mae", "def f():\n    import maekit.data.loader", "models to data does not go down"),
        ("maekit.models.mae", "import maekit", "models to the package itself does not go down"),
        ("maekit.models.mae", "from ..data import loader", "models to data does not go down"),
        ("maekit.models.mae", "if TYPE_CHECKING:\n    from maekit.viz import panels", "models to viz"),
        ("maekit.models.mae", "import importlib\nimportlib.import_module('maekit.cli')", "models to the entry"),
        ("maekit.data.loader", "from maekit.weights import layouts", "data to weights does not go down"),
        ("maekit.weights.layouts", "from maekit.data.loader import Loader", "weights to data does not go down"),
        ("maekit.viz.panels", "from maekit.training.optim import build", "viz to training does not go down"),
        ("maekit.training.optim", "from maekit import viz", "training to viz does not go down"),
        ("maekit.training.optim", "from maekit.tasks.probe import main", "training to tasks does not go down"),
        ("maekit.viz.panels", "from maekit.recipes import RECIPES", "viz to recipes does not go down"),
        ("maekit.tasks.finetune", "from maekit.tasks.probe import knn", "tasks never import tasks"),
        ("maekit.tasks.finetune", "from .probe import knn", "tasks never import tasks"),
        ("maekit.tasks.probe", "from maekit.cli import main", "tasks to the entry does not go down"),
        ("maekit.recipes.cifar10", "from maekit import rng", "recipes imports config only"),
        ("maekit.rng", "from maekit.models.mae import MAE", "rng imports config only"),
        ("maekit.config", "import torch.nn as nn", "without torch"),
        ("maekit.recipes.cifar10", "def f():\n    from torch import nn", "without torch"),
        ("maekit.utils", "", "stands in no room"),
        ("maekit.tasks.probe", "from maekit.helpers import x", "no such room"),
    ],
)
def test_checker_catches(module: str, source: str, word: str) -> None:
    found = wrong_imports(source, module, MODULES)
    assert len(found) == 1, found
    assert word in found[0]


def test_checker_catches_an_eager_public_api() -> None:
    assert wrong_imports("from maekit.models.mae import MAE", "maekit", MODULES, is_package=True)
    assert wrong_imports("from .models import mae", "maekit", MODULES, is_package=True)
    assert wrong_imports("import torch", "maekit", MODULES, is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("maekit", "def __getattr__(name):\n    import torch\n    from maekit.tasks import probe"),
        ("maekit", "if TYPE_CHECKING:\n    from maekit.models.mae import MAE"),
        ("maekit.cli", "import maekit\nfrom maekit import demo, tasks"),
        ("maekit.tasks.probe", "import torch\nfrom maekit.recipes import RECIPES\nfrom maekit.viz import panels"),
        ("maekit.training.monitor", "from maekit.training.optim import f\nfrom maekit.data.loader import g"),
        ("maekit.data.loader", "from maekit.models import mae\nfrom maekit import config, rng, runtime\nimport torch"),
        ("maekit.recipes.cifar10", "from dataclasses import replace\nfrom maekit.config import PretrainConfig"),
    ],
)
def test_checker_lets_pass(module: str, source: str) -> None:
    modules = MODULES | {f"maekit.{room}" for room in {*LEVELS, *ENTRY} if room}
    assert not wrong_imports(source, module, modules, is_package=module == "maekit")


def test_files_and_functions_are_short() -> None:
    found = []
    for path in [
        *package_files(),
        *sorted((ROOT / "tests").rglob("*.py")),
        *sorted((ROOT / "benchmarks").rglob("*.py")),
    ]:
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{name} has {lines} lines, at most {MAX_FILE_LINES}")
        for function, length in long_functions(source):
            if not (function == "main" and name.startswith("maekit/tasks/")):
                found.append(f"{name}: {function} has {length} lines, at most {MAX_FUNCTION_LINES}")
    assert not found, "\n" + "\n".join(found)


def test_long_functions_are_found() -> None:
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION_LINES))
    assert long_functions(f"def short():\n    x = 1\n\ndef long():\n{body}\n") == [("long", MAX_FUNCTION_LINES + 1)]


def test_code_is_ascii() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in package_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    ]
    assert not found, "\n" + "\n".join(found)


IMPORT_CHECK = """
import logging, os, signal, sys, threading, warnings

def state():
    root = logging.getLogger()
    return (list(root.handlers), root.level, list(root.filters), logging.root.manager.disable, list(warnings.filters),
            dict(os.environ), threading.active_count(), sys.excepthook, os.getcwd(),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

before = state()
import maekit
assert state() == before, f"import maekit changed {[pair for pair in zip(before, state()) if pair[0] != pair[1]]}"
import maekit.config, maekit.recipes
if EXTRA:
    import maekit.cli
heavy = sorted(HEAVY & set(sys.modules))
assert not heavy, f"imported: {heavy}"
"""


def test_importing_has_no_side_effect_and_no_torch() -> None:
    extra = (ROOT / "maekit" / "cli.py").exists()
    code = f"HEAVY = {HEAVY!r}\nEXTRA = {extra}\n{IMPORT_CHECK}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
    assert not done.stderr, done.stderr
