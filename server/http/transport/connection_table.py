"""The open connections, up to a limit; idle ones make way for new ones."""

from collections.abc import Callable
from typing import Protocol


class Evictable(Protocol):
    """A connection that the table can close."""

    def abort(self) -> None:
        """Close the connection at once."""
        ...


class ConnectionTable:
    """Counts connections; one that waits for a request or runs a TLS handshake can be evicted."""

    def __init__(self, limit: int, on_refused: Callable[[], None]) -> None:
        self._limit = limit
        self._on_refused = on_refused
        self._open: set[Evictable] = set()
        self._idle: dict[Evictable, None] = {}  # the longest idle first

    def add(self, connection: Evictable) -> bool:
        """Add a connection, idle at first; False if the limit is reached and none was evicted.

        A refused connection is in the table too, so that it is evicted before it can pile up.
        """
        is_admitted = self.hold(connection)
        if not is_admitted:
            self._on_refused()
        return is_admitted

    def hold(self, connection: Evictable) -> bool:
        """Add a connection as ``add`` does, but do not count it as refused."""
        while len(self._open) >= self._limit and self._idle:
            evicted = next(iter(self._idle))
            self.remove(evicted)
            evicted.abort()
        is_admitted = len(self._open) < self._limit
        self._open.add(connection)
        self.set_idle(connection)
        return is_admitted

    def set_idle(self, connection: Evictable) -> None:
        """Allow the connection's eviction, after all that are idle already."""
        if connection in self._open:
            self._idle[connection] = None

    def set_active(self, connection: Evictable) -> None:
        """Forbid the connection's eviction."""
        self._idle.pop(connection, None)

    def remove(self, connection: Evictable) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
