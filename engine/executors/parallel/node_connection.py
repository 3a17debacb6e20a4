"""Connects a machine to node 0 of its model, which may not run yet."""

import logging
import socket
import time

from engine.executors.parallel.channel import watch_peer
from engine.executors.parallel.node_handshake import introduce

_ATTEMPT_S = 10.0
_PAUSE_S = 0.5

logger = logging.getLogger(__name__)


def connect(host: str, port: int, key: bytes, timeout_s: float) -> socket.socket:
    """A connection to node 0, which has proved that it has the key.

    Tries again while nobody listens, or the other end closes the connection.

    Raises:
        HandshakeError: the other end is not node 0; WrongKeyError: it has another key.
        TimeoutError: node 0 did not answer within ``timeout_s``; the message has the last reason.
    """
    deadline = time.monotonic() + timeout_s
    is_first = True
    while True:
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=_ATTEMPT_S)
            introduce(connection, key, _ATTEMPT_S)
            watch_peer(connection)
            return connection
        except (EOFError, OSError, UnicodeError) as error:
            if connection is not None:
                connection.close()
            reason = str(error)
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        if is_first:
            logger.info("waiting for node 0 at %s port %d: %s", host, port, reason)
            is_first = False
        if time.monotonic() + _PAUSE_S > deadline:
            raise TimeoutError(f"no answer from node 0 at {host} port {port}: {reason}")
        time.sleep(_PAUSE_S)
