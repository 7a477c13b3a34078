"""How numbers of small and large tests are written, and the note below a card's table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from maekit.training.card import Row, cell, labels_of, note_of
from maekit.training.interval import in_words, percent


@pytest.mark.parametrize(
    ("share", "count", "said"),
    [
        (1.0, 12, "100.0 (75.8 to 100.0)"),  # Wilson's 12 / (12 + 1.96^2)
        (0.5, 12, "50.0 (25.4 to 74.6)"),  # symmetric, but of so few that it stands out as an interval
        (0.679, 10_000, "67.9 +- 0.9"),
        (0.99, 1_000, "99.0 (98.2 to 99.5)"),
        (0.88, 1_024, "88.0 +- 2.1"),
        (0.0, 1, "0.0 (0.0 to 79.3)"),
    ],
)
def test_an_interval_is_written_as_what_it_is(share: float, count: int, said: str) -> None:
    """+- only where both sides are alike: 12 of 12 are 75.8 to 100 %, never up to 124."""
    assert percent(share, count) == said


def test_sentences_have_as_many_digits_as_the_images_tell() -> None:
    assert in_words(1.0, 12) == "100.0 % (95 % interval 75.8 to 100.0, 12 images)"
    assert in_words(0.5, 10_000) == "50.00 % (95 % interval 49.02 to 50.98, 10,000 images)"
    assert in_words(1.0, 1) == "100.0 % (95 % interval 20.7 to 100.0, 1 image)"


def test_cells_of_a_table() -> None:
    """The interval has a line of its own; several draws have their deviation."""
    assert cell([1.0], 12) == "100.0\n(75.8 to 100.0)"
    assert cell([0.5], 10_000) == "50.0 +- 1.0"
    assert cell([0.4, 0.5, 0.6], 12) == "50.0 +- 10.0"
    assert cell([], 12) == "-"


def row(*columns: str, labels: tuple[int, ...] = (9, 9, 9)) -> Row:
    few: list[Any] = [SimpleNamespace(setting={"labels": count}) for count in labels]
    probes = {name: few for name in columns if name.endswith("labels")}
    return Row("mine", 8, "", [], [], probes, {name: [0.5] for name in columns}, {})


def test_the_note_speaks_of_what_was_measured() -> None:
    """Of few labels, LARS and probes that leave the held-out tenth out only where the table has them."""
    plain = note_of([row("linear", "knn")], 10_000)
    assert "few labels" not in plain
    assert "LARS" not in plain
    assert "L-BFGS and k-NN are then fitted on that tenth too; the test split is scored once" in plain
    whole = note_of([row("linear", "lars", "knn", "1 % labels")], 10_000)
    assert whole.count("few labels") == 3
    assert "L-BFGS, LARS and k-NN are then fitted on that tenth too, the others without it" in whole
    keras = note_of([row("linear", "knn", "keras")], 10_000)
    assert "L-BFGS, the tutorial's probe and k-NN are then fitted on that tenth too; the test" in keras


def test_the_note_says_how_many_labels_there_were() -> None:
    """Where the draws differ, from the fewest to the most."""
    rows = [row("1 % labels", labels=(3, 3, 3)), row("10 % labels", labels=(1_024, 1_030, 1_024))]
    assert labels_of(rows) == "3 images under 1 % labels, 1,024 to 1,030 images under 10 % labels"
    assert "few labels: in proportion to the classes, one of each at least: 3 images under 1 %" in note_of(rows, 500)


def test_the_note_of_a_small_test_says_what_it_cannot_tell() -> None:
    assert "18 test images: rows that differ by less than their intervals" in note_of([row("linear")], 18)
    assert "test images:" not in note_of([row("linear")], 100)
