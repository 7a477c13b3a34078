"""Errors repeat names from files that may hold anything; what is printed is one line that a terminal can show."""

from __future__ import annotations

from maekit.config import UserError


def test_a_problem_is_one_printable_line() -> None:
    error = UserError("column a\nb \x1b[2J \udcff is missing", "--data f\u00fcr: \u732b")
    assert error.problems == ("column a\\nb \\x1b[2J \\udcff is missing", "--data f\u00fcr: \u732b")
    assert str(error).splitlines() == list(error.problems)
