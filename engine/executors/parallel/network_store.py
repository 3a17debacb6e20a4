"""The store through which ranks of several machines meet, on the address of node 0."""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

# bounds the wait for the other ranks, all of which have loaded their share by then
MEETING_TIMEOUT = timedelta(minutes=1)


@dataclass(frozen=True)
class NetworkPlace:
    """The addresses of one rank of several machines.

    Attributes:
        master: the address of node 0, in numbers.
        own: the address of this machine at which the ranks of the others reach it.
    """

    master: str
    own: str

    def store(self, port: int) -> Any:
        """A connection to the store of node 0; RuntimeError if it cannot be reached."""
        c10d: Any = distributed  # torch's stubs lack this name
        return c10d.TCPStore(self.master, port, is_master=False, timeout=MEETING_TIMEOUT)


class NetworkStore:
    """Listens at one address of this machine, and no other, until it is closed.

    Neither are connections authenticated nor is their number limited: close it when all have met.

    Attributes:
        port: the port, a free one.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        self.port: int = listener.getsockname()[1]
        c10d: Any = distributed
        self._store = c10d.TCPStore(
            address,
            self.port,
            is_master=True,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def close(self) -> None:
        """Stop listening, and end all connections."""
        self._store = None
