"""Classes of different sizes: what one answer reaches, the mean over the classes, and classes nothing is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import balanced_accuracy_score
from tiny_classes import TRAINING, write_encoder, write_images

from maekit import cli
from maekit.training.imbalance import TestClasses as Classes
from maekit.training.imbalance import balanced_accuracy
from maekit.training.scoring import Answers, score
from maekit.viz.confusion import confusion_figure


def test_the_mean_over_the_classes_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = random.choice(6, 500, p=[0.6, 0.2, 0.0, 0.1, 0.1, 0.0])
    said = np.where(random.random(500) < 0.5, labels, random.integers(0, 2, 500))
    expected = balanced_accuracy_score(labels, said)
    assert balanced_accuracy(said, labels) == pytest.approx(expected)
    answers = Answers(labels, said, (said != labels).astype(np.int64), np.zeros(500))
    assert score(answers, 6).balanced == pytest.approx(expected)  # a class without images counts for nothing
    assert score(answers, 6).top1 != pytest.approx(expected, abs=0.01)
    one_answer = np.zeros(500, np.int64)
    assert balanced_accuracy(one_answer, labels) == pytest.approx(1 / 4)


def test_classes_by_hand() -> None:
    """Four of ten test images are of c, which no training image has."""
    found = Classes.of(np.array([0, 0, 1]), np.array([0] * 5 + [1] + [2] * 4), ["a", "b", "c", "d"])
    assert found.largest_said() == "always answering a would be right for 50.0 % of the test images"
    assert found.remarks() == [
        "4 of 10 test images are of classes that no training image has (c): no more than 60.0 % can be right"
    ]
    assert found.facts() == {"most_frequent_class": 0.5, "test_images_of_unseen_classes": 4}
    assert found.is_uneven  # 0.5 for a third
    even = Classes.of(np.array([0, 1, 2]), np.array([0, 0, 1, 2]), ["a", "b", "c"])
    assert (even.is_uneven, even.remarks()) == (True, [])
    assert not Classes.of(np.array([0, 1]), np.array([0] * 7 + [1] * 3), ["a", "b"]).is_uneven
    unknown = Classes.of(None, np.array([0, 2]), ["a", "b", "c"])
    assert (unknown.facts(), unknown.remarks()) == ({"most_frequent_class": 0.5}, [])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder, and 95 of 100 test images of one class, two of a class that only the test has."""
    base = tmp_path_factory.mktemp("uneven")
    write_images(base / "set" / "train", {"healthy": 57, "sick": 3})
    write_images(base / "set" / "test", {"healthy": 95, "sick": 3, "unknown": 2})
    return write_encoder(base / "encoder"), base / "set"


def test_a_probes_card_says_so(uneven: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the table of accuracies stands that of the classes' mean; the card has both."""
    words = ["probe", str(uneven[0]), "--data", str(uneven[1]), "--out", str(tmp_path / "card"), "--device", "cpu"]
    assert cli.main([*words, "--no-baselines", "--probes", "few-labels", "--few-labels", "0.1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        said.count("2 of 100 test images are of classes that no training image has (unknown): no more than 98.0") == 1
    )
    assert "always answering healthy would be right for 95.0 % of the test images" in said
    assert "the same as the mean over the classes (balanced accuracy)" in said
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert (card["most_frequent_class"], card["test_images_of_unseen_classes"]) == (0.95, 2)
    probes = card["scores"][0]["probes"]
    assert [one["setting"]["labels"] for one in probes["10 % labels"]] == [6, 6, 6]
    for found in (probes["linear"][0], probes["knn"][0], *probes["10 % labels"]):
        assert found["balanced"] <= 2 / 3 + 1e-9  # the third class is never right
        assert found["balanced"] < found["test"]
    assert f"{100 * probes['linear'][0]['balanced']:.1f}" in said.partition("balanced accuracy")[2]


def test_a_fine_tunings_card_says_so(
    uneven: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier that says one class is right in 95 of 100 cases, and in a third of the classes."""
    words = [word for word in TRAINING if word != "digits"]
    words[words.index("--data") : words.index("--data") + 1] = ["--data", str(uneven[1])]
    words[words.index("--batch-size") + 1] = "32"
    run = ["finetune", str(uneven[0]), *words, "--steps", "3", "--out", str(tmp_path / "run")]
    assert cli.main(run) == 0
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    shares = [share for share in card["per_class"].values() if share is not None]
    assert card["balanced"] == pytest.approx(sum(shares) / 3)
    assert card["test_images_of_unseen_classes"] == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "are of classes that no training image has (unknown): no more than 98.0 % can be right" in said
    assert "no held-out image is of sick: the choice of the best epoch does not see what becomes of it" in said
    assert f"mean over the classes (balanced accuracy) {100 * card['balanced']:.1f} %" in said
    assert cli.main(["finetune", str(tmp_path / "run"), "--data", str(uneven[1]), "--eval", "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "run" / "eval-set" / "card.json").read_text())
    assert again["balanced"] == pytest.approx(card["balanced"])
    assert "test_images_of_unseen_classes" not in again  # what it was trained on is another question


def test_a_long_title_of_a_table_is_not_cut_off() -> None:
    title = "finetune-labels: a fixed 20% of the images, as the data have no test split"
    figure = confusion_figure(np.eye(3, dtype=np.int64), ("a", "b", "c"), title=title)
    FigureCanvasAgg(figure).draw()
    heading = figure.texts[0]
    assert " ".join(heading.get_text().split()) == title
    assert heading.get_window_extent().x1 <= figure.bbox.x1
