"""A client for many streamed completions at once that takes as little of the CPU as it can."""

import asyncio
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from benchmarks.completion_stream import CompletionStream, Usage
from benchmarks.http_answer import AnswerError
from engine.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """One request that was answered: when it was sent, when its tokens came, how many."""

    sent: float
    token_times: tuple[float, ...]
    usage: Usage


class NeverAnsweredError(AnswerError):
    """The connection was closed before a byte of the answer came."""


class CompletionClient:
    """Streams completions from one server; each connection is used again once it is free.

    The client runs on the cores of the server that it measures, so what it takes counts. With 32
    streams whose events are written together, an event takes it 10 to 14 us of the CPU; the same
    over asyncio's streams, which wake a task for each read, 13 to 15, with aiohttp 15, with httpx
    56; all that on uvloop, without which each takes about twice as much (2 cores of a Zen 5).
    """

    def __init__(self, base_url: str, timeout_s: float) -> None:
        """``timeout_s`` bounds each request as a whole.

        Raises:
            ConfigError: this is no URL of a server.
        """
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"base_url: {error}") from None
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigError(f"base_url: {base_url!r} is no http:// or https:// address")
        self._host = parts.hostname
        self._is_secure = parts.scheme == "https"
        self._port = port or (443 if self._is_secure else 80)
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = (
            f"POST {prefix}/v1/completions HTTP/1.1\r\n"
            f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
            "Content-Type: application/json\r\n"
            "Content-Length: "
        ).encode()
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def complete(self, body: bytes) -> Answer:
        """Send this JSON and read the answer to its end.

        Raises:
            AnswerError: there was none, not in time, or none that is whole and a success.
        """
        request = b"%s%d\r\n\r\n%s" % (self._head, len(body), body)
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                stream = await self._exchange(request)
        except TimeoutError:
            raise AnswerError(f"not answered in {self._timeout_s:g} s") from None
        except OSError as error:
            raise AnswerError(f"no connection: {error.strerror or error}") from None
        return Answer(sent, tuple(stream.token_times), stream.usage())

    def close(self) -> None:
        """Close the connections; no request is under way."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes) -> CompletionStream:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._ask(connection, request)
                except NeverAnsweredError:
                    # closed as idle just when it was used again: the server never saw the request,
                    # and another connection may take it (RFC 9112, 9.3.1)
                    continue
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._is_secure or None
        )
        return await self._ask(connection, request)

    async def _ask(self, connection: "_Connection", request: bytes) -> CompletionStream:
        stream = await connection.exchange(request)
        if stream.keeps_connection:
            self._idle.append(connection)
        else:
            connection.close()
        return stream


class _Connection(asyncio.Protocol):
    """One connection with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._stream = CompletionStream()
        self._end: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes) -> CompletionStream:
        """Send a request and wait for the end of its answer; what fails closes the connection."""
        assert self._transport is not None
        self._stream = CompletionStream()
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._end
        except BaseException:
            self._transport.abort()
            raise
        finally:
            self._end = None
        return self._stream

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._end is None or self._end.done():
            self.close()  # nothing was asked, so the server says goodbye
            return
        try:
            self._stream.feed(data, now)
        except AnswerError as error:
            self._end.set_exception(error)
            return
        if self._stream.is_complete:
            self._end.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._end is None or self._end.done():
            return
        self._stream.feed_end()
        if self._stream.is_complete:
            self._end.set_result(None)
        elif self._stream.has_begun:
            self._end.set_exception(AnswerError("the connection was closed within the answer"))
        else:
            self._end.set_exception(NeverAnsweredError("the connection was closed unanswered"))
