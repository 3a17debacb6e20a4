"""One request and its response on a connection, as ASGI's scope, receive and send."""

import asyncio
import http
import logging
from collections.abc import Iterable
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message

from server.http.errors import error_body

logger = logging.getLogger(__name__)
Headers = Iterable[tuple[bytes, bytes]]
# body bytes that wait for the application; beyond it the connection stops reading
_MAX_UNREAD = 65536
_BODILESS = (204, 304)
_PHRASES = {status.value: status.phrase.encode() for status in http.HTTPStatus}


class Link(Protocol):
    """The part of a connection that an exchange uses."""

    @property
    def default_headers(self) -> Headers:
        """Headers of every response."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes after those sent before."""
        ...

    async def drain(self) -> None:
        """Wait while the client reads too slowly."""
        ...

    def update_reading(self) -> None:
        """Read from the client, or stop if the exchange is full."""
        ...

    def response_ended(self, is_whole: bool) -> None:
        """The response was written to its end; or cut off, if it is not ``is_whole``."""
        ...


class Exchange:
    """Runs the application for one request.

    Attributes:
        keep_alive: whether another request may follow on the connection.
        body_ended: whether the request has arrived to its end.
    """

    def __init__(
        self, link: Link, scope: dict[str, Any], keep_alive: bool, expects_100: bool
    ) -> None:
        self.keep_alive = keep_alive
        self.body_ended = False
        self._link = link
        self._scope = scope
        self._expects_100 = expects_100
        self._body = bytearray()
        self._has_left = self._is_lost = False
        self._news = asyncio.Event()
        self._is_read = self._is_started = self._is_ended = self._is_chunked = False
        self._sends_body = scope["method"] != "HEAD"

    @property
    def is_arriving(self) -> bool:
        """Whether the client has begun to send the body."""
        return self.body_ended or len(self._body) > 0

    @property
    def is_full(self) -> bool:
        """Whether much of the body waits for the application."""
        return len(self._body) > _MAX_UNREAD

    def add_body(self, data: bytes) -> None:
        """Add bytes of the request's body."""
        if self._is_ended:
            return
        self._body += data
        self._link.update_reading()
        self._news.set()

    def end_body(self) -> None:
        """The request's body is whole."""
        self.body_ended = True
        self._news.set()

    def client_left(self, is_lost: bool) -> None:
        """The client sends no more; if ``is_lost`` it does not read either."""
        self._has_left, self._is_lost = True, is_lost or self._is_lost
        self.keep_alive = False
        self._news.set()

    async def run(self, app: ASGIApp) -> None:
        """Run the application; a response that it leaves out or unfinished is logged."""
        try:
            await app(self._scope, self.receive, self.send)
            if not self._is_ended and not self._has_left:
                logger.error("the application did not finish its response")
        except asyncio.CancelledError:
            pass
        except Exception:
            if not self._is_ended:
                logger.exception("the application failed")
        if self._is_ended or self._is_lost:
            return
        if self._is_started:
            self._end(is_whole=False)
        else:
            error = JSONResponse(error_body("internal error", "server_error"), 500)
            await error(self._scope, self.receive, self.send)

    async def receive(self) -> Message:
        """The next part of the body, or the news that the client has left."""
        if self._expects_100 and not (self._has_left or self.is_arriving):
            self._link.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects_100 = False
        while not self._is_lost:
            if self._body or (self.body_ended and not self._is_read):
                body, self._body = bytes(self._body), bytearray()
                self._is_read = self.body_ended
                return {"type": "http.request", "body": body, "more_body": not self.body_ended}
            if self._has_left or self._is_ended:
                break
            self._link.update_reading()
            await self._news.wait()
            self._news.clear()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Write the next part of the response, once the client has read most of those before."""
        await self._link.drain()
        if self._is_lost:
            return
        if self._is_ended:
            raise RuntimeError(f"{message['type']} after the end of the response")
        if not self._is_started:
            assert message["type"] == "http.response.start"
            self._is_started = True
            self._link.write(self.head(message["status"], message.get("headers", ())))
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        data = self._framed(body, is_last) if self._sends_body else b""
        if data:
            self._link.write(data)
        if is_last:
            self._end(is_whole=True)

    def head(self, status: int, headers: Headers) -> bytes:
        """The status line and headers; they also decide how the body is framed."""
        if not self.body_ended:
            self.keep_alive = False  # the rest of the body would be taken for a request
        self._sends_body = self._sends_body and status not in _BODILESS
        lines = [b"HTTP/1.1 %d %s\r\n" % (status, _PHRASES.get(status, b"Unknown"))]
        has_length = False
        for name, value in (*self._link.default_headers, *headers):
            if b"\r" in value or b"\n" in value:
                raise RuntimeError(f"the header {name!r} has a line break")
            name = name.lower()
            has_length = has_length or name == b"content-length"
            if name == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            lines.append(b"%s: %s\r\n" % (name, value))
        if self._sends_body and not has_length:
            # HTTP/1.0 knows no chunks: the end of the connection ends the body
            self._is_chunked = self._scope["http_version"] == "1.1"
            self.keep_alive = self.keep_alive and self._is_chunked
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self._scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _framed(self, body: bytes, is_last: bool) -> bytes:
        if not self._is_chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk + b"0\r\n\r\n" if is_last else chunk

    def _end(self, is_whole: bool) -> None:
        self._is_ended = True
        self._news.set()
        self._link.response_ended(is_whole)
