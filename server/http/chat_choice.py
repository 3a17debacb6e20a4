"""Writes the JSON objects of one choice of ``POST /v1/chat/completions``."""

import uuid
from collections.abc import Sequence
from typing import Any

from engine.sampling.params import TokenLogprobs
from server.http.chat_request import ChatRequest
from server.http.logprobs import chat_logprobs
from server.http.memory_trace import memory_trace
from server.http.required_calls import CallDelta, RequiredCalls
from server.http.text_stream import TextDelta
from server.http.tool_calls import FoundCall, ParsedText, ToolCallParser
from weights.checkpoints.tokenizer import Tokenizer


class ChatChoice:
    """Writes the deltas of one choice, as a message or as parts of one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: ChatRequest,
        parser: ToolCallParser | None,
        required: RequiredCalls | None = None,
    ) -> None:
        """``parser`` finds tool calls in the text; without one all text is content.

        ``required`` reads the stream of an answer that has to be calls.
        """
        self._tokenizer = tokenizer
        self._body = body
        self._parser = parser
        self._required = required
        self._num_calls = 0
        self._is_first = True

    def whole(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        parsed = self._parse(delta)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.text, "refusal": None}
        if parsed.calls:
            message |= {"content": parsed.text or None, "tool_calls": self._calls(parsed.calls)}
        return self._choice(delta, "message", message)

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of the next chunk of a stream."""
        part: dict[str, Any] = {"role": "assistant", "content": ""} if self._is_first else {}
        if self._required is not None:
            calls = [self._call_part(one) for one in self._required.push(delta.text)]
            if calls:
                part["tool_calls"] = calls
            return self._choice(delta, "delta", part)
        parsed = self._parse(delta)
        if parsed.text:
            part["content"] = parsed.text
        if parsed.calls:
            first = self._num_calls
            calls = self._calls(parsed.calls)
            part["tool_calls"] = [{"index": i} | call for i, call in enumerate(calls, first)]
        return self._choice(delta, "delta", part)

    def _parse(self, delta: TextDelta) -> ParsedText:
        if self._parser is None:
            return ParsedText(delta.text)
        parsed = self._parser.push(delta.text)
        if delta.finish_reason is None:
            return parsed
        rest = self._parser.finish()
        return ParsedText(parsed.text + rest.text, parsed.calls + rest.calls)

    def _calls(self, calls: Sequence[FoundCall]) -> list[dict[str, Any]]:
        self._num_calls += len(calls)
        return [_call(call.name, call.arguments) for call in calls]

    def _call_part(self, part: CallDelta) -> dict[str, Any]:
        if part.name is None:
            return {"index": part.index, "function": {"arguments": part.arguments}}
        self._num_calls += 1
        return {"index": part.index} | _call(part.name, part.arguments)

    def _choice(self, delta: TextDelta, name: str, content: dict[str, Any]) -> dict[str, Any]:
        body, self._is_first = self._body, False
        reason: str | None = delta.finish_reason
        is_cut = self._required is not None and self._required.is_inside
        if reason == "stop" and self._num_calls and not is_cut:
            reason = "tool_calls"
        choice: dict[str, Any] = {
            "index": delta.index,
            name: content,
            "logprobs": self._logprobs(delta.logprobs) if body.logprobs else None,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }
        if body.memory_trace:
            choice["memory_trace"] = memory_trace(delta.memory_reads)
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        body = self._body
        count, as_ids = body.top_logprobs or 0, body.return_tokens_as_token_ids
        return chat_logprobs(self._tokenizer, entries, count, as_ids)


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
