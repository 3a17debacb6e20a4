"""Responses that end their generation as soon as the client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.http.answer import Answer
from server.http.errors import ApiError
from server.http.intake import place_of

Result = TypeVar("Result")


async def respond(request: Request, answer: Answer, stream: bool) -> Response:
    """The response with ``answer``, either whole or as server-sent events.

    Raises:
        ApiError, RequestError: as ``Answer``, before anything was sent; 499 for a client that left.
    """
    place, receive = place_of(request.scope), request.receive
    if not stream:
        body = await until_disconnect(receive, answer.whole(place))
        return Response(body, media_type="application/json")
    events = answer.events(place)
    # an error before the first token still sets the status of the response
    first = await until_disconnect(receive, anext(events))
    return EventStream(first, events)


class EventStream(StreamingResponse):
    """Server-sent events after a first one that has been computed; always closes ``events``."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        # proxies must not hold events back
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ApiError:
            return  # the client left
        finally:
            # a client that disconnects stops the response between events: end its requests now
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, answer: Coroutine[Any, Any, Result]) -> Result:
    """Await ``answer``; if the client disconnects, cancel it and raise ApiError (499)."""
    task = asyncio.ensure_future(answer)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
