"""The other machines of a tensor-parallel model, as node 0 feeds and watches them."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from engine.errors import ConfigError
from engine.executors.parallel.channel import ALL_RANKS, Channel
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.message_codec import Frame, MessageError
from engine.executors.parallel.messages import RankDied, RankReady, RankRefused, StartRanks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeLink:
    """A machine that has joined.

    Attributes:
        node: its number, from 1 on.
        ranks: the ranks that it runs.
        address: the address from which it came.
        num_blocks: the KV blocks for which it has memory.
    """

    node: int
    ranks: range
    address: str
    num_blocks: int
    channel: Channel

    def __str__(self) -> str:
        return f"node {self.node} at {self.address}"

    def send(self, frames: Sequence[Frame]) -> None:
        """Send each of its ranks a message, one for all if it is the same; OSError if it fails."""
        first = frames[0]
        if all(one is first for one in frames):
            self.channel.send_frame(first, ALL_RANKS)
            return
        for rank, frame in zip(self.ranks, frames, strict=True):
            self.channel.send_frame(frame, rank)


class Nodes:
    """Nodes 1 and up, all of which have joined. One thread at a time may send."""

    def __init__(self, links: Sequence[NodeLink]) -> None:
        self._links = links
        self._closing = threading.Event()

    @property
    def num_blocks(self) -> int:
        """The KV blocks for which all of them have memory."""
        return min(link.num_blocks for link in self._links)

    def start(self, num_blocks: int) -> None:
        """Let them start their ranks; RankLostError if one has left."""
        for link in self._links:
            try:
                link.channel.send(StartRanks(num_blocks))
            except OSError as error:
                raise _lost(link, error) from None

    def wait_until_ready(self) -> None:
        """Wait until all ranks of the nodes have loaded their shares, or the first node fails.

        Raises:
            ConfigError: a rank cannot load it.
            RankLostError: a node or one of its ranks has ended.
        """
        waiting = list(self._links)
        while waiting:
            answered = wait([link.channel.fileno() for link in waiting])
            for link in [one for one in waiting if one.channel.fileno() in answered]:
                _check_ready(link)
                waiting.remove(link)

    def watch(self, on_loss: Callable[[], object]) -> None:
        """From now on, log the loss of a node or one of its ranks before ``close``, and call
        ``on_loss``, in a thread."""
        for link in self._links:
            arguments = link, on_loss
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def send(self, frames: Sequence[Frame]) -> None:
        """Send the ranks of all nodes their messages; RankLostError if one cannot be reached."""
        first = self._links[0].ranks.start
        for link in self._links:
            try:
                link.send(frames[link.ranks.start - first : link.ranks.stop - first])
            except OSError as error:
                raise _lost(link, error) from None

    def send_to(self, rank: int, frame: Frame) -> None:
        """Send one rank of a node its message; RankLostError if it cannot be reached."""
        (link,) = [one for one in self._links if rank in one.ranks]
        try:
            link.channel.send_frame(frame, rank)
        except OSError as error:
            raise _lost(link, error) from None

    def close(self) -> None:
        """End the connections, upon which the nodes end; does nothing the second time."""
        self._closing.set()
        for link in self._links:
            link.channel.end()
            link.channel.close()

    def _watch(self, link: NodeLink, on_loss: Callable[[], object]) -> None:
        try:
            message = link.channel.recv()
        except (EOFError, MessageError, OSError) as error:
            message = error
        if self._closing.is_set():
            return
        if isinstance(message, RankDied):
            logger.error(
                "tensor-parallel rank %d (process %d of node %d at %s) died (exit %d)",
                *(message.rank, message.process, link.node, link.address, message.code),
            )
        else:
            where = link.node, link.address
            logger.error("node %d at %s has ended or cannot be reached: %s", *where, message)
        on_loss()


def _check_ready(link: NodeLink) -> None:
    """Read the answer of a node; errors as ``Nodes.wait_until_ready``."""
    try:
        answer = link.channel.recv()
    except (EOFError, MessageError, OSError) as error:
        raise _lost(link, error) from None
    if isinstance(answer, RankRefused):
        raise ConfigError(f"node {link.node}: {answer.message}")
    if not isinstance(answer, RankReady):
        raise RankLostError(f"{link} did not load its ranks: {answer}")


def _lost(link: NodeLink, error: Exception) -> RankLostError:
    return RankLostError(f"{link} has ended or cannot be reached ({error})")
