"""ASGI middleware that takes a request in: its place in the queue, then its body, within limits."""

import asyncio
import re
from functools import partial

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.admission import GRACE_S, Admission, Place
from server.http.errors import ApiError
from server.http.root_path import route_path

MAX_NESTING = 64
_PLACE = "memplus.place"
# a string, which may lack its end, or a bracket; linear in time
_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{}]', re.DOTALL)


class Intake:
    """Answers 503 to requests without a place, 413 to large bodies and 408 to slow ones.

    The place lasts until the response has ended. The application gets it with ``place_of``.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        generating: frozenset[str],
        max_bytes: int,
        timeout_s: float,
    ) -> None:
        """``generating`` are the paths whose requests take a place in the queue."""
        self._app = app
        self._admission = admission
        self._generating = generating
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        timeout = asyncio.timeout(self._timeout_s)
        place = self._admission.open(partial(_end, timeout))
        try:
            try:
                body = await self._take_in(scope, receive, place, timeout)
            except ApiError as error:
                place.close()  # its arrival has ended and cannot be evicted
                response = JSONResponse(error.body, error.status, error.headers)
                await response(scope, receive, send)
                return
            await self._app({**scope, _PLACE: place}, _replay(body, receive), send)
        finally:
            place.close()

    async def _take_in(
        self, scope: Scope, receive: Receive, place: Place, timeout: asyncio.Timeout
    ) -> bytes:
        """Reserve the place, then read the body; only POST may have one.

        Raises:
            ApiError: the request is refused.
        """
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        if scope["method"] != "POST":
            if size or b"transfer-encoding" in headers:
                raise ApiError(413, "only POST requests may have a body")
            place.keep()
            return b""
        if route_path(scope) in self._generating:
            place.enlarge("prompts", 1)
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() not in ("", "identity"):
            raise ApiError(415, f"content-encoding: {encoding[:40]!r} is not supported")
        self._hold(place, size)
        try:
            async with timeout:
                body = await self._read(receive, place)
                if body.count(b"[") + body.count(b"{") > MAX_NESTING:
                    await asyncio.to_thread(_check_nesting, body)
        except TimeoutError:
            message = (
                f"the body took too long: {self._timeout_s} s, or {GRACE_S} s on a full server"
            )
            raise ApiError(408, message) from None
        place.keep()
        return body

    async def _read(self, receive: Receive, place: Place) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body is not whole")
            more = message.get("more_body", False)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._hold(place, size)
        return b"".join(parts)

    def _hold(self, place: Place, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(413, f"the body exceeds {self._max_bytes} bytes")
        place.enlarge("body_bytes", size)


def place_of(scope: Scope) -> Place:
    """The place of the request."""
    place: Place = scope[_PLACE]
    return place


def _end(timeout: asyncio.Timeout) -> None:
    if not timeout.expired():
        timeout.reschedule(asyncio.get_running_loop().time())


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for the application, with the body as one message first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _check_nesting(body: bytes) -> None:
    depth = 0
    for found in _BRACKETS.finditer(body):
        bracket = found[0]
        depth += (bracket in b"[{") - (bracket in b"]}")
        if depth > MAX_NESTING:
            raise ApiError(400, f"the body nests deeper than {MAX_NESTING} levels")
