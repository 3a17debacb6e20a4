"""The ingress in a Ray actor: access, request bodies, and the way to the replicas."""

import logging
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.admission import Admission
from server.http.errors import EngineError, OverloadedError
from server.http.front import Front
from server.http.generation_routes import GENERATION_PATHS
from server.http.intake import Intake
from server.logs import set_up_logs
from server.replicas.relay import Answer, Relay, ReplicaLostError, unavailable
from server.replicas.relayed_request import RelayedRequest, without_id
from server.replicas.settings import IngressSettings

logger = logging.getLogger(__name__)
_LOST = (RayActorError, ReplicaUnavailableError)
_METRICS_TIMEOUT_S = 10.0


class Ingress:
    """The ASGI application behind Ray Serve's proxy."""

    def __init__(self, settings: IngressSettings, replicas: Any) -> None:
        """``replicas``: Ray Serve's handle of them."""
        set_up_logs(settings.monitoring.log_format)
        self._settings = settings
        self._stream = replicas.options(method_name="stream", stream=True)
        self._replicas = replicas

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; Ray Serve calls this once."""
        settings = self._settings
        relay = Relay(self._messages, self._answer_all, frozenset(GENERATION_PATHS))
        # replicas have the queues, so only bodies are counted here
        intake = Intake(
            relay,
            Admission({"body_bytes": settings.limits.max_bodies_mib * 2**20}, lambda reason: None),
            frozenset(),
            settings.http.max_body_mib * 2**20,
            settings.http.body_timeout_s,
        )
        access_log = settings.monitoring.access_log
        return _for_ray(Front(intake, settings.access, settings.keys, access_log=access_log))

    async def _messages(self, request: RelayedRequest) -> AsyncGenerator[list[Message], None]:
        response = self._stream.remote(request)
        has_ended = False
        try:
            async for messages in response:
                yield messages
            has_ended = True
        except _LOST as error:
            has_ended = True
            logger.warning("a replica was lost: %s", error)
            raise ReplicaLostError(str(error)) from None
        except BackPressureError:
            raise OverloadedError from None
        except RayTaskError as error:
            has_ended = True
            logger.error("a replica failed: %s", error)
            raise EngineError("internal error") from None
        except DeploymentUnavailableError:
            raise unavailable() from None
        finally:
            if not has_ended:
                response.cancel()

    async def _answer_all(self, request: RelayedRequest) -> Sequence[Answer | BaseException]:
        try:
            answers: Sequence[Answer | BaseException] = await self._replicas.broadcast(
                "answer", request
            ).results_async(timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            raise unavailable() from None
        return answers


def _for_ray(app: ASGIApp) -> ASGIApp:
    """``app``, which knows only HTTP requests, as Ray Serve calls it.

    It answers the start and end that Ray Serve announces, refuses websockets, and leaves out the
    header of the request's id, which Ray's proxy adds.
    """

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await app(scope, receive, partial(_send_without_id, send))
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # which refuses it with status 403
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    return application


async def _send_without_id(send: Send, message: Message) -> None:
    await send(without_id(message))
