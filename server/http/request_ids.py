"""ASGI middleware for request ids: taken from X-Request-Id or made."""

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.request_id import CURRENT_ID

ID_HEADER = b"x-request-id"
_VALID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)


class RequestIds:
    """ASGI middleware: keeps a valid X-Request-Id, replaces another, and returns it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(ID_HEADER, b"").decode("latin-1")
        request_id = given if _VALID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (ID_HEADER, request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        token = CURRENT_ID.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            CURRENT_ID.reset(token)
