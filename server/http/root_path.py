"""The path of a request without the root path that a proxy adds."""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path that the routes see; proxies may send the root path or strip it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root or path.startswith(f"{root}/"):
        path = path.removeprefix(root)
    return path or "/"
