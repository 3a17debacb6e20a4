"""The root path that a proxy adds: requests without it, and a redirect to its page."""

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The path that the routes see; proxies may send the root path or strip it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root or path.startswith(f"{root}/"):
        path = path.removeprefix(root)
    return path or "/"


class RootRedirect:
    """ASGI middleware: adds the slash to the root path, below which the page's files are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope["root_path"]
        if root and scope["path"] == root and scope["method"] in ("GET", "HEAD"):
            query = scope["query_string"].decode("latin-1")
            await RedirectResponse(f"{root}/" + (f"?{query}" if query else ""))(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)
