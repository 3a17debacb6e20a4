"""ASGI middleware that answers HEAD like GET; the connection leaves out the body."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadRequests:
    """Lets every route that answers GET answer HEAD too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
