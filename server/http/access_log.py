"""Logs one line per HTTP request: method, path, status and duration."""

import json
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.authentication import key_of

logger = logging.getLogger(__name__)
# longer paths are cut
_MAX_PATH = 200


class AccessLog:
    """ASGI middleware that logs each request when its response has ended.

    The line has no query, header or body, since these may contain secrets.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        status = 0  # no response was sent

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client, key = scope.get("client"), key_of(scope)
            fields = {
                "client": client[0] if client else "",
                "key": key.name if key else "",
                "method": scope["method"],
                "path": scope["path"][:_MAX_PATH],
                "status": status,
                "duration_ms": round(1000 * (time.perf_counter() - start), 1),
            }
            # json escapes control characters, which could forge a line
            line = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
            logger.info(line, extra={"fields": fields})
