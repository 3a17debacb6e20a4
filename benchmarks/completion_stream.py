"""Parser of a streamed completion: arrival times of tokens, and token counts."""

import json
from dataclasses import dataclass

from benchmarks.http_answer import HttpResponse, ResponseError, StatusError

_EXCERPT_BYTES = 200
# marks the usage event, which has no token; inside a text these quotes would be escaped
_NO_CHOICES = (b'"choices":[]', b'"choices": []')


@dataclass(frozen=True)
class Usage:
    """Token counts of one request, as the server reports them."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int


class CompletionStream:
    """Parses the HTTP response and its server-sent events with as little CPU as possible.

    It records the arrival time of each event that carries tokens. It parses only the last event,
    which has the usage, as JSON. If an event carries several tokens, there are fewer times than
    tokens.

    Attributes:
        token_times: arrival times of the events with tokens, in seconds of the caller's clock.
    """

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self._http = HttpResponse()
        self._line = b""  # bytes of an incomplete line
        self._last_event = b""
        self._error_body = b""

    @property
    def has_begun(self) -> bool:
        """Whether any byte has arrived."""
        return self._http.has_begun

    @property
    def is_complete(self) -> bool:
        """Whether the whole response has arrived."""
        return self._http.is_complete

    @property
    def keeps_connection(self) -> bool:
        """Whether the connection can be reused."""
        return self._http.keeps_connection

    def feed(self, data: bytes, now: float) -> None:
        """Parse bytes that arrived at the time ``now``, in seconds.

        Raises:
            ResponseError: the bytes are not an HTTP/1.x response.
        """
        body = self._http.feed(data)
        if self._http.status != 200:
            self._error_body += body[: _EXCERPT_BYTES - len(self._error_body)]
            return
        *lines, self._line = (self._line + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._record_event(line[5:].strip(), now)

    def feed_end(self) -> None:
        """The connection was closed."""
        self._http.feed_end()

    def usage(self) -> Usage:
        """Token counts of a complete response.

        Raises:
            StatusError: the status is not 200.
            ResponseError: the last event has no usage.
        """
        if self._http.status != 200:
            raise StatusError(self._http.status, _excerpt(self._error_body))
        try:
            usage = json.loads(self._last_event)["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ResponseError(
                f"the last event has no usage: {_excerpt(self._last_event)}"
            ) from None

    def _record_event(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            return
        self._last_event = event
        if not any(mark in event for mark in _NO_CHOICES):
            self.token_times.append(now)


def _excerpt(text: bytes) -> str:
    return text[:_EXCERPT_BYTES].decode(errors="replace").strip() or "nothing"
