"""An HTTP request as plain data, which travels from the ingress to a replica."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from server.http.authentication import KEY_IN_SCOPE
from server.http.request_ids import ID_HEADER
from server.http.root_path import route_path
from server.replicas.prefix_index import MOST_CHARACTERS
from server.request_id import current_request_id

_PLAIN_KEYS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("headers", "client", "server", "root_path", KEY_IN_SCOPE),
)
# seconds between parts of a response; one part costs more CPU time than one token
_INTERVAL_S = 0.02
# fields that separate the KV blocks of requests
_SCOPE_FIELDS = ("model", "memory_patches", "cache_salt")


@dataclass(frozen=True)
class RoutingText:
    """The part of a request that decides which KV blocks it can share.

    Attributes:
        scope: a hash of what must be equal, besides the prompt.
        prompt: the beginning of the prompt, the conversation or the token ids, as text.
    """

    scope: str
    prompt: str


@dataclass(frozen=True)
class RelayedRequest:
    """A request of a client with access.

    Attributes:
        scope: the plain values of the ASGI scope, with the request's id and API key.
        text: None if the request has no prompt.
        is_retry: whether a replica or an engine has died while it ran this request.
    """

    scope: dict[str, Any]
    body: bytes
    text: RoutingText | None
    is_retry: bool = False

    @classmethod
    def of(cls, scope: Scope, body: bytes, generating: frozenset[str]) -> "RelayedRequest":
        """The request of a scope. ``generating`` are the paths whose requests have prompts."""
        plain = {name: scope[name] for name in _PLAIN_KEYS if name in scope}
        headers = [one for one in scope["headers"] if one[0] != ID_HEADER]
        request_id = current_request_id()
        if request_id:
            headers.append((ID_HEADER, request_id.encode()))
        text = routing_text(body) if route_path(scope) in generating else None
        return cls(plain | {"headers": headers}, body, text)


def routing_text(body: bytes) -> RoutingText | None:
    """The routing text of the JSON body of a completion or chat; None if it has no prompt.

    It stays small whatever the body has. The replica refuses malformed and deeply nested bodies,
    not this function.
    """
    try:
        return _text_of(json.loads(body))
    except (ValueError, RecursionError):
        return None


def _text_of(fields: object) -> RoutingText | None:
    if not isinstance(fields, dict):
        return None
    shared = json.dumps([fields.get(name) for name in _SCOPE_FIELDS])
    scope = hashlib.blake2b(shared.encode(), digest_size=16).hexdigest()
    if fields.get("messages"):
        # templates put tools before messages
        prompt = json.dumps([fields.get("tools"), fields["messages"]], ensure_ascii=False)
    else:
        prompt = _prompt_text(fields.get("prompt"))
    return RoutingText(scope, prompt[:MOST_CHARACTERS]) if prompt else None


def _prompt_text(prompt: object) -> str:
    """A prompt as text; of several prompts the first one."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        return ""
    if isinstance(prompt[0], int):
        return " ".join(map(str, prompt[:MOST_CHARACTERS]))
    return _prompt_text(prompt[0])


def without_id(message: Message) -> Message:
    """An ASGI message without the header of the request's id."""
    if message["type"] != "http.response.start":
        return message
    headers = [one for one in message.get("headers", ()) if one[0].lower() != ID_HEADER]
    return {**message, "headers": headers}


async def response_messages(
    app: ASGIApp, request: RelayedRequest
) -> AsyncGenerator[list[Message], None]:
    """The ASGI messages with which ``app`` answers, in lists.

    A list has the messages that arrive within an interval after the list before. Evenly spaced
    streams of less than one event per interval do not wait; other events wait at most that long.

    If the generator is closed early, ``app`` sees that the client has disconnected.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    bodies = [request.body]
    left = asyncio.Event()

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    has_ended = False

    async def send(message: Message) -> None:
        nonlocal has_ended
        has_ended = message["type"] == "http.response.body" and not message.get("more_body")
        messages.put_nowait(message)

    async def answer() -> None:
        try:
            await app({**request.scope}, receive, send)
        except Exception:
            # Starlette answers a failed request, then raises; the handler has logged the error
            if not has_ended:
                raise
        finally:
            messages.put_nowait(None)

    task = asyncio.ensure_future(answer())
    try:
        is_over, until = False, 0.0
        while not is_over:
            together = await _next_messages(messages, until)
            is_over = together[-1] is None
            found = _joined_bodies(message for message in together if message is not None)
            if found:
                if found[-1]["type"] == "http.response.body":
                    until = asyncio.get_running_loop().time() + _INTERVAL_S
                yield found
        await task
    finally:
        left.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _next_messages(
    messages: asyncio.Queue[Message | None], until: float
) -> list[Message | None]:
    """The next message, and those that arrive before a time of the loop; None ends them."""
    found = [await messages.get()]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            while found[-1] is not None:
                found.append(await messages.get())
    return found


def _joined_bodies(messages: Iterable[Message]) -> list[Message]:
    """The messages, with one body instead of several that follow each other."""
    found: list[Message] = []
    for kind, group in groupby(messages, lambda message: message["type"]):
        parts = list(group)
        if kind == "http.response.body":
            body = b"".join(part.get("body", b"") for part in parts)
            parts = [{**parts[-1], "body": body}]
        found += parts
    return found
