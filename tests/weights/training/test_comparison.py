"""Comparison of two models: every question is in the group of those that answer it."""

import pytest

from weights.training.comparison import Answered, compare_answers
from weights.training.evaluate import Question

QUESTIONS = [Question(f"{number}", "yes") for number in range(5)]


def test_questions_are_grouped_by_who_is_right_in_their_order():
    found = compare_answers(
        QUESTIONS, ["yes", "yes", "no", "Yes", "yes"], ["yes", "yes.", "yes", "", "no"]
    )
    assert found.both == (Answered(QUESTIONS[0], "yes", "yes"),)
    assert found.only_a == (
        Answered(QUESTIONS[1], "yes", "yes."),
        Answered(QUESTIONS[4], "yes", "no"),
    )
    assert found.only_b == (Answered(QUESTIONS[2], "no", "yes"),)
    assert found.neither == (Answered(QUESTIONS[3], "Yes", ""),)


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        compare_answers(QUESTIONS, ["yes"] * 4, ["yes"] * 4)
