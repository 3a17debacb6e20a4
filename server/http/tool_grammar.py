"""The grammar of answers with tool calls, in the format that the model knows."""

import json
from collections.abc import Sequence

from engine.sampling.grammar import Grammar
from server.http.chat_message import FunctionDefinition
from server.http.tool_calls import HERMES_BEGIN, HERMES_END, HermesParser, LlamaParser

# JSON as models are shown it: one space after commas and colons, and no other
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# a text that the parser does not take for calls
_HERMES_TEXT = f"/(?s:.)*/ & ~/(?s:.)*{HERMES_BEGIN}(?s:.)*/"
_LLAMA_TEXT = r"/\s*([^\s{<]|<[^|])(?s:.)*/"


def required_calls(
    functions: Sequence[FunctionDefinition],
    parser: type[HermesParser] | type[LlamaParser],
    allow_several: bool,
) -> Grammar:
    """One call of one of the functions, or several, which ``parser`` finds."""
    if parser is HermesParser:
        start, separator = f"start: {json.dumps(HERMES_BEGIN)} call", f"\n{HERMES_BEGIN}"
    else:
        start, separator = "start: call", "; "
    if allow_several:
        start += f" ({json.dumps(separator)} call)*"
    rules = [start, *_calls([(one.name, one.parameters) for one in functions], parser)]
    return Grammar("grammar", "\n".join(rules), "tool_choice")


def optional_calls(
    functions: Sequence[FunctionDefinition],
    parser: type[HermesParser] | type[LlamaParser],
    allow_several: bool,
) -> Grammar:
    """Any text, in which each call is of one of the functions, and fits its schema if strict."""
    if parser is HermesParser:
        # the lazy lexeme ends with the first mark, and then a call has to follow
        rules = [
            f"start: (opened call){'*' if allow_several else '?'} TEXT",
            f"opened[lazy]: /(?s:.)*{HERMES_BEGIN}/",
            f"TEXT: {_HERMES_TEXT}",
        ]
    else:
        several = ' ("; " call)*' if allow_several else ""
        rules = [f"start: call{several} | TEXT |", f"TEXT: {_LLAMA_TEXT}"]
    rules += _calls([(one.name, one.parameters if one.strict else {}) for one in functions], parser)
    return Grammar("grammar", "\n".join(rules), "tools")


def _calls(
    functions: Sequence[tuple[str, dict[str, object]]],
    parser: type[HermesParser] | type[LlamaParser],
) -> list[str]:
    """The rules of ``call``: one call after its opening mark, if the format has one."""
    is_hermes = parser is HermesParser
    begin, end, key = (
        ("\n", f"\n{HERMES_END}", "arguments") if is_hermes else ("", "", "parameters")
    )
    rules = ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for index, (name, parameters) in enumerate(functions):
        head, tail = f'{begin}{{"name": {json.dumps(name)}, "{key}": ', f"}}{end}"
        # arguments are an object, whatever the parameters say
        schema = parameters | {"type": "object", "x-guidance": _SPACES}
        rules.append(f"call{index}: {json.dumps(head)} arguments{index} {json.dumps(tail)}")
        rules.append(f"arguments{index}: %json {json.dumps(schema)}")
    return rules
