"""Uvicorn that serves while the model loads, and drains on SIGINT or SIGTERM."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn

from server.config import HttpOptions
from server.http.gate import ENDING, Gate
from server.http.service import Service
from server.http.transport.connection_table import ConnectionTable
from server.http.transport.tls_listener import TlsHandshake, TlsListener
from server.limits import LimitOptions

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The part behind the HTTP server: it is loaded and ended in threads."""

    def load(self) -> Service:
        """Start the engine process and return its service; may raise."""
        ...

    def stop(self) -> None:
        """End the engine process; ``load`` raises then, if it still waits."""
        ...


class HttpServer(uvicorn.Server):
    """Runs until a signal, the loss of the engine, or an error in loading.

    The first SIGINT or SIGTERM refuses new requests and gives running ones ``--drain-timeout-s``
    seconds; the second one ends them at once. Requests that do not finish get an error: an event
    in a stream, otherwise status 503.

    Attributes:
        failure: the error with which loading ended; None if it succeeded or a signal stopped it.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        backend: Backend,
        on_ready: Callable[[Service], Coroutine[Any, Any, None]],
        http: HttpOptions,
        limits: LimitOptions,
        connections: ConnectionTable,
    ) -> None:
        """``on_ready`` opens the gate, and then runs concurrently with the server until it ends.

        TLS handshakes count in ``connections``, as the connections of the protocol do.
        """
        super().__init__(config)
        self._gate = gate
        self._backend = backend
        self._on_ready = on_ready
        self._drain_timeout_s = http.drain_timeout_s
        self._handshake_timeout_s = limits.header_timeout_s
        self._connections = connections
        self._service: Service | None = None
        self._work: asyncio.Task[None] | None = None
        self._num_signals = 0
        self._deadline = 0.0
        self.failure: Exception | None = None

    @property
    def is_engine_lost(self) -> bool:
        """Whether the engine process has died and no restarts are left."""
        return self._service is not None and self._service.engine.is_lost

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: uvicorn calls this, and ``on_tick`` acts on it."""
        self._num_signals += 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load.

        It replaces uvicorn's method, which limits neither the time nor the number of handshakes.
        """
        options = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        protocol_class: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        protocol: Callable[[], asyncio.Protocol] = partial(protocol_class, **options)
        self.servers = [await self._listen(one, protocol) for one in sockets or ()]
        self.started = True
        self._work = asyncio.create_task(self._load())

    async def on_tick(self, counter: int) -> bool:
        """Whether the server ends now; uvicorn asks ten times a second."""
        await super().on_tick(counter)
        if self.failure is not None or self.is_engine_lost:
            return True
        if not self._num_signals:
            return False
        now = time.monotonic()
        if not self._gate.is_draining:
            self._gate.drain()
            self._deadline = now + self._drain_timeout_s
            logger.info("draining: %d requests are running", self._gate.num_running)
        is_over = now >= self._deadline or self._num_signals > 1
        return is_over or not self._gate.num_running

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what still runs with errors, then the connections and the engine process."""
        self._gate.drain()
        if self._gate.num_running:
            logger.warning("%d requests end with an error", self._gate.num_running)
        self._gate.end()
        if self._service is not None:
            self._service.engine.end_all(ENDING)
            await self._service.engine.detach()
        await asyncio.gather(super().shutdown(sockets), asyncio.to_thread(self._backend.stop))
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _listen(
        self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]
    ) -> asyncio.Server:
        context = self.config.ssl
        if context is None:
            return await asyncio.get_running_loop().create_server(
                protocol, sock=listener, backlog=self.config.backlog
            )
        handshake = partial(TlsHandshake, self.server_state, self._connections, protocol)
        tls_listener = TlsListener(listener, context, self._handshake_timeout_s, handshake)
        return cast(asyncio.Server, tls_listener)  # uvicorn closes it, and waits for that

    async def _load(self) -> None:
        try:
            service = await asyncio.to_thread(self._backend.load)
            if not self._gate.is_draining:
                service.engine.attach()
                self._service = service
                await self._on_ready(service)
        except Exception as error:
            if not self._gate.is_draining:
                self.failure = error
