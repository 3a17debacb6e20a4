"""Runs a relayed request again, once, if the engine dies before its response has begun."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from starlette.types import ASGIApp, Message

from server.replicas.relayed_request import RelayedRequest, response_messages

_LOOK_EVERY_S = 0.5
_ERROR_STATUS = 500


class Engine(Protocol):
    """The part of ``EngineClient`` that matters here."""

    is_alive: bool


async def retried_messages(
    app: ASGIApp, request: RelayedRequest, engine: Engine
) -> AsyncGenerator[list[Message], None]:
    """As ``response_messages``, but a prompt that finds no engine waits for one.

    If the engine dies before the response to a prompt has begun, an empty list precedes the second
    run. A request that is a retry already (``is_retry``) has no second run: it may be the reason.
    """
    may_retry = request.text is not None and not request.is_retry
    if request.text is not None:
        await _wait_for(engine)
    async with aclosing(response_messages(app, request)) as batches:
        async for messages in batches:
            if may_retry and messages[0].get("status", 0) >= _ERROR_STATUS and not engine.is_alive:
                break
            may_retry = False
            yield messages
        else:
            return
    # if no restart is left, this process ends here, and the ingress tries another replica
    await _wait_for(engine)
    yield []
    async with aclosing(response_messages(app, request)) as batches:
        async for messages in batches:
            yield messages


async def _wait_for(engine: Engine) -> None:
    while not engine.is_alive:
        await asyncio.sleep(_LOOK_EVERY_S)
