"""Accepts TLS clients; their handshakes hold places in the connection table."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast

from uvicorn.server import ServerState

from server.http.transport.connection_table import ConnectionTable

logger = logging.getLogger(__name__)
# after an error such as "too many open files"
_PAUSE_S = 1.0


class TlsListener:
    """Makes a connection for each client whose handshake succeeds in time.

    A TLS server of asyncio makes its protocol only after the handshake, so nothing would count the
    sockets of clients that never finish it. uvicorn closes this object as one of its servers.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        handshake_timeout_s: float,
        make_handshake: Callable[[], "TlsHandshake"],
    ) -> None:
        """Begin to accept clients, in the running event loop."""
        self._listener, self._context = listener, context
        self._handshake_timeout_s = handshake_timeout_s
        self._make_handshake = make_handshake
        self._listener.setblocking(False)
        self._task = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """Accept no more clients."""
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait until ``close`` has had its effect."""
        await asyncio.gather(self._task, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                logger.error("cannot accept connections: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            self._make_handshake().start(client, self._context, self._handshake_timeout_s)
            await asyncio.sleep(0)  # a client that waits already is accepted without a pause


class TlsHandshake(asyncio.Protocol):
    """Holds a client's place until the handshake ends; then a connection takes over."""

    def __init__(
        self,
        server_state: ServerState,
        table: ConnectionTable,
        make_connection: Callable[[], asyncio.Protocol],
    ) -> None:
        self._server, self._table = server_state, table
        self._make_connection = make_connection
        self._task: asyncio.Task[None]

    def start(self, client: socket.socket, context: ssl.SSLContext, timeout_s: float) -> None:
        """Begin the handshake on an accepted socket."""
        self._server.connections.add(self)  # type: ignore[arg-type]
        self._table.hold(self)
        self._task = asyncio.get_running_loop().create_task(self._run(client, context, timeout_s))
        self._task.add_done_callback(lambda _: self._leave())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake has succeeded: asyncio calls this before it delivers data."""
        self._leave()
        connection = self._make_connection()
        cast(asyncio.Transport, transport).set_protocol(connection)
        connection.connection_made(transport)

    def abort(self) -> None:
        """Close the socket at once."""
        self._task.cancel()

    def shutdown(self) -> None:
        """Close the socket, which has sent no request."""
        self.abort()

    async def _run(self, client: socket.socket, context: ssl.SSLContext, timeout_s: float) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self, client, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # the socket is closed
            logger.debug("a TLS handshake failed: %s", error)

    def _leave(self) -> None:
        self._table.remove(self)
        self._server.connections.discard(self)
