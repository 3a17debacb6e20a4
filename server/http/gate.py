"""Lets requests through to the application, except while the model loads or the server drains."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import error_body
from server.http.root_path import route_path

ENDING = "the server is shutting down"
# paths that answer while the server drains
_WHILE_DRAINING = ("/health", "/metrics")


class Gate:
    """ASGI application around another one, which it gets when the model is loaded.

    Attributes:
        num_running: requests that the application is answering.
        is_draining: whether new requests are refused because the server is shutting down.
    """

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._unanswered: set[asyncio.Task[object]] = set()
        self.num_running = 0
        self.is_draining = False

    def open(self, app: ASGIApp) -> None:
        """Let requests through to ``app`` from now on."""
        self._app = app

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.is_draining = True

    def end(self) -> None:
        """Answer 503 to every request whose response has not begun; the others continue."""
        for task in self._unanswered:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if self._app is None and path == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif self.is_draining and path not in _WHILE_DRAINING:
            await _unavailable(ENDING, {"Connection": "close"})(scope, receive, send)
        elif self._app is None:
            await _unavailable("the model is loading", {})(scope, receive, send)
        else:
            await self._answer(self._app, scope, receive, send)

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None

        async def send_and_note(message: Message) -> None:
            self._unanswered.discard(task)
            await send(message)

        self._unanswered.add(task)
        self.num_running += 1
        try:
            await app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if task not in self._unanswered:
                raise
            task.uncancel()
            await _unavailable(ENDING, {"Connection": "close"})(scope, receive, send)
        finally:
            self._unanswered.discard(task)
            self.num_running -= 1


def _unavailable(message: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse(error_body(message, "server_error"), 503, {"Retry-After": "5"} | headers)
