"""ASGI application that passes requests to replicas, and survives the death of one."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.http.errors import ApiError, EngineError
from server.http.json_text import event, json_text
from server.http.responses import until_disconnect
from server.http.root_path import route_path
from server.replicas.joined_metrics import joined_metrics
from server.replicas.relayed_request import RelayedRequest, without_id

# a replica's name and the ASGI messages of its response
Answer = tuple[str, list[Message]]
_CLIENT_LEFT = 499
_METRICS = "/metrics"
_PATCHES = "/v1/memory/patches"


class ReplicaLostError(Exception):
    """The replica that had accepted a request has died."""


def unavailable() -> ApiError:
    """The error of a request for which there is no replica."""
    message = "no replica answers"
    return ApiError(503, message, "server_error", headers={"Retry-After": "5"})


class Relay:
    """Sends each request to one replica, and ``/metrics`` to all of them.

    If the replica dies before the response has begun, another one gets the request, once: the
    request may be the reason. If it dies in the middle of a stream, the stream ends with an error
    event.
    """

    def __init__(
        self,
        stream: Callable[[RelayedRequest], AsyncGenerator[list[Message], None]],
        answer_all: Callable[[RelayedRequest], Awaitable[Sequence[Answer | BaseException]]],
        generating: frozenset[str],
    ) -> None:
        """``stream`` gives the ASGI messages of one replica, or raises ReplicaLostError or
        ApiError; an empty list of them says that the replica has used up the retry. ``answer_all``
        gives the answers of all replicas. ``generating`` are the paths whose requests have
        prompts."""
        self._stream = stream
        self._answer_all = answer_all
        self._generating = generating

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = RelayedRequest.of(scope, (await receive()).get("body", b""), self._generating)
        exchange = _Exchange(send)
        try:
            await until_disconnect(receive, self._answer(request, scope, exchange))
        except ApiError as error:
            if not exchange.has_begun:
                await exchange.send_error(error, scope, receive)
            elif error.status != _CLIENT_LEFT:
                await exchange.end_with_error(error)

    async def _answer(self, request: RelayedRequest, scope: Scope, exchange: "_Exchange") -> None:
        path = route_path(scope)
        if path == _METRICS and scope["method"] in ("GET", "HEAD"):
            for message in _joined(await self._answer_all(request)):
                await exchange.send(message)
            return
        # the dead replica may have begun a change of the patches, which must not be made twice
        is_change = path.startswith(_PATCHES) and scope["method"] in ("POST", "DELETE")
        may_retry = not is_change
        while True:
            try:
                async with aclosing(self._stream(request)) as batches:
                    async for messages in batches:
                        may_retry = may_retry and bool(messages)
                        for message in messages:
                            await exchange.send(message)
                return
            except ReplicaLostError:
                if exchange.has_begun or not may_retry:
                    raise EngineError("the replica has died") from None
            may_retry = False
            request = replace(request, is_retry=True)


class _Exchange:
    """The response to one client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self._has_ended = False
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """Send the next part of the response."""
        self.has_begun = True
        if message["type"] == "http.response.start":
            message = without_id(message)  # the front adds it again
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self._has_ended = True
        await self._send(message)

    async def send_error(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error instead of a response."""
        text = json_text(error.body)
        response = Response(text, error.status, error.headers, media_type="application/json")
        await response(scope, receive, self._send)

    async def end_with_error(self, error: ApiError) -> None:
        """End a stream as a server does whose engine has died; another response stays cut off."""
        if self._has_ended:
            return
        if not self._is_stream:
            raise ConnectionError(f"{error}, in the middle of a response")
        body = event(json_text(error.body)) + event("[DONE]")
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _joined(answers: Sequence[Answer | BaseException]) -> list[Message]:
    """One response from those of all replicas; the first error, if there is one.

    Raises:
        ApiError: a replica did not answer, or there is none.
    """
    bodies = {}
    for answer in answers:
        if isinstance(answer, BaseException):
            raise unavailable()
        replica, messages = answer
        if messages[0]["status"] != 200:
            return messages
        body = b"".join(message.get("body", b"") for message in messages[1:])
        bodies[replica] = body.decode()
    if not bodies:
        raise unavailable()
    joined = joined_metrics(bodies)
    headers = [(b"content-type", b"text/plain; version=0.0.4")]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    return [start, {"type": "http.response.body", "body": joined}]
