"""One client's connection: HTTP/1 requests, one after another, with limits of time and size.

Uvicorn's own protocol has no limits on headers, connections and slow readers; it sends chunks to
HTTP/1.0 clients, and drops the body of a request that offers an upgrade.
"""

import asyncio
import json
import logging
import urllib.parse
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from server.http.errors import error_body
from server.http.transport.connection_table import ConnectionTable
from server.http.transport.exchange import Exchange, Headers
from server.http.transport.request_parser import RefusedRequest, RequestHead, RequestParser
from server.limits import LimitOptions

logger = logging.getLogger(__name__)
# the parser gets data in pieces of this size, so that few requests are parsed ahead
_PIECE = 16384
# bytes of pipelined requests that wait; beyond it the connection stops reading
_MAX_UNPARSED = 65536
# a refused client may still send: its data is dropped for this long, so that it reads the answer
_LINGER_S = 5.0


class Connection(asyncio.Protocol):
    """Runs the application for each request, and closes when a limit is exceeded.

    Attributes:
        default_headers: headers of every response.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: LimitOptions,
        table: ConnectionTable,
    ) -> None:
        """Uvicorn gives the first four arguments."""
        self._config, self._server, self._app_state = config, server_state, app_state
        self._limits, self._table = limits, table
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = RequestParser(self, limits.max_header_kib * 1024)
        self._unparsed = bytearray()
        self._exchange: Exchange | None = None  # the one that is answered
        self._arriving: Exchange | None = None  # the one whose body arrives
        self._waiting: deque[Exchange] = deque()
        self._is_reading, self._drops_input = True, False
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._transport: asyncio.Transport

    # callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._server.connections.add(self)  # type: ignore[arg-type]
        is_admitted = self._table.add(self)
        self._wait_for_request()
        if not is_admitted:
            self._refuse(503, "the server has too many connections; retry later")

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.remove(self)
        self._server.connections.discard(self)
        self._stop_timer()
        self.resume_writing()
        if self._exchange is not None:
            self._exchange.client_left(is_lost=True)
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        if not self._drops_input:
            self._unparsed += data
            self._parse()

    def eof_received(self) -> bool:
        # a client may end its side and still read: a generation ends, but other answers are sent
        if self._exchange is None:
            return False
        self._exchange.client_left(is_lost=False)
        return not is_ssl(self._transport)

    def pause_writing(self) -> None:
        self._can_write.clear()
        self._watch_reader(self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._can_write.set()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # callbacks of uvicorn and of the connection table

    def shutdown(self) -> None:
        """Close as soon as the current response is sent."""
        if self._exchange is not None:
            self._exchange.keep_alive = False
        elif not self._drops_input:
            self._close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    # callbacks of the exchange

    @property
    def default_headers(self) -> Headers:
        return self._server.default_headers

    def write(self, data: bytes) -> None:
        """Send bytes; the transport keeps what the client does not read yet."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait while much is unsent."""
        await self._can_write.wait()

    def update_reading(self) -> None:
        """Read from the client unless much of what it sent waits already."""
        is_full = self._arriving is not None and self._arriving.is_full
        is_wanted = len(self._unparsed) <= _MAX_UNPARSED and not is_full
        if is_wanted != self._is_reading and not self._transport.is_closing():
            self._is_reading = is_wanted
            (self._transport.resume_reading if is_wanted else self._transport.pause_reading)()

    def response_ended(self, is_whole: bool) -> None:
        """Continue with the next request, or close; a response that is not whole was cut."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        if self._transport.is_closing():
            return
        if not exchange.body_ended and is_whole:
            self._linger()
        elif not exchange.keep_alive or not is_whole:
            self._close()
        else:
            if self._waiting:
                self._start(self._waiting.popleft())
            else:
                self._wait_for_request()
            self._parse()

    # callbacks of the parser

    def head_began(self) -> None:
        if self._exchange is None:
            self._start_timer(self._limits.header_timeout_s, self._head_is_late)

    def head_ended(self, head: RequestHead) -> None:
        expected = dict(head.headers).get(b"expect", b"").lower() if head.is_http_1_1 else b""
        if expected not in (b"", b"100-continue"):
            raise RefusedRequest(417, "only the expectation 100-continue is supported")
        exchange = Exchange(self, self._scope(head), head.keep_alive, bool(expected))
        self._arriving = exchange
        if self._exchange is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)

    def body_arrived(self, data: bytes) -> None:
        assert self._arriving is not None
        self._arriving.add_body(data)

    def body_ended(self) -> None:
        assert self._arriving is not None
        self._arriving.end_body()
        self._arriving = None

    # requests

    def _parse(self) -> None:
        """Feed the parser, unless a pipelined request waits already."""
        try:
            while self._unparsed and not self._waiting:
                piece = bytes(self._unparsed[:_PIECE])
                del self._unparsed[: len(piece)]
                self._parser.feed(piece)
        except RefusedRequest as refusal:
            self._refuse(refusal.status, str(refusal))
        self.update_reading()

    def _scope(self, head: RequestHead) -> dict[str, Any]:
        url = httptools.parse_url(head.url)
        raw_path = url.path or b"/"
        return {
            "type": "http",
            "asgi": {"version": self._config.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1" if head.is_http_1_1 else "1.0",
            "method": head.method,
            "scheme": "https" if is_ssl(self._transport) else "http",
            "path": urllib.parse.unquote(raw_path.decode("ascii")),
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": head.headers,
            "client": get_remote_addr(self._transport),
            "server": get_local_addr(self._transport),
            "state": self._app_state.copy(),
        }

    def _start(self, exchange: Exchange) -> None:
        self._stop_timer()
        self._table.set_active(self)
        self._exchange = exchange
        task = self._loop.create_task(exchange.run(self._config.loaded_app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _wait_for_request(self) -> None:
        self._table.set_idle(self)
        if self._parser.is_in_head:
            self.head_began()
        else:
            self._start_timer(self._limits.keep_alive_timeout_s, self._close)

    # limits and the end

    def _head_is_late(self) -> None:
        self._refuse(408, f"the headers did not arrive in {self._limits.header_timeout_s} s")

    def _watch_reader(self, unsent: int) -> None:
        """Close the connection if the client reads nothing until the timeout."""

        def check() -> None:
            now_unsent = self._transport.get_write_buffer_size()
            if now_unsent < unsent:
                self._watch_reader(now_unsent)
            else:
                logger.info("closing a connection whose client reads nothing")
                self.abort()

        self._write_timer = self._loop.call_later(self._limits.stream_write_timeout_s, check)

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, and close; while a response is in progress, only close after it."""
        if self._exchange is not None:
            self._drops_input = True
            self._exchange.keep_alive = False
            if self._arriving is self._exchange:
                self._exchange.client_left(is_lost=False)  # its body cannot be read to its end
            self._waiting.clear()
            self._unparsed.clear()
            return
        kind = "overloaded_error" if status == 503 else "invalid_request_error"
        body = json.dumps(error_body(message, kind)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        answer = Exchange(self, {"method": "GET", "http_version": "1.1"}, False, False)
        self.write(answer.head(status, headers) + body)
        self._linger()

    def _linger(self) -> None:
        """Close for writing, and drop what the client still sends, for a while.

        Closing at once would reset the connection, and the client might lose the answer.
        """
        self._drops_input = True
        self._unparsed.clear()
        self._table.set_idle(self)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._arriving = None
        self.update_reading()
        self._start_timer(_LINGER_S, self.abort)

    def _close(self) -> None:
        """Close once everything is sent; a client that does not read has limited time."""
        if not self._transport.get_write_buffer_size():
            self._table.set_idle(self)  # a TLS client may leave its end of the connection open
        self._transport.close()
        self._start_timer(self._limits.stream_write_timeout_s, self.abort)

    def _start_timer(self, seconds: float, action: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(seconds, action)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
