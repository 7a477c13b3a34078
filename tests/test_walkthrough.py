"""docs/walkthrough.md: its Python runs, block after block, and its commands take the file that it saves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from maekit.cli import main

PAGE = (ROOT / "docs" / "walkthrough.md").read_text()


def test_the_blocks_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    short = code
    for word, less in {"600, 128": "2, 16", '("train", 1024)': '("train", 64)', '("test", 256)': '("test", 16)',
                       "[::256]": "[::16]"}.items():  # fmt: skip
        assert short.count(word) == 1, word
        short = short.replace(word, less)
    exec(compile(short, "walkthrough.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([8, 16])" in printed and "random weights" in printed
    assert (tmp_path / "panel.png").stat().st_size > 10_000
    assert main(["info", "mine.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "four photographs" in said and "96" in said
