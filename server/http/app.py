"""The HTTP application: its routes and its lifespan."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.http.body_limit import BodyLimit
from server.http.completions import Completion
from server.http.errors import ApiError, install_error_handlers
from server.http.schemas import CompletionRequest
from server.http.service import Service

Answer = TypeVar("Answer")


def create_app(
    service: Service,
    max_body_bytes: int,
    body_timeout_s: float,
) -> FastAPI:
    """The application for one service. The caller starts and stops the engine process."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.attach()
        yield
        await service.engine.detach()

    app = FastAPI(title="memplus", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=body_timeout_s)
    install_error_handlers(app)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        completion = Completion(service, body)
        if not body.stream:
            return JSONResponse(await _until_disconnect(request, completion.whole()))
        events = completion.events()
        # an error before the first token still sets the status of the response
        first = await _until_disconnect(request, anext(events))
        return EventStream(first, events)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The list with the one served model."""
        model = {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "memplus",
            "max_model_len": service.limits.max_model_len,
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine runs and can read its value tables; else 503 with the reason."""
        service.check_engine()
        service.check_tables()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return app


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


async def _until_disconnect(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
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
