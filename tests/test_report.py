"""One page about runs: what it says is what the files say, and nothing in a stranger's folder can do harm by it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_folders import EVIL, card_of_probe, make_finetuning, make_pretraining, make_segmentation
from test_fuzz import bounded, spoil

from maekit import cli
from maekit.report import cards, charts, compare
from maekit.report import html as html_module
from maekit.report.folder import RunFolder, read_run
from maekit.report.html import esc, tag
from maekit.report.pictures import spaced

VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Checks that every element is closed in order, and keeps tags, words and what is loaded."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.problems.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def read(path: Path) -> tuple[Reader, str]:
    """The page's parts, and its visible words in one line; whatever must be true of every page is asserted."""
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.problems, reader.problems
    assert not reader.open, reader.open
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id twice"
    for name, attributes in reader.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")), value
            assert value is None or not value.startswith("#") or value[1:] in ids, f"{value} leads nowhere"
        assert not [key for key in attributes if key.startswith("on")], f"{name} runs a script: {attributes}"
    assert {name for name, _ in reader.tags} & {"link", "iframe", "object", "base", "form"} == set()
    assert [name for name, _ in reader.tags].count("script") == 1
    assert all(one.startswith("#") for one in re.findall(r"url\(\s*['\"]?([^)]*)\)", text))
    assert "@import" not in text
    assert "http-equiv" in text
    assert all("alt" in attributes for name, attributes in reader.tags if name == "img")
    return reader, " ".join(" ".join(reader.words).split())


def report(*words: str) -> int:
    return cli.main(["report", *words])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pretraining(tmp_path_factory.mktemp("runs") / "pre")


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take most of a page's time; they have tests of their own."""
    monkeypatch.setattr(charts, "chart", lambda drawing, prefix: html_module.Html(""))
    monkeypatch.setattr(cards, "by_block", lambda curves, prefix: html_module.Html(""))


@pytest.fixture
def copy(pretrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pretrained, tmp_path / "copy"))


