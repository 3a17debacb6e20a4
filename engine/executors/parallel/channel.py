"""Sends and receives framed messages over a socket, with a bound on the size of each."""

import select
import socket
import struct
import time
import types
import typing
from typing import Any

import numpy as np

from engine.executors.parallel.message_codec import Bytes, Frame, MessageError, decoded, encoded

ALL_RANKS = 0  # of a node; rank 0 is the sender
_PREFIX = struct.Struct("!IIQ")  # the rank that it is for, bytes of header, bytes of arrays
_MOST_HEADER_BYTES = 2**24
# more is sent part by part instead of copied together
_JOINED_BYTES = 2**16
# seconds of silence before the kernel asks the other machine, seconds between questions, and how
# many without an answer end the connection
_KEPT_ALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Channel:
    """One end of a connection between two processes. One thread may receive, and one send."""

    def __init__(
        self, connection: socket.socket, received: Any, most_bytes: int | None = None
    ) -> None:
        """Take over a connected socket.

        Args:
            connection: a stream socket.
            received: the class of the messages that may arrive, or a union of classes.
            most_bytes: bytes of one message that may arrive; None trusts the other end.
        """
        self._socket, self._most_bytes = connection, most_bytes
        is_union = isinstance(received, types.UnionType)
        self._kinds: tuple[type, ...] = typing.get_args(received) if is_union else (received,)
        self._deadline: float | None = None

    def send(self, message: Any) -> None:
        """Send a message, an instance of a dataclass; OSError if the connection is lost."""
        self.send_frame(encoded(message))

    def send_frame(self, frame: Frame, rank: int = ALL_RANKS) -> None:
        """Send an encoded message, for one rank of a node or all; errors as ``send``."""
        size = frame.num_array_bytes
        prefix = _PREFIX.pack(rank, len(frame.header), size)
        if size <= _JOINED_BYTES:
            self._socket.sendall(
                b"".join((prefix, frame.header, *(part.data for part in frame.parts)))
            )
            return
        self._socket.sendall(prefix + frame.header)
        for part in frame.parts:
            self._socket.sendall(part.data)

    def recv(self) -> Any:
        """Wait for the next message.

        Raises:
            EOFError: the other end has closed the connection.
            MessageError: it sent something else, or too much.
            OSError: the connection is lost, or the time of ``limit_time`` is over.
        """
        _, frame = self.recv_frame()
        (body,) = frame.parts
        return decoded(frame.header, body, self._kinds)

    def recv_frame(self) -> tuple[int, Frame]:
        """The next message, encoded, and the rank that it is for; errors as ``recv``."""
        prefix = read_exactly(self._socket, _PREFIX.size, self._deadline)
        rank, num_header_bytes, num_array_bytes = _PREFIX.unpack(prefix.data)
        size = num_header_bytes + num_array_bytes
        is_large = self._most_bytes is not None and size > self._most_bytes
        if is_large or num_header_bytes > _MOST_HEADER_BYTES:
            raise MessageError(f"a message of {size} bytes is larger than any that is expected")
        header = read_exactly(self._socket, num_header_bytes, self._deadline)
        body = read_exactly(self._socket, num_array_bytes, self._deadline)
        return rank, Frame(header.tobytes(), (body,))

    def limit_time(self, seconds: float | None) -> None:
        """From now on receive for this long in total; None: without limit."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._socket.settimeout(None)

    def fileno(self) -> int:
        """The descriptor, to wait for several channels."""
        return self._socket.fileno()

    def wait_for_end(self) -> None:
        """Wait until the other end closes the connection, or it is lost, whatever is unread."""
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        poller.poll()

    def end(self) -> None:
        """End the connection; a thread that receives gets an EOFError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end did it before

    def close(self) -> None:
        """End the connection and free it, when no thread uses it any more."""
        self._socket.close()


def read_exactly(connection: socket.socket, num_bytes: int, deadline: float | None = None) -> Bytes:
    """This many bytes, in new memory, before ``deadline`` (of ``time.monotonic``).

    Raises:
        EOFError: the other end closed the connection before.
        OSError: the connection is lost, or the time is over.
    """
    found = np.empty(num_bytes, np.uint8)
    rest = found.data
    while len(rest):
        if deadline is not None:
            # a sender of single bytes gets no more time
            if (seconds := deadline - time.monotonic()) <= 0:
                raise TimeoutError("timed out")
            connection.settimeout(seconds)
        count = connection.recv_into(rest)
        if not count:
            raise EOFError("the connection was closed")
        rest = rest[count:]
    return found


def watch_peer(connection: socket.socket) -> None:
    """Set up a TCP connection between nodes.

    Messages are sent at once. If the other machine is gone, an idle connection is lost after 20 s.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEPT_ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, name, value)
