"""Authentication of requests by API keys."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api_keys import ApiKey, ApiKeys
from server.http.errors import error_body
from server.http.root_path import route_path

KEY_IN_SCOPE = "memplus.api_key"
_OPEN_PATHS = ("/", "/health", "/ready")
_OPEN_FOLDER = "/page/"


class Authentication:
    """ASGI middleware: answers 401 to requests without a valid key, before it reads their bodies.

    Probes, the static files of the page and OPTIONS need no key.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[KEY_IN_SCOPE] = key = self._keys.find(_token(scope))
        if self._keys and key is None and not _is_open(scope):
            await _refusal()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def key_of(scope: Scope) -> ApiKey | None:
    """The key that a request gave; None if it gave none or was refused."""
    key: ApiKey | None = scope.get(KEY_IN_SCOPE)
    return key


def _token(scope: Scope) -> bytes:
    """The token of the one Authorization header, or nothing."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else b""


def _is_open(scope: Scope) -> bool:
    path = route_path(scope)
    is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
    return scope["method"] == "OPTIONS" or (is_open and scope["method"] in ("GET", "HEAD"))


def _refusal() -> JSONResponse:
    message = "an API key is needed: send the header Authorization: Bearer KEY with a valid key"
    body = error_body(message, "invalid_request_error", code="invalid_api_key")
    return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