def test_a_pretraining(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it is, whether it worked, what next; curves, panels, card, settings, facts: each number is the file's."""
    assert report(str(copy)) == 0
    assert f"report: {copy / 'report.html'}" in capsys.readouterr().out
    reader, words = read(copy / "report.html")
    for said in (
        "a pretraining by recipe photos", "(5,893 images and 120 held out)", "4 of 4 epochs (376 of 376 steps)",
        "It is finished", "skill is 0.181", "loss 0.4004", "against 0.4889", "k-NN 62.5", "linear 71.3",
        f"maekit reconstruct {copy}", f"maekit probe {copy} --data photos",
        "training, last 16 steps 0.3900", "held-out 0.4004",
        "linear probe 87.3 +- 1.9 %", "random weights 82.0 and 70.0", "raw pixels 42.0 and 38.0",
        "--epochs", "--mask-ratio", "0.9, 0.999", "0.9, 0.95", "table 8", "table 1a", "no error",
        "commit of maekit abc1234", "torch 2.10", "maekit pretrain photos --epochs 4",
        "stops and resumes 1", "4 images/s", "25.0 % of the time", "Unreadable files: 12, the first 10",
        "broken-0.jpg", "cut short", "2 steps were skipped", "(step 5, 9)", "One answer for all",
    ):  # fmt: skip
        assert said in words, said
    assert "broken-10.jpg" not in words
    assert [name for name, _ in reader.tags].count("svg") == 4 + 1 + 1, "four curves, the speed, the card"
    panels = [attributes for name, attributes in reader.tags if name == "figure" and "data-when" in attributes]
    assert [one["data-when"] for one in panels] == ["epoch 2", "epoch 4"]
    assert ["hidden" in one for one in panels] == [True, False], "without a script the last is seen"
    assert "hidden" in next(one for name, one in reader.tags if one.get("class") == "slide"), "and no slider"


def test_numbers_are_those_of_the_card(copy: Path) -> None:
    """Every accuracy of the table of rows stands in card.json."""
    assert report(str(copy)) == 0
    _, words = read(copy / "report.html")
    card = json.loads((copy / "probe-photos" / "card.json").read_text())
    draws = [[one["test"] for one in found] for row in card["scores"] for found in row["probes"].values()]
    known = {f"{100 * sum(shares) / len(shares):.1f}" for shares in draws}
    table = words.partition("Test accuracy, %")[2].partition("One answer")[0]
    shown = set(re.findall(r"(?<![\d(.])\d+\.\d(?= (?:\+-|\())", table))
    assert shown == known


def test_every_kind(tmp_path: Path) -> None:
    """A fine-tuning, a segmentation, a card by itself, and a run that maekit made a moment ago."""
    finetuned, segmented = make_finetuning(tmp_path / "fine"), make_segmentation(tmp_path / "seg")
    assert report(str(finetuned)) == 0
    _, words = read(finetuned / "report.html")
    for said in ("a fine-tuning from runs/pre", "right for 83.3 %", "top-1", "cat 30 90.0", "dog as cat (6)",
                 "better than one answer for all", "maekit predict", "table 9", "layer decay",
                 "the best epoch is chosen on 20 held-out images"):  # fmt: skip
        assert said in words, said
    assert report(str(segmented)) == 0
    _, words = read(segmented / "report.html")
    for said in ("a segmentation from runs/pre", "mean IoU 52.50 %", "road 75.00 80.00 60.00", "tree - 0.00 -",
                 "--predict IMAGES", "preset ade20k"):  # fmt: skip
        assert said in words, said
    alone = tmp_path / "probe-x"
    alone.mkdir()
    (alone / "card.json").write_text(json.dumps(card_of_probe("x")))
    (alone / "config.json").write_text(json.dumps({"sources": ["a", "b"]}))
    assert report(str(alone)) == 0
    assert "an evaluation card of frozen features on x" in read(alone / "report.html")[1]


def test_several_runs_stand_side_by_side(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_pretraining(tmp_path / "other", mask_ratio=0.9, skill=0.05)
    monkeypatch.chdir(tmp_path)
    assert report(str(copy), str(other)) == 0
    reader, words = read(tmp_path / "report.html")
    side = words.partition("Side by side")[2]
    assert "held-out skill 0.181 0.050" in side
    assert "--mask-ratio 0.75 0.9" in side
    made = [RunFolder(copy, "", "pretrain", config, None) for config in ({"a": 1, "b": 2}, {"a": 1}, {"b": 3})]
    assert [row[1:] for row in compare.differing(made)] == [["2", "-", "3"]], "what a task has not is no difference"
    assert "--depth" not in side.partition("Settings that differ")[2].partition("Held-out skill")[0]
    ids = {attributes.get("id") for _, attributes in reader.tags}
    assert {"compare", "run1", "run2"} <= ids
    assert words.count("This is a pretraining") == 2
    monkeypatch.setattr(charts, "chart", lambda drawing, prefix: html_module.Html(""))
    assert report(str(copy), str(copy), "--out", str(tmp_path / "twice.html")) == 0
    assert "(2)" in read(tmp_path / "twice.html")[1], "the same run twice has two names"


def test_nothing_of_a_stranger_is_markup(tmp_path: Path) -> None:
    """Tags, quotes and entities in class names, file names, command, source, data, recipe and keys are words."""
    names = ("run<script>alert(0)", "fine", "seg")
    folders = [
        make_pretraining(tmp_path / names[0], evil=True), make_finetuning(tmp_path / names[1], evil=True),
        make_segmentation(tmp_path / names[2], evil=True),
    ]  # fmt: skip
    for folder in folders:
        assert report(str(folder)) == 0
    assert report(*map(str, folders), "--out", str(tmp_path / "all.html")) == 0
    for path in (*(folder / "report.html" for folder in folders), tmp_path / "all.html"):
        reader, words = read(path)
        assert EVIL in words, "it is shown as it is"
        assert "<b>" not in path.read_text(encoding="utf-8")
        assert "src" not in {key for name, attributes in reader.tags if name != "img" for key in attributes}
        assert "\u202e" not in path.read_text(encoding="utf-8"), "what turns a line around is shown as its escape"


def test_escaping_by_itself() -> None:
    assert esc("<a b='c'>&\"\n\u202e\ud800") == "&lt;a b=&#x27;c&#x27;&gt;&amp;&quot;\\n\\u202e\\ud800"
    assert tag("p", "<", id='"><x', class_=None, hidden=True) == '<p id="&quot;&gt;&lt;x" hidden>&lt;</p>'


@pytest.mark.parametrize("how", ["cut", "text", "pipe", "folder", "link", "gone", "swap", "flip"])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "env.json", "quarantine.jsonl", "nonfinite.jsonl", "lock", "probe-photos/card.json",
     "panels/epoch-0004.png", "checkpoints/step-000376/state.json"],
)  # fmt: skip
@pytest.mark.usefixtures("without_charts")
def test_damaged_files_are_a_line_on_the_page(name: str, how: str, copy: Path) -> None:
    if name == "lock":
        (copy / name).write_text("process 7 on another-host")
    spoil(copy / name, how, 0.5, "[/red] <script>", copy / "panels" / "epoch-0002.png")
    with bounded():
        assert report(str(copy)) == 0
    read(copy / "report.html")


