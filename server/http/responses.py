"""Responses that end their generation as soon as the client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.http.answer import Answer
from server.http.errors import ApiError

Result = TypeVar("Result")


async def respond(request: Request, answer: Answer, stream: bool) -> Response:
    """The response with ``answer``, either whole or as server-sent events.

    Raises:
        ApiError, RequestError: as ``Answer``, before anything was sent; 499 for a client that left.
    """
    if not stream:
        return JSONResponse(await _until_disconnect(request, answer.whole()))
    events = answer.events()
    # an error before the first token still sets the status of the response
    first = await _until_disconnect(request, anext(events))
    return EventStream(first, events)


class EventStream(StreamingResponse):
    """Server-sent events after a first one that has been computed; always closes ``events``."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield first
            async for event in events:
                yield event

        super().__init__(body(), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # a client that disconnects stops the response between events: end its requests now
            await self._events.aclose()


async def _until_disconnect(request: Request, answer: Coroutine[Any, Any, Result]) -> Result:
    """Await ``answer``; if the client disconnects, cancel it and raise ApiError (499)."""
    task = asyncio.ensure_future(answer)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
