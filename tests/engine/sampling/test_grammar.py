"""Checks of grammars as plain data."""

import pickle

import pytest

from engine.errors import RequestError
from engine.sampling.grammar import MAX_GRAMMAR_CHARS, Grammar


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "", "regex must not be empty"),
        ("choice", (), "choice must not be empty"),
        ("choice", ("a", ""), "choice must not be empty"),
        ("json_schema", "x" * (MAX_GRAMMAR_CHARS + 1), "at most 65536"),
        ("choice", ("x" * 300,) * 300, "has 90000 characters"),
        ("grammar", "a\ud800", "lone surrogate"),
    ],
)
def test_a_wrong_grammar_names_its_field(kind, source, message):
    with pytest.raises(RequestError, match=message) as caught:
        Grammar(kind, source, "response_format")
    assert caught.value.param == "response_format"


def test_a_grammar_can_be_sent_and_compared():
    grammar = Grammar("choice", ("a", "b"), "structured_outputs")
    assert pickle.loads(pickle.dumps(grammar)) == grammar
    assert grammar == Grammar("choice", ("a", "b"), "response_format")
    assert Grammar("json_object").source == ""
