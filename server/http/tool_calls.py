"""Finds tool calls in generated text, in the formats of Hermes and of Llama 3."""

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
LLAMA_BEGIN = "<|python_tag|>"
_BETWEEN = re.compile(r"\s*;?\s*")


@dataclass(frozen=True)
class FoundCall:
    """A call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedText:
    """New text outside calls, and the calls that are complete."""

    text: str = ""
    calls: tuple[FoundCall, ...] = ()


class ToolCallParser(Protocol):
    """Splits the text of one answer into text and calls, as it is generated."""

    def push(self, text: str) -> ParsedText:
        """Add text; return what cannot change any more."""
        ...

    def finish(self) -> ParsedText:
        """The rest; an incomplete or malformed call is returned as text."""
        ...


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the text.

    White space after a call only separates it from the next, so it is dropped.
    """

    def __init__(self) -> None:
        self._held = ""
        self._follows_call = False

    def push(self, text: str) -> ParsedText:
        self._held += text
        shown: list[str] = []
        calls: list[FoundCall] = []
        while True:
            before, begin, rest = self._held.partition(HERMES_BEGIN)
            kept = 0 if begin else _overlap(before, HERMES_BEGIN)
            shown.append(self._shown(before[: len(before) - kept]))
            body, end, after = rest.partition(HERMES_END)
            if not end:
                self._held = before[len(before) - kept :] + begin + rest
                return ParsedText("".join(shown), tuple(calls))
            call = _call(body)
            if call is not None:
                calls.append(call)
                self._follows_call = True
            else:
                shown.append(self._shown(begin + body + end))
            self._held = after

    def finish(self) -> ParsedText:
        text, self._held = self._held, ""
        return ParsedText(self._shown(text))

    def _shown(self, text: str) -> str:
        if self._follows_call:
            text = text.lstrip()
            self._follows_call = not text
        return text


class LlamaParser:
    """An answer that is nothing but ``{"name": ..., "parameters": {...}}``, or several with ``;``.

    ``<|python_tag|>`` may come first.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> ParsedText:
        if self._is_text:
            return ParsedText(text)
        self._held += text
        begin = self._held.lstrip()
        if not begin or begin[0] == "{" or LLAMA_BEGIN.startswith(begin[: len(LLAMA_BEGIN)]):
            return ParsedText()
        self._is_text = True
        return ParsedText(self._take())

    def finish(self) -> ParsedText:
        text = self._take()
        body = text.strip().removeprefix(LLAMA_BEGIN).strip()
        calls: list[FoundCall] = []
        decoder, position = json.JSONDecoder(), 0
        while position < len(body):
            try:
                value, end = decoder.raw_decode(body, position)
            except (ValueError, RecursionError):
                return ParsedText(text)
            call = _as_call(value)
            if call is None:
                return ParsedText(text)
            calls.append(call)
            position = _BETWEEN.match(body, end).end()  # type: ignore[union-attr]
        return ParsedText("", tuple(calls)) if calls else ParsedText(text)

    def _take(self) -> str:
        text, self._held = self._held, ""
        return text


def parser_for(template: str) -> type[HermesParser] | type[LlamaParser] | None:
    """The parser of the format that a chat template shows; None if it shows neither."""
    if HERMES_BEGIN in template:
        return HermesParser
    if LLAMA_BEGIN in template or '"parameters"' in template:
        return LlamaParser
    return None


def _call(text: str) -> FoundCall | None:
    try:
        return _as_call(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _as_call(value: Any) -> FoundCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    # models mix the formats' two names of the arguments
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    return FoundCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest proper prefix of ``mark`` with which ``text`` ends."""
    longest = min(len(mark) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
