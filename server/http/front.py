"""The layers in front of the application: request ids, access log, CORS and authentication."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access import AccessOptions
from server.api_keys import ApiKeys
from server.http.access_log import AccessLog
from server.http.authentication import Authentication
from server.http.request_ids import RequestIds
from server.http.root_path import RootRedirect


class Front:
    """ASGI application that passes the requests of clients with access to another one."""

    def __init__(
        self, app: ASGIApp, access: AccessOptions, keys: ApiKeys, *, access_log: bool
    ) -> None:
        self._root_path = access.root_path or ""
        app = Authentication(RootRedirect(app), keys)
        if access.cors_origin:
            # browsers read errors and request ids only if they are allowed to
            app = CORSMiddleware(
                app,
                allow_origins=access.cors_origin,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("X-Request-Id", "Retry-After"),
            )
        self._app = RequestIds(AccessLog(app) if access_log else app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server is set up without websockets and lifespan"
        await self._app({**scope, "root_path": self._root_path}, receive, send)
