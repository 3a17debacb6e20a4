"""Accepts the other machines of a model on node 0, and bounds what strangers can send to it."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from multiprocessing.connection import wait
from queue import SimpleQueue

from engine.errors import ConfigError
from engine.executors.parallel.channel import Channel, watch_peer
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.message_codec import MessageError
from engine.executors.parallel.messages import JoinRefused, NodeAnswer, NodeJoin
from engine.executors.parallel.node_handshake import HandshakeError, welcome
from engine.executors.parallel.nodes import NodeLink, Nodes

# of one connection, until the node has proved its key and has asked to join
_GREETING_S = 10.0
_MOST_ANSWER_BYTES = 2**17
_MOST_GREETINGS = 64
_MOST_REFUSALS_LOGGED = 20
_POLL_S = 0.2
Arrival = tuple[NodeJoin, Channel, str]

logger = logging.getLogger(__name__)


class NodeListener:
    """Listens at node 0 until all nodes have joined; afterwards nobody can connect.

    A connection is closed unless it proves the key within 10 s, in 80 bytes. Further ones are
    closed while 64 do so.

    Attributes:
        address: the address at which it listens, in numbers.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen at an address of this machine; ``host`` is the address or a name that has it.

        Raises:
            ConfigError: the address is none of this machine's, or the port is taken.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
            if ip_address(address[0]).is_unspecified:
                reason = f"must be an address that the other nodes can reach, not {host}"
                raise ConfigError(f"master_addr: {reason}")
            self.address = str(address[0])
            self._listener = socket.create_server((self.address, port), family=family)
        except (OSError, UnicodeError) as error:  # idna cannot encode some names
            reason = getattr(error, "strerror", None) or str(error)
            problem = f"node 0 cannot listen on {host} port {port}: {reason}"
            raise ConfigError(f"master_addr: {problem}") from None
        self._listener.settimeout(0)
        self._is_over = threading.Event()
        self._arrivals: SimpleQueue[Arrival] = SimpleQueue()
        self._slots = threading.BoundedSemaphore(_MOST_GREETINGS)
        self._num_refused = 0

    def gather(
        self,
        key: bytes,
        ranks: dict[int, range],
        refusal: Callable[[NodeJoin], str | None],
        timeout_s: float,
    ) -> Nodes:
        """Wait until all nodes have joined, then stop listening.

        A node that is refused, or leaves, may come again.

        Args:
            key: the secret of all nodes.
            ranks: the ranks of each node to wait for, by its number.
            refusal: why a node that has the key cannot take part; None if it can.
            timeout_s: seconds to wait.

        Raises:
            RankLostError: not all have come in time.
        """
        deadline = time.monotonic() + timeout_s
        links: dict[int, NodeLink] = {}
        try:
            while len(links) < len(ranks):
                if time.monotonic() > deadline:
                    missing = ", ".join(str(one) for one in ranks if one not in links)
                    raise RankLostError(f"no node {missing} joined within {timeout_s:g} s")
                if self._listener in wait([self._listener, *_filenos(links)], _POLL_S):
                    self._accept(key)
                while not self._arrivals.empty():
                    link = self._admitted(self._arrivals.get(), ranks, links, refusal)
                    if link is not None:
                        links[link.node] = link
                        logger.info("%s has joined", link)
                self._drop_left(links)
        except BaseException:
            for link in links.values():
                link.channel.close()
            raise
        finally:
            self.close()
        return Nodes([links[node] for node in sorted(links)])

    def close(self) -> None:
        """Stop listening."""
        self._is_over.set()
        self._listener.close()
        while not self._arrivals.empty():
            self._arrivals.get()[1].close()

    def _drop_left(self, links: dict[int, NodeLink]) -> None:
        """Forget nodes that have left; while they wait for an answer, they send nothing."""
        left = wait(_filenos(links), 0)
        for link in list(links.values()):
            if link.channel.fileno() in left:
                logger.warning("node %d at %s has left before the start", link.node, link.address)
                link.channel.close()
                del links[link.node]

    def _accept(self, key: bytes) -> None:
        try:
            connection, peer = self._listener.accept()
        except OSError:
            return  # the other end has gone already
        if not self._slots.acquire(blocking=False):
            connection.close()
            return
        arguments = connection, str(peer[0]), key
        try:
            threading.Thread(target=self._greet, args=arguments, daemon=True).start()
        except RuntimeError:  # this process may have no more threads
            self._slots.release()
            connection.close()

    def _greet(self, connection: socket.socket, address: str, key: bytes) -> None:
        try:
            welcome(connection, key, _GREETING_S)
            watch_peer(connection)
            channel = Channel(connection, NodeAnswer, _MOST_ANSWER_BYTES)
            channel.limit_time(_GREETING_S)
            join = channel.recv()
            channel.limit_time(None)
        except (HandshakeError, MessageError, EOFError, OSError) as error:
            connection.close()
            self._log_refusal(address, error)
            return
        finally:
            self._slots.release()
        if isinstance(join, NodeJoin) and not self._is_over.is_set():
            self._arrivals.put((join, channel, address))
        else:
            channel.close()

    def _log_refusal(self, address: str, error: Exception) -> None:
        self._num_refused += 1  # an approximate number is enough
        if self._num_refused <= _MOST_REFUSALS_LOGGED:
            logger.warning(
                "a connection from %s to the port of the nodes failed: %s", address, error
            )

    def _admitted(
        self,
        arrival: Arrival,
        ranks: dict[int, range],
        links: dict[int, NodeLink],
        refusal: Callable[[NodeJoin], str | None],
    ) -> NodeLink | None:
        """The link of a node that may take part; None if it was refused."""
        join, channel, address = arrival
        self._drop_left(links)
        if join.node not in ranks:
            reason: str | None = f"node_rank: there is no node {join.node}"
        elif join.node in links:
            reason = f"node_rank: {links[join.node]} has joined already"
        elif join.num_blocks < 1:
            reason = f"num_blocks: must be at least 1, not {join.num_blocks}"
        else:
            reason = refusal(join)
        if reason is None:
            return NodeLink(join.node, ranks[join.node], address, join.num_blocks, channel)
        logger.warning("node %d at %s was refused: %s", join.node, address, reason)
        try:
            channel.send(JoinRefused(reason))
        except OSError:
            logger.info("node %d at %s has gone before it got the answer", join.node, address)
        channel.close()
        return None


def _filenos(links: dict[int, NodeLink]) -> list[int]:
    return [link.channel.fileno() for link in links.values()]
