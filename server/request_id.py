"""The id of the HTTP request that a task works for. Needs no HTTP library."""

import uuid
from contextvars import ContextVar

CURRENT_ID: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the HTTP request that this task or thread works for; empty outside of one."""
    return CURRENT_ID.get()


def engine_request_id(prefix: str) -> str:
    """A unique id that contains that of the HTTP request, which clients may repeat."""
    current = CURRENT_ID.get()
    unique = uuid.uuid4().hex
    return f"{prefix}-{current}-{unique[:12]}" if current else f"{prefix}-{unique}"
