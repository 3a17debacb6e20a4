"""A streamed completion, read from its bytes as they come: when tokens came, and how many."""

import json
from dataclasses import dataclass

from benchmarks.http_answer import AnswerError, HttpAnswer

_SHOWN_BYTES = 200
# the event of the usage, which has no token; in a text these quotes would be escaped
_NO_CHOICES = (b'"choices":[]', b'"choices": []')


@dataclass(frozen=True)
class Usage:
    """The tokens of one request, as the server counted them."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int


class CompletionStream:
    """HTTP's frame, the server-sent events in it, and of these only what is needed.

    Each event that carries a token has its time; only the last one, which has the usage, is read as
    JSON. A server that sends several tokens in an event has fewer times than tokens.

    Attributes:
        token_times: when they came, in the caller's clock.
    """

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self._http = HttpAnswer()
        self._line = b""  # what is no whole line yet
        self._last_event = b""
        self._refusal = b""

    @property
    def has_begun(self) -> bool:
        """Whether the server has said anything."""
        return self._http.has_begun

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer has come."""
        return self._http.is_complete

    @property
    def keeps_connection(self) -> bool:
        """Whether another request may follow on the connection."""
        return self._http.keeps_connection

    def feed(self, data: bytes, now: float) -> None:
        """Take the next bytes, which came at ``now``.

        Raises:
            AnswerError: this is no HTTP/1.1.
        """
        body = self._http.feed(data)
        if self._http.status != 200:
            self._refusal += body[: _SHOWN_BYTES - len(self._refusal)]
            return
        *lines, self._line = (self._line + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_event(line[5:].strip(), now)

    def feed_end(self) -> None:
        """The connection was closed."""
        self._http.feed_end()

    def usage(self) -> Usage:
        """The tokens that the complete answer says it took.

        Raises:
            AnswerError: it is no success, or its last event has no usage.
        """
        if self._http.status != 200:
            raise AnswerError(f"HTTP {self._http.status}: {_shown(self._refusal)}")
        try:
            usage = json.loads(self._last_event)["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise AnswerError(f"the last event has no usage: {_shown(self._last_event)}") from None

    def _take_event(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            return
        self._last_event = event
        if not any(mark in event for mark in _NO_CHOICES):
            self.token_times.append(now)


def _shown(text: bytes) -> str:
    return text[:_SHOWN_BYTES].decode(errors="replace").strip() or "nothing"
