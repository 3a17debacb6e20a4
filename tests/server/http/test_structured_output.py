"""Structured output over HTTP: formats of OpenAI and vLLM, required tool calls, and mistakes."""

import json
import re

import openai
import pytest

from engine.errors import RequestError
from server.http.chat_message import FunctionDefinition
from server.http.structured_output import ResponseFormat, StructuredOutputs
from server.http.tool_calls import HermesParser, LlamaParser
from server.http.tool_grammar import tool_grammar

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


@pytest.fixture(scope="module")
def chat(memory_server):
    client = openai.OpenAI(base_url=f"{memory_server.url}/v1", api_key="none", max_retries=0)

    def create(**options):
        values = {"model": "tiny-memory", "messages": MESSAGES, "max_tokens": 300, "seed": 1}
        return client.chat.completions.create(**values | options).choices[0]

    yield create
    client.close()


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


@pytest.mark.parametrize("parser", [HermesParser, LlamaParser])
def test_the_grammar_of_tools_is_what_their_parser_reads(parser):
    source = tool_grammar([FunctionDefinition(**FIND)], parser, True).source
    assert "%json" in source and "find" in source
    assert ("<tool_call>" in source) == (parser is HermesParser)


def test_fields_name_their_grammar():
    assert ResponseFormat(type="text").grammar() is None
    assert ResponseFormat(type="json_object").grammar().param == "response_format"
    assert StructuredOutputs(json={"type": "null"}).grammar().source == '{"type": "null"}'
    with pytest.raises(RequestError, match="regex must not be empty"):
        StructuredOutputs(regex="").grammar()
