"""Routes of the web page: its static files, with a content security policy."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
# the only files that are served, with their content types
PAGE_FILES = {
    _INDEX: "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "memory.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
} | dict.fromkeys(
    (
        "answer.js",
        "api.js",
        "app.js",
        "key.js",
        "memory.js",
        "row_map.js",
        "settings.js",
        "status.js",
        "theme.js",
        "timeline.js",
        "trace.js",
    ),
    "text/javascript; charset=utf-8",
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_routes() -> APIRouter:
    """``GET /``, and ``GET /page/...`` for each file that the page needs."""
    router = APIRouter(include_in_schema=False)
    for name, content_type in PAGE_FILES.items():
        path = "/" if name == _INDEX else f"/page/{name}"
        endpoint = _endpoint((_FOLDER / name).read_bytes(), content_type)
        router.add_api_route(path, endpoint)
    return router


def _endpoint(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        # browsers keep the file and ask each time whether it has changed
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def static_file(request: Request) -> Response:
        known = request.headers.get("if-none-match", "").replace("W/", "")
        if tag in (one.strip() for one in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=content_type)

    return static_file