@pytest.mark.parametrize("how", ["cut", "text", "pipe", "folder", "link", "gone", "swap"])
@pytest.mark.usefixtures("without_charts")
def test_a_config_that_cannot_be_read(how: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left is shown, as the metrics say that it is a run; without them it is refused."""
    spoil(copy / "config.json", how, 0.5, "", copy / "panels" / "epoch-0002.png")
    with bounded():
        assert report(str(copy)) == 0
    read(copy / "report.html")
    (copy / "metrics.jsonl").unlink()
    assert report(str(copy)) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.usefixtures("without_charts")
def test_a_torn_line_is_being_written(copy: Path) -> None:
    """It is no damage; a broken line before it is, and is counted."""
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "lo')
    assert report(str(copy)) == 0
    assert "could not be read" not in read(copy / "report.html")[1]
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'\n[1]\n{"kind": "heldout", "epoch": 1e999, "loss": ' + b"9" * 5000 + b', "skill": NaN}\n')
    assert report(str(copy)) == 0
    assert "metrics.jsonl: 2 lines left out" in read(copy / "report.html")[1]


NASTY: list[Any] = [None, True, -1, 10**18, 1e300, -1e300, "x", [], [[]], {}, {"a": None}, [None, {}], "9" * 9000]


@pytest.mark.parametrize("value", NASTY, ids=lambda value: str(value)[:12])
def test_values_of_other_kinds(value: Any, tmp_path: Path) -> None:
    """Every value of every file becomes something else, one file after the other: a page comes out all the same."""

    def change(path: Path) -> None:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        texts = []
        for line in lines:
            record = json.loads(line)
            kept = {key: record[key] for key in ("kind", "task", "recipe", "model") if key in record}
            texts.append(json.dumps(dict.fromkeys(record, value) | kept))
        path.write_text("\n".join(texts) + "\n")

    makers: dict[str, Callable[[Path], Path]] = {
        "pre": make_pretraining, "fine": make_finetuning, "seg": make_segmentation,
    }  # fmt: skip
    for name, make in makers.items():
        folder = make(tmp_path / name)
        for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
            change(path)
        with bounded():
            assert report(str(folder)) in (0, 2)


@pytest.mark.usefixtures("without_charts")
def test_files_elsewhere_are_not_taken_in(copy: Path, tmp_path: Path) -> None:
    """A link could put a private picture or text of the reader's onto a page that is sent away."""
    private = tmp_path / "private.png"
    Image.fromarray(np.full((40, 40, 3), 77, np.uint8)).save(private)
    (tmp_path / "secret.json").write_text(json.dumps({"command": ["SECRET"], "cpu": "SECRET"}))
    for name, target in (("panels/epoch-0004.png", private), ("env.json", tmp_path / "secret.json")):
        (copy / name).unlink()
        (copy / name).symlink_to(target)
    assert report(str(copy)) == 0
    reader, words = read(copy / "report.html")
    assert "SECRET" not in words
    assert [one["data-when"] for name, one in reader.tags if "data-when" in one] == ["epoch 2"]


@pytest.mark.usefixtures("without_charts")
def test_the_page_keeps_to_its_size(copy: Path) -> None:
    """Large panels are made smaller and fewer, the last one stays; and it is said."""
    random = np.random.default_rng(0)
    for number in range(1, 13):
        noise = random.integers(0, 256, (900, 700, 3), np.uint8)
        Image.fromarray(noise).save(copy / "panels" / f"epoch-{number:04d}.png")
    assert report(str(copy), "--max-mb", "2") == 0
    path = copy / "report.html"
    assert path.stat().st_size <= 2_000_000
    reader, words = read(path)
    shown = [str(one["data-when"]) for _, one in reader.tags if "data-when" in one]
    assert len(shown) > 1
    assert shown[-1] == "epoch 12"
    assert f"{len(shown)} of 12 panels" in words
    assert report(str(copy), "--panels", "0") == 0
    assert "<img" not in path.read_text()


@pytest.mark.usefixtures("without_charts")
def test_pictures_are_made_anew(copy: Path) -> None:
    """What an image file holds beside its pixels does not come along, and a file that is no PNG is no picture."""
    path = copy / "panels" / "epoch-0004.png"
    path.write_bytes(path.read_bytes() + b"<script>hidden</script>")
    (copy / "panels" / "epoch-0003.png").write_bytes(b"GIF89a<script>")
    bomb = Image.new("1", (12_000, 12_000))
    bomb.save(copy / "panels" / "epoch-0001.png")
    assert report(str(copy)) == 0
    _, words = read(copy / "report.html")
    assert "epoch-0003.png: not a PNG" in words
    assert "epoch-0001.png: 12,000 x 12,000 px: too large" in words
    assert [spaced(*pair) for pair in ((3, 5), (5, 1), (5, 0), (0, 5), (10, 4))] == [
        [0, 1, 2], [4], [], [], [0, 3, 6, 9],
    ]  # fmt: skip


@pytest.mark.usefixtures("without_charts")
def test_stopped_running_and_not_begun(copy: Path) -> None:
    """A run that is not finished says how to go on, or that it is running."""
    state = copy / "checkpoints" / "step-000376" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"total_steps": 900}))
    assert report(str(copy)) == 0
    _, words = read(copy / "report.html")
    assert "It is stopped: 4 of 9.574 epochs (376 of 900 steps) are done" in words
    assert f"next: maekit resume {copy}" in words
    (copy / "lock").write_text(f"process {os.getpid()} on {platform.node() or 'this host'}")
    assert report(str(copy)) == 0
    assert "It was running when this page was written" in read(copy / "report.html")[1]
    (copy / "lock").write_text(f"process 999999999 on {platform.node() or 'this host'}")
    assert read_run(str(copy)).holder == ""


