"""The open connections, up to a limit; idle ones make way for new ones."""

import time
from collections.abc import Callable
from typing import Protocol

# a connection that has been idle for this long gives way to a new one
IDLE_S = 1.0
# open connections beyond the limit, whose clients read that they were refused
_MAX_REFUSED = 128


class Evictable(Protocol):
    """A connection that the table can close."""

    def abort(self) -> None:
        """Close the connection at once."""
        ...


class ConnectionTable:
    """Counts connections; one that waits for a request or runs a TLS handshake can be evicted.

    It is not evicted before it has been idle for a while: its request may be on the way.
    """

    def __init__(
        self,
        limit: int,
        on_refused: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_refused`` is called for each refused connection; ``clock`` returns seconds."""
        self._limit = limit
        self._on_refused = on_refused
        self._clock = clock
        self._open: set[Evictable] = set()
        self._idle: dict[Evictable, float] = {}  # since when; the longest idle first
        self._refused: dict[Evictable, None] = {}  # the oldest first

    def add(self, connection: Evictable) -> bool:
        """Add a connection, idle at first; False if the limit is reached and none was evicted.

        The caller answers a refused connection with an error. It may then stay for a while, until
        the client has read the error, or too many others were refused.
        """
        if not self.hold(connection):
            self._on_refused()
            return False
        return True

    def hold(self, connection: Evictable) -> bool:
        """Add a connection as ``add`` does, but do not count it as refused."""
        if len(self._open) >= self._limit and not self._evict():
            self._refused[connection] = None
            if len(self._refused) > _MAX_REFUSED:
                self._close(next(iter(self._refused)))
            return False
        self._open.add(connection)
        self.set_idle(connection)
        return True

    def set_idle(self, connection: Evictable) -> None:
        """Allow the connection's eviction, after all that are idle already."""
        if connection in self._open:
            self._idle.pop(connection, None)
            self._idle[connection] = self._clock()

    def set_active(self, connection: Evictable) -> None:
        """Forbid the connection's eviction."""
        self._idle.pop(connection, None)

    def remove(self, connection: Evictable) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._refused.pop(connection, None)

    def _evict(self) -> bool:
        """Close the connection that has been idle longest; False if none is idle long enough."""
        longest, since = next(iter(self._idle.items()), (None, 0.0))
        if longest is None or self._clock() - since < IDLE_S:
            return False
        self._close(longest)
        return True

    def _close(self, connection: Evictable) -> None:
        self.remove(connection)
        connection.abort()
