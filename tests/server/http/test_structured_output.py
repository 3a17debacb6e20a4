"""Structured output over HTTP: formats of OpenAI and vLLM, required tool calls, and mistakes."""

import json
import re

import numpy as np
import openai
import pytest

from engine.errors import RequestError
from engine.sampling.masks import num_words
from server.http.chat_message import FunctionDefinition
from server.http.structured_output import ResponseFormat, StructuredOutputs
from server.http.tool_calls import FoundCall, HermesParser, LlamaParser
from server.http.tool_grammar import optional_calls, required_calls
from tests.models import EOS_ID, VOCAB_SIZE, byte_tokenizer
from weights.checkpoints.tokenizer import JsonTokenizer
from weights.grammars.compiler import GrammarCompiler

TOKENIZER = JsonTokenizer(byte_tokenizer())
MESSAGES = [{"role": "user", "content": "go"}]
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [1, 22, 333]}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}
OK = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FIND = {"name": "find", "parameters": OK}
STOP = {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}
TOOLS = [{"type": "function", "function": function} for function in (FIND, STOP)]


VALUES = {"model": "tiny-memory", "messages": MESSAGES, "max_tokens": 300, "seed": 1}


@pytest.fixture(scope="module")
def client(memory_server):
    with openai.OpenAI(base_url=f"{memory_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def chat(client):
    def create(**options):
        return client.chat.completions.create(**VALUES | options).choices[0]

    return create


def fits(text):
    value = json.loads(text)
    return set(value) == {"size", "ok"} and value["size"] in (1, 22, 333)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_fits_its_schema(chat, ignore_eos):
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    choice = chat(response_format=response_format, extra_body={"ignore_eos": ignore_eos})
    assert choice.finish_reason == "stop" and fits(choice.message.content)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"choice": ["yes", "no way"]}, "yes|no way"),
        ({"regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"grammar": 'start: "x" ("y" | "z") "!"'}, "x[yz]!"),
        ({"json": json.dumps({"type": "boolean"})}, "true|false"),
    ],
    ids=["choice", "regex", "grammar", "json"],
)
def test_completions_follow_every_kind_of_grammar(memory_server, grammar, pattern):
    answer = memory_server.complete(prompt="go", max_tokens=50, structured_outputs=grammar).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["text"])


def test_required_tools_are_called(chat):
    choice = chat(
        tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=openai.omit
    )
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name in ("find", "stop")
    assert call.function.name == "stop" or set(json.loads(call.function.arguments)) == {"ok"}


def test_required_calls_are_streamed_as_they_are_generated(client, chat):
    tools = [{"type": "function", "function": FIND}]
    options = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    options |= {"max_tokens": 150}
    (whole,) = chat(**options).message.tool_calls
    with client.chat.completions.stream(**VALUES | options) as stream:
        deltas = [event for event in stream if event.type.endswith("arguments.delta")]
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "find" and call.function.arguments == whole.function.arguments
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert len(deltas) > 1
    assert "".join(event.arguments_delta for event in deltas) == call.function.arguments


