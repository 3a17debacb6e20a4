"""One replica in a Ray actor: an engine process and the HTTP application, without a socket."""

import asyncio
import gc
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve
from starlette.types import ASGIApp, Message

from server.config import set_threads
from server.http.app import create_app
from server.http.request_ids import RequestIds
from server.http.service import Service
from server.logs import say, set_up_logs
from server.replicas.fleet_actor import RemoteFleet
from server.replicas.fleet_member import FleetMember
from server.replicas.relayed_request import RelayedRequest, response_messages
from server.replicas.retried_messages import retried_messages
from server.replicas.settings import ReplicaSettings
from server.served_model import ServedModel

logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
# for errors of running streams to reach the ingress
_LAST_S = 2.0


class Replica:
    """Answers relayed requests. Ray Serve makes it, checks its health and ends it."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]
        """Load the model and the row patches; any error makes Ray Serve try again."""
        set_up_logs(settings.monitoring.log_format)
        say(set_threads(settings.threads))
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._served = ServedModel(
            settings.model,
            settings.engine,
            settings.http,
            settings.patches,
            settings.limits,
            settings.supervision,
            settings.monitoring,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._service: Service = await asyncio.to_thread(self._served.load)
        self._service.engine.attach()
        try:
            await self._service.patches.load_first()
            fleet = RemoteFleet(context.app_name, self._name)
            initial = settings.patches.folders
            self._member = FleetMember(self._service.patches, fleet, initial)
            await self._member.join()
        except BaseException:
            await self._stop()
            raise
        self._app = self._application(settings)
        interval_s = settings.monitoring.log_interval_s
        if interval_s:
            self._tasks.append(asyncio.create_task(self._served.activity.run(interval_s)))
        self._tasks.append(asyncio.create_task(self._end_when_lost()))
        # the loaded objects stay, so the garbage collector need not scan them again
        gc.collect()
        gc.freeze()

    def _application(self, settings: ReplicaSettings) -> ASGIApp:
        http = settings.http
        changes = self._member
        body_bytes = http.max_body_mib * 2**20
        return RequestIds(
            create_app(self._service, body_bytes, http.body_timeout_s, http.ui, changes)
        )

    async def stream(self, request: RelayedRequest) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of the response, as they arrive.

        An empty list says that the engine has died, and that the request now runs again.
        """
        messages = retried_messages(self._app, request, self._service.engine)
        async with aclosing(messages) as batches:
            async for batch in batches:
                yield batch

    async def answer(self, request: RelayedRequest) -> tuple[str, list[Message]]:
        """This replica's name, and the ASGI messages of the whole response."""
        async with aclosing(response_messages(self._app, request)) as batches:
            return self._name, [message async for batch in batches for message in batch]

    def check_health(self) -> None:
        """Raise ApiError if only a new replica helps: Ray Serve then replaces this one."""
        self._service.check_alive()

    async def __del__(self) -> None:
        """End the engine; Ray Serve awaits this after the last request."""
        if hasattr(self, "_app"):
            await self._member.leave()
            for task in self._tasks:
                task.cancel()
            await self._stop()

    async def _stop(self) -> None:
        await self._service.engine.detach()
        await asyncio.to_thread(self._served.stop)

    async def _end_when_lost(self) -> None:
        """End the process if its engine is gone, or if it cannot follow the changes of patches.

        Health checks would take seconds, in which a replica that refuses everything at once would
        be the least loaded one."""
        while not (self._service.engine.is_lost or self._member.is_lost):
            await asyncio.sleep(_LOOK_EVERY_S)
        if self._service.engine.is_lost:
            logger.error("the engine process has died; this replica ends")
        await asyncio.sleep(_LAST_S)
        await asyncio.to_thread(self._served.stop)
        os._exit(1)
