"""Tool calls in generated text, whatever the pieces in which it comes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.tool_calls import HermesParser, LlamaParser, parser_for

HERMES = (
    'I look.\n<tool_call>\n{"name": "find", "arguments": {"q": "a<b"}}\n</tool_call>\n'
    '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
)
LLAMA = (
    '<|python_tag|>{"name": "find", "parameters": {"q": "a;b"}}; {"name": "stop", "parameters": {}}'
)


def parse(parser, text, cuts=()):
    """Push the text in pieces; return its text outside calls, and its calls."""
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [parser.push(text[a:b]) for a, b in itertools.pairwise(ends)]
    parts.append(parser.finish())
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(part.text for part in parts), calls


@given(st.lists(st.integers(0, 1000), max_size=8))
def test_hermes_calls_are_found_however_the_text_is_cut(cuts):
    assert parse(HermesParser(), HERMES, cuts) == (
        "I look.\n",
        [("find", {"q": "a<b"}), ("stop", {})],
    )


@given(st.lists(st.integers(0, 1000), max_size=8))
def test_llama_calls_are_found_however_the_text_is_cut(cuts):
    assert parse(LlamaParser(), LLAMA, cuts) == ("", [("find", {"q": "a;b"}), ("stop", {})])


@pytest.mark.parametrize(
    "text",
    [
        "a plain answer",
        "1 < 2 <tool",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call> more',
        '<tool_call>{"name": "cut", "argum',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
    ids=lambda text: text[:30],
)
@given(cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_text_without_a_whole_call_stays_as_it_is(text, cuts):
    assert parse(HermesParser(), text, cuts) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "a plain answer",
        '{"name": "cut", "param',
        '{"colour": "red"}',
        '{"name": "f", "parameters": {}} and more',
        "{" * 100_000,
        " ",
    ],
    ids=lambda text: text[:30],
)
@given(cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_an_answer_that_is_not_only_calls_is_text(text, cuts):
    assert parse(LlamaParser(), text, cuts) == (text, [])


def test_the_template_shows_the_format():
    assert parser_for("... <tool_call> ...") is HermesParser
    assert parser_for('... {"name": f, "parameters": p} ...') is LlamaParser
    assert parser_for("plain") is None
