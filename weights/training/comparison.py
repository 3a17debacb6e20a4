"""Comparison of two models by the questions that each answers exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

from weights.training.evaluate import Question, is_right


@dataclass(frozen=True)
class Answered:
    """A question with the greedy answer of each model."""

    question: Question
    answer_a: str
    answer_b: str


@dataclass(frozen=True)
class Comparison:
    """Questions by the models that answer them exactly; each list is in the order of the file.

    Attributes:
        both: both models are right.
        only_a: only model A is right.
        only_b: only model B is right.
        neither: both models are wrong.
    """

    both: tuple[Answered, ...]
    only_a: tuple[Answered, ...]
    only_b: tuple[Answered, ...]
    neither: tuple[Answered, ...]


def compare_answers(
    questions: Sequence[Question], answers_a: Sequence[str], answers_b: Sequence[str]
) -> Comparison:
    """Group questions by the model that is right; an answer counts as in ``score_recall``."""
    groups: dict[tuple[bool, bool], list[Answered]] = {
        (a, b): [] for a in (True, False) for b in (True, False)
    }
    for question, a, b in zip(questions, answers_a, answers_b, strict=True):
        groups[is_right(question, a), is_right(question, b)].append(Answered(question, a, b))
    return Comparison(
        both=tuple(groups[True, True]),
        only_a=tuple(groups[True, False]),
        only_b=tuple(groups[False, True]),
        neither=tuple(groups[False, False]),
    )
