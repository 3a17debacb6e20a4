"""JSON text: both writers agree with json, events survive splitlines, NaN is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.errors import EngineError
from server.http.json_text import event, json_text, large_json_text

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    LEAVES.filter(lambda leaf: leaf not in (float("inf"), float("-inf"))),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
)


@given(JSON)
def test_both_writers_write_what_json_reads(value):
    assert json.loads(json_text(value)) == value
    assert large_json_text(value) == json_text(value)


def test_long_lists_of_every_depth_are_written():
    position = {"7": {"logprob": -1.5, "rank": 1, "decoded_token": "a"}}
    choice = {"token_ids": tuple(range(1000)), "prompt_logprobs": [None] + [position] * 200}
    choice["logprobs"] = {"tokens": ["a"] * 300, "top_logprobs": [{"a": -0.5}] * 300}
    answer = {"id": "x", "choices": [choice] * 3, "usage": {"total": 7}}
    assert large_json_text(answer) == json_text(answer)


@pytest.mark.parametrize("write", [json_text, large_json_text])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_an_error(write, number):
    with pytest.raises(EngineError, match="not finite"):
        write({"choices": [{"logprobs": [number]}]})


@given(st.text())
def test_an_event_is_one_line_for_any_client(text):
    data = event(json_text({"text": text}))
    (line, _) = data.decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
    assert event(json_text({"text": "\u2028\u2029\x85ä"})).decode().endswith('ä"}\n\n')
