"""One page about runs, to look at, to send to somebody, to keep beside a paper.

    maekit report runs/c10
    maekit report runs/one runs/two --out both.html

Reads what the runs' folders hold and measures nothing. A folder may be of a run that trains at this moment, damaged, or
from a stranger: what cannot be read is said on the page. The page is one file of HTML that loads nothing.
Cost: seconds, most of them for loading PyTorch and for making panels smaller.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path

from rich.markup import escape

from maekit import recipes
from maekit.config import PretrainConfig, ReportConfig, UserError
from maekit.environment import own_version
from maekit.keeping import keeping
from maekit.report.folder import RunFolder, read_run
from maekit.report.page import Asked, page
from maekit.terminal import make_console
from maekit.training.saving import write_whole

DEFAULT = "report.html"
MOST_RUNS = 24


def main(sources: list[str], config: ReportConfig) -> int:
    """Write the page about these folders, in their order.

    Raises:
        UserError: settings, folders that hold no run, or a file that cannot be written.
    """
    problems = config.problems()
    if len(sources) > MOST_RUNS:
        problems.append(f"{len(sources)} runs: one page holds at most {MOST_RUNS}")
    runs: list[RunFolder] = []
    for source in sources:
        try:
            runs.append(read_run(source))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    console = make_console()
    asked = Asked(config.panels, int(config.max_mb * 1e6))
    text = page(runs, [recipe_of(run) for run in runs], asked, own_version())
    if config.out is not None:
        out = Path(config.out).expanduser()
    else:
        out = Path(DEFAULT) if len(runs) > 1 else runs[0].path / DEFAULT
    size = len(text.encode())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with keeping(out, console):
            write_whole(out, text)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); name another file with --out"
        ) from error
    for run in runs:
        for line in run.remarks:
            console.print(f"[yellow]{escape(run.shown_path)}:[/yellow] {escape(line)}", soft_wrap=True)
    if size > asked.most_bytes:
        console.print(f"[yellow]{size / 1e6:.1f} MB:[/yellow] words, tables and curves alone are more than --max-mb")
    console.print(f"report: {out} ({size / 1e6:.2f} MB)", markup=False, soft_wrap=True)
    if config.open and not webbrowser.open(out.resolve().as_uri()):
        console.print("--open: no browser was found here")
    return 0


def recipe_of(run: RunFolder) -> PretrainConfig | None:
    """The recipe that a pretraining was begun from, where this version has it."""
    name = run.config.get("recipe")
    return recipes.get(name) if run.task == "pretrain" and name in recipes.names() else None