@pytest.mark.usefixtures("without_charts")
def test_an_earlier_page_that_says_something_else_is_kept(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (((), ""), ((), "said the same"), (("--panels", "1"), "kept as report-1.html")):
        assert report(str(copy), *words) == 0
        assert said in capsys.readouterr().out


@pytest.mark.usefixtures("without_charts")
def test_what_is_wrong_is_said_at_once(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "one").mkdir(parents=True)
    (tmp_path / "empty" / "one" / "config.json").write_text("{}")
    words = [str(copy), str(tmp_path / "none"), str(tmp_path / "empty"), str(copy / "env.json")]
    assert report(*words, "--max-mb", "0.1", "--panels", "-1", "--out", "x.pdf") == 2
    error = capsys.readouterr().err
    for said in ("none: no such folder", "empty: holds no run", "env.json: is a file", "--max-mb 0.1", "--panels -1",
                 "--out x.pdf", f"there are some in it, such as {tmp_path}/empty/one"):  # fmt: skip
        assert said in error, said
    assert report() == 2
    assert "a run's folder is missing" in capsys.readouterr().err
    assert report(str(copy), "--out", str(copy / "env.json" / "x.html")) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("without_charts")
def test_the_policy_allows_the_one_script(copy: Path) -> None:
    """The script's hash stands in the page's policy, which allows nothing else and lets nothing be loaded."""
    assert report(str(copy)) == 0
    text = (copy / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