def test_a_named_tool_is_called(chat):
    named = {"type": "function", "function": {"name": "find"}}
    choice = chat(tools=TOOLS, tool_choice=named, max_tokens=openai.omit)
    # several calls may follow each other until the tokens end
    calls = choice.message.tool_calls
    assert calls and all(call.function.name == "find" for call in calls)
    assert all(set(json.loads(call.function.arguments)) == {"ok"} for call in calls)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, None),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs"),
        (
            {
                "response_format": {"type": "json_object"},
                "extra_body": {"structured_outputs": {"regex": "a"}},
            },
            "structured_outputs",
        ),
        (
            {"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"},
            "tool_choice",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mistakes_are_refused_by_name(chat, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(**options)
    assert param is None or error.value.body["param"] == param


def end_of(grammar, text):
    """Whether an answer may end with the text; the allowed beginning if it is not allowed."""
    compiler = GrammarCompiler(lambda: TOKENIZER, VOCAB_SIZE, frozenset({EOS_ID}))
    mask, allowed = compiler.compile(grammar), b""
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        bitmask = np.zeros(num_words(VOCAB_SIZE), dtype=np.uint32)
        mask.fill(bitmask)
        if not bitmask[token_id // 32] >> (token_id % 32) & 1:
            return allowed.decode()
        mask.accept([token_id])
        allowed += TOKENIZER.token_bytes(token_id)
    return mask.may_end


def found(parser, text):
    """The text and the calls that the parser finds."""
    one = parser()
    parts = [one.push(text), one.finish()]
    return "".join(part.text for part in parts), [c for part in parts for c in part.calls]


WRITTEN = {
    HermesParser: '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    LlamaParser: '{"name": "%s", "parameters": %s}',
}
FIND_CALL, FREE_CALL = ("find", '{"ok": true}'), ("stop", '{"a": [1, "b"]}')


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_required_calls_are_what_their_parser_reads(parser):
    functions = [FunctionDefinition(**FIND), FunctionDefinition(**STOP)]
    separator = "\n" if parser is HermesParser else "; "
    one = WRITTEN[parser] % FIND_CALL
    two = separator.join([one, WRITTEN[parser] % ("stop", "{}")])
    several = required_calls(functions, parser, True)
    assert end_of(several, one) is end_of(several, two) is True
    assert [call.name for call in found(parser, two)[1]] == ["find", "stop"]
    assert end_of(required_calls(functions, parser, False), two) == one
    assert end_of(several, "Hi") == ""


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_arguments_are_objects_whatever_the_parameters_say(parser):
    functions = [FunctionDefinition(name="f", parameters={"type": "string"})]
    grammar = required_calls(functions, parser, True)
    assert end_of(grammar, WRITTEN[parser] % ("f", '{"a": 1}')) is True
    assert end_of(grammar, WRITTEN[parser] % ("f", '"x"')) is not True


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_optional_calls_let_text_be_free_and_calls_fit_strict_schemas(parser):
    functions = [FunctionDefinition(**FIND, strict=True), FunctionDefinition(name="stop")]
    grammar = optional_calls(functions, parser, True)
    good, free = WRITTEN[parser] % FIND_CALL, WRITTEN[parser] % FREE_CALL
    for text in ("", "Hi! 1 < 2 <b> <tool_cal", "a {} \n", "\u00e9\u4f60"):
        assert end_of(grammar, text) is True and found(parser, text) == (text, [])
    for call, (name, arguments) in ((good, FIND_CALL), (free, FREE_CALL)):
        assert end_of(grammar, call) is True
        assert found(parser, call) == ("", [FoundCall(name, arguments)])
        assert end_of(grammar, call[:-1]) is False
    wrong = good.replace("true", "3")
    assert end_of(grammar, wrong) == wrong.partition("3")[0]
    unknown = good.replace("find", "kind")
    assert end_of(grammar, unknown) == unknown.partition("kind")[0]
    if parser is HermesParser:
        texts = f"Let me see. {good}\nAnd then {free}\nBye."
        assert end_of(grammar, texts) is True and len(found(parser, texts)[1]) == 2
        assert end_of(grammar, f"{good} x {wrong}").endswith('{"ok": ')
        single = optional_calls(functions, parser, False)
        assert end_of(single, f"{good} bye") is True
        assert end_of(single, f"{good} {free}") == f"{good} <tool_call"
    else:
        assert end_of(grammar, f"{good}; {free}") is True
        assert end_of(optional_calls(functions, parser, False), f"{good}; {free}") == good
        assert end_of(grammar, ' {"a"') == " "


def test_strict_tools_leave_the_choice_to_the_model(chat):
    tools = [{"type": "function", "function": FIND | {"strict": True}}]
    choice = chat(tools=tools, max_tokens=20)
    assert choice.finish_reason in ("length", "stop", "tool_calls")
    with pytest.raises(openai.BadRequestError) as error:
        chat(tools=tools, response_format={"type": "json_object"})
    assert error.value.body["param"] == "tools"
    bad = FIND | {
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": 3}}},
    }
    with pytest.raises(openai.BadRequestError) as error:
        chat(tools=[{"type": "function", "function": bad}])
    assert error.value.body["param"] == "tools"


def test_fields_name_their_grammar():
    assert ResponseFormat(type="text").grammar() is None
    assert ResponseFormat(type="json_object").grammar().param == "response_format"
    assert StructuredOutputs(json={"type": "null"}).grammar().source == '{"type": "null"}'
    with pytest.raises(RequestError, match="regex must not be empty"):
        StructuredOutputs(regex="").grammar()
