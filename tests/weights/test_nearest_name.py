"""Suggestions for mistyped names."""

import pytest

from weights.nearest_name import suggestion

KNOWN = ["optimizer.lr", "run.steps", "run.seed", "data.train"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("run.step", "run.steps"),
        ("run.lr", "optimizer.lr"),
        ("data.trian", "data.train"),
        ("run.colour", None),
        ("run.max_steps", "run.steps, in optimizer steps"),
        ("run.epochs", "run.steps, in optimizer steps"),
        ("data.steps", "run.steps"),
        ("train.learning_rate", "optimizer.lr"),
        ("x" * 100_000, None),
    ],
)
def test_the_nearest_name_is_suggested(name, near):
    assert suggestion(name, KNOWN) == (f"; did you mean {near}?" if near else "")
