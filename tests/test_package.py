"""What pip installs: the wheel and the source archive hold all that they must, and say what they are."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import maekit
from maekit import environment


def build(tmp_path: Path) -> tuple[Path, Path]:
    """A wheel and a source archive from a copy of the sources, by setuptools itself, without a network."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or newer")
    assert setuptools
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("maekit", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    program = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, capture_output=True)
    return next((copy / "dist").glob("*.whl")), next((copy / "dist").glob("*.tar.gz"))


def test_the_wheel_and_the_source_archive_are_whole(tmp_path: Path) -> None:
    wheel, archive = build(tmp_path)
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        info = next(name for name in held if name.endswith("/METADATA"))
        told = email.message_from_bytes(file.read(info))
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "maekit").rglob("*.py")} | {"maekit/py.typed"}
    assert ours == {name for name in held if name.startswith("maekit/")}
    assert {name.partition("/")[0] for name in held} == {"maekit", info.partition("/")[0]}  # no tests, no benchmarks
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert told["License-Expression"] == "Apache-2.0" and "Typing :: Typed" in told.get_all("Classifier", [])
    assert {"demo", "dicom", "export", "hub", "dev"} <= set(told.get_all("Provides-Extra", []))
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert needed | {"RESULTS.md", "CONTRIBUTING.md", "docs/walkthrough.md", "Makefile", "LICENSE"} <= inside


def test_sources_that_are_not_installed_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the path, as on a cluster: pip knows no version of it, and runs write one down."""

    def version(name: str) -> str:
        if name == "maekit":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert maekit.__version__ == "unknown (not installed)" == environment.package_versions()["maekit"]


@pytest.mark.parametrize("program", ["/opt/bin/maekit", "/opt/lib/maekit/__main__.py"])
def test_a_command_is_written_down_as_it_is_typed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """python -m maekit and torchrun -m maekit name the file; nobody can type that from another folder."""
    monkeypatch.setattr(sys, "argv", [program, "plan", "digits"])
    assert environment.environment(torch.device("cpu"))["command"] == ["maekit", "plan", "digits"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed, so no run writes a commit down")
def test_the_commit_is_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment inside a project of the user's: the project's commit is not ours."""
    inside = tmp_path / "project" / "venv" / "maekit"
    inside.mkdir(parents=True)

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path / "project"), *words], check=True, capture_output=True)

    git("init")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(environment, "__file__", str(inside / "environment.py"))
    assert environment._commit.__wrapped__() is None
    shutil.copytree(tmp_path / "project" / ".git", inside.parent / ".git")
    assert environment._commit.__wrapped__() is not None
