"""Limits on the size and the arrival time of request bodies."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import ApiError


class BodyLimit:
    """ASGI middleware: answers 413 to a body that is too large and 408 to one that is too slow."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        parts: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        more = size <= self._max_bytes
        size = 0 if more else size
        try:
            async with asyncio.timeout(self._timeout_s):
                while more and size <= self._max_bytes:
                    message = await receive()
                    # the application reads the disconnect from the next message
                    more = message["type"] == "http.request" and message.get("more_body", False)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._timeout_s} s") from None
        except asyncio.CancelledError:
            raise ApiError(503, "the server is shutting down", "server_error") from None
        if size > self._max_bytes:
            raise ApiError(413, f"the body exceeds {self._max_bytes} bytes")
        return b"".join(parts)
