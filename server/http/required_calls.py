"""Splits the text of required tool calls into deltas of their arguments, as it is generated."""

import json
import re
from dataclasses import dataclass

from server.http.tool_calls import HERMES_BEGIN, HermesParser, LlamaParser

_NAME = r'\{"name": ("(?:[^"\\]|\\.)*"), '
_HERMES_HEAD = re.compile(f'{HERMES_BEGIN}\n{_NAME}"arguments": ')
_LLAMA_HEAD = re.compile(f'{_NAME}"parameters": ')
# a string, whose end may not have come yet, or a bracket
_PARTS = re.compile(r'[{}]|"')
_STRING_REST = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True)
class CallDelta:
    """The next part of a call's arguments; the first of a call has the function's name."""

    index: int
    name: str | None
    arguments: str


class RequiredCalls:
    """Reads text that follows the grammar ``required_calls`` of the parser's format.

    Attributes:
        is_inside: whether the last call is not complete.
    """

    def __init__(self, parser: type[HermesParser] | type[LlamaParser]) -> None:
        self.is_inside = False
        self._head = _HERMES_HEAD if parser is HermesParser else _LLAMA_HEAD
        self._held = ""  # the beginning of a head or of an escape
        self._num_calls = 0
        self._depth, self._is_in_string = 0, False

    def push(self, text: str) -> list[CallDelta]:
        """Add text; return at most one delta of each call."""
        self._held += text
        deltas: list[CallDelta] = []
        while True:
            name: str | None = None
            if not self.is_inside:
                head = self._head.search(self._held)
                if head is None:
                    return deltas
                name = json.loads(head[1])
                self._held = self._held[head.end() :]
                self.is_inside = True
                self._num_calls += 1
            arguments = self._take_arguments()
            if name is not None or arguments:
                deltas.append(CallDelta(self._num_calls - 1, name, arguments))
            if self.is_inside:
                return deltas

    def _take_arguments(self) -> str:
        """The held text up to the end of the call's arguments, if it has come."""
        text, position = self._held, 0
        while True:
            if self._is_in_string:
                rest = _STRING_REST.match(text, position)
                if rest is None:
                    break
                position, self._is_in_string = rest.end(), False
            part = _PARTS.search(text, position)
            if part is None:
                break
            position = part.end()
            if part[0] == '"':
                self._is_in_string = True
                continue
            self._depth += 1 if part[0] == "{" else -1
            if not self._depth:
                self.is_inside = False
                self._held = text[position:]
                return text[:position]
        # an escape may be cut: its backslash is not followed by a character yet
        num_slashes = len(text) - len(text.rstrip("\\"))
        kept = num_slashes % 2 if self._is_in_string else 0
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
