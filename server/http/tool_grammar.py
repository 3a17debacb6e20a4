"""The grammar of answers that have to be tool calls, in the format that the model knows."""

import json
from collections.abc import Sequence

from engine.sampling.grammar import Grammar
from server.http.chat_message import FunctionDefinition
from server.http.tool_calls import HERMES_BEGIN, HERMES_END, HermesParser, LlamaParser

# JSON as models are shown it: one space after commas and colons, and no other
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_grammar(
    functions: Sequence[FunctionDefinition],
    parser: type[HermesParser] | type[LlamaParser],
    allow_several: bool,
) -> Grammar:
    """One call of one of the functions, or several, which ``parser`` finds."""
    if parser is HermesParser:
        begin, end, separator = f"{HERMES_BEGIN}\n", f"\n{HERMES_END}", "\n"
        arguments = "arguments"
    else:
        begin, end, separator, arguments = "", "", "; ", "parameters"
    rules = ["start: call" + (f" ({json.dumps(separator)} call)*" if allow_several else "")]
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(functions))))
    for index, function in enumerate(functions):
        head = f'{begin}{{"name": {json.dumps(function.name)}, "{arguments}": '
        tail = f"}}{end}"
        schema = {"type": "object"} | function.parameters | {"x-guidance": _SPACES}
        rules.append(f"call{index}: {json.dumps(head)} arguments{index} {json.dumps(tail)}")
        rules.append(f"arguments{index}: %json {json.dumps(schema)}")
    return Grammar("grammar", "\n".join(rules), "tool_choice")
