"""Request ids: taken from X-Request-Id or made, and known to everything that serves the request."""

import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER = b"x-request-id"
_VALID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_CURRENT: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the HTTP request that this task or thread works for; empty outside of one."""
    return _CURRENT.get()


def engine_request_id(prefix: str) -> str:
    """A unique id that contains that of the HTTP request, which clients may repeat."""
    current = _CURRENT.get()
    unique = uuid.uuid4().hex
    return f"{prefix}-{current}-{unique[:12]}" if current else f"{prefix}-{unique}"


class RequestIds:
    """ASGI middleware: keeps a valid X-Request-Id, replaces another, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(_HEADER, b"").decode("latin-1")
        request_id = given if _VALID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (_HEADER, request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        token = _CURRENT.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _CURRENT.reset(token)
