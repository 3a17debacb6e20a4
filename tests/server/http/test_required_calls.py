"""Deltas of required tool calls: the same calls however their text is split."""

import json

import pytest

from server.http.required_calls import RequiredCalls
from server.http.tool_calls import HermesParser, LlamaParser

CALLS = [
    ("find", {"q": 'a "}{" \\ b\\', "deep": [{"x": {}}, "\\\\"], "é": "\n"}),
    ("stop", {}),
    ('q"uote', {"a": 1}),
]


def written(parser, calls):
    """The calls as the grammar writes them."""
    if parser is HermesParser:
        form, separator = '<tool_call>\n{"name": %s, "arguments": %s}\n</tool_call>', "\n"
    else:
        form, separator = '{"name": %s, "parameters": %s}', "; "
    return separator.join(form % (json.dumps(name), json.dumps(args)) for name, args in calls)


def read(parser, pieces):
    """The (name, arguments) of each call, and whether the last one is not complete."""
    reader, found = RequiredCalls(parser), []
    for piece in pieces:
        deltas = reader.push(piece)
        assert len({delta.index for delta in deltas}) == len(deltas)
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(found)
                found.append((delta.name, ""))
            assert delta.name is not None or delta.arguments
            name, arguments = found[delta.index]
            found[delta.index] = name, arguments + delta.arguments
    return found, reader.is_inside


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_calls_are_read_however_their_text_is_split(parser, size):
    text = written(parser, CALLS)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found, is_inside = read(parser, pieces)
    assert [(name, json.loads(arguments)) for name, arguments in found] == CALLS
    assert not is_inside


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_arguments_come_as_they_are_generated(parser):
    text = written(parser, [("find", {"q": "abc"})])
    cut = text.index("bc")
    assert read(parser, [text[:cut]]) == ([("find", '{"q": "a')], True)
    assert read(parser, [text[: text.index("{", text.index("find"))]]) == ([("find", "")], True)
    assert read(parser, [text[: text.index("find")]]) == ([], False)
