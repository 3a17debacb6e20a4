"""The other tensor-parallel ranks: processes that a machine starts, feeds and watches."""

import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket, socketpair

from engine.errors import ConfigError
from engine.executors.parallel.channel import ALL_RANKS, Channel
from engine.executors.parallel.group import RankGroup, RankLostError
from engine.executors.parallel.message_codec import Frame, MessageError, encoded
from engine.executors.parallel.messages import (
    MeetOthers,
    RankAnswer,
    RankDied,
    RankMessage,
    RankReady,
    RankRefused,
)
from engine.executors.parallel.network_store import NetworkPlace
from engine.executors.parallel.nodes import Nodes
from engine.executors.parallel.shared_memory import SharedMemory
from engine.parent_death import end_with
from engine.shielded_start import shielded

# the exit code of a rank that ends because another one did
AFTER_ANOTHER = 3
# seconds until the end of such a rank is reported; before, the rank that ended first is
_REPORT_S = 2.0
# answers say why a rank cannot load its share
_MOST_ANSWER_BYTES = 2**17

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSettings:
    """Settings of the process of one rank.

    Attributes:
        rank, size: as in ``RankGroup``.
        store: the file through which the ranks of one machine meet.
        place: the addresses of this machine if there are several.
        model: what the process's entry function loads its share with.
    """

    rank: int
    size: int
    store: Path
    place: NetworkPlace | None
    model: object

    def meet(self, group: RankGroup, message: MeetOthers) -> None:
        """Meet the other ranks; errors as ``RankGroup.meet``."""
        if self.place is None:
            group.meet(self.store)
        else:
            group.meet_over_network(self.place, message.store_port)


class Ranks:
    """The ranks of a model that this process starts, and those of other nodes.

    On node 0 this process is rank 0, and any thread may send. On another node it passes on what
    node 0 sends.

    A daemonic process, as the engine's is, may not use ``multiprocessing.Process``: these are plain
    subprocesses. The kernel kills each when the thread that made this object ends: make it in the
    main thread. Ctrl+C does not reach them.

    Attributes:
        size: the number of ranks on all machines.
        store: as in ``RankSettings``.
        died: the rank of this machine whose death ``watch`` has noticed first.
    """

    def __init__(
        self,
        entry: str,
        size: int,
        model: object,
        *,
        started: range | None = None,
        place: NetworkPlace | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        """Start the processes; each calls ``entry`` (``"module:function"``) with its channel and
        ``RankSettings``.

        Args:
            size: the number of ranks on all machines.
            model: as in ``RankSettings``.
            started: the ranks to start here; by default all but rank 0.
            place: the addresses of this machine, if there are several.
            nodes: the other machines, on node 0.
        """
        # others cannot write to a folder that this process just made
        folder = _folder_in_memory(size)
        self._folder = tempfile.TemporaryDirectory(prefix="memplus-ranks-", dir=folder)
        self.store = Path(self._folder.name) / "store"
        self.size = size
        self.died: RankDied | None = None
        self._nodes = nodes
        self._started = range(1, size) if started is None else started
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._channels: list[Channel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in self._started:
            settings = RankSettings(rank, size, self.store, place, model)
            process, channel = _start(entry, settings)
            self._channels.append(channel)
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        """Wait until every rank has loaded its share.

        Raises:
            ConfigError: a rank cannot load it.
            RankLostError: a rank, or a node, has ended.
        """
        for rank, channel, process in self._each():
            try:
                answer = channel.recv()
            except (EOFError, OSError):
                raise RankLostError(
                    f"tensor-parallel rank {rank} died while it loaded its share"
                    f" (exit {process.wait()})"
                ) from None
            if isinstance(answer, RankRefused):
                self.close()
                raise ConfigError(answer.message)
            assert isinstance(answer, RankReady)
        if self._nodes is not None:
            self._nodes.wait_until_ready()

    def watch(self, on_death: Callable[[], object]) -> None:
        """From now on, log the end of a rank or node before ``close``, and call ``on_death``, in a
        thread.

        Call it when all ranks are ready: before, ``wait_until_ready`` reports why a rank ends.
        """
        for rank, _, process in self._each():
            arguments = rank, process, on_death
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()
        if self._nodes is not None:
            self._nodes.watch(on_death)

    def delete_store(self) -> None:
        """Delete the file through which the ranks have met."""
        self._folder.cleanup()

    def send(self, messages: Sequence[RankMessage]) -> None:
        """Send each rank its message: the first one goes to rank 1. RankLostError if it is dead."""
        assert len(messages) == self.size - 1
        # most often all are the same
        by_message = {id(message): message for message in messages}
        made = {identity: encoded(message) for identity, message in by_message.items()}
        frames = [made[id(message)] for message in messages]
        with self._lock:
            for rank in self._started:
                self._send(rank, frames[rank - 1])
            if self._nodes is not None:
                self._nodes.send(frames[len(self._started) :])

    def send_to(self, rank: int, message: RankMessage) -> None:
        """Send one rank a message; a ``send`` of another thread waits for this message at most.

        Raises:
            RankLostError: the rank is dead.
        """
        with self._lock:
            if rank in self._started:
                self._send(rank, encoded(message))
            else:
                assert self._nodes is not None
                self._nodes.send_to(rank, encoded(message))

    def pass_on(self, rank: int, frame: Frame) -> None:
        """Send an encoded message to one rank of this machine, or with ``ALL_RANKS`` to each.

        Raises:
            MessageError: this machine has no such rank.
            RankLostError: the rank is dead.
        """
        if rank != ALL_RANKS and rank not in self._started:
            raise MessageError(f"a message is for rank {rank}, which this machine does not have")
        for one in self._started if rank == ALL_RANKS else [rank]:
            self._send(one, frame)

    def await_report(self) -> None:
        """Wait for a short time until a thread of ``watch`` calls ``on_death``.

        After an exchange has failed, it names the rank that died.
        """
        self._closing.wait(_REPORT_S)

    def close(self) -> None:
        """End the processes, also while they load, and wait; does nothing the second time."""
        self._closing.set()
        if self._nodes is not None:
            self._nodes.close()
        for _, channel, process in self._each():
            process.kill()
            process.wait()
            channel.close()
        self.delete_store()

    def _each(self) -> Iterator[tuple[int, Channel, "subprocess.Popen[bytes]"]]:
        """Number, channel and process of each rank that this process has started."""
        return zip(self._started, self._channels, self._processes, strict=False)

    def _send(self, rank: int, frame: Frame) -> None:
        try:
            self._channels[self._started.index(rank)].send_frame(frame)
        except OSError as error:
            problem = f"tensor-parallel rank {rank} has died ({error.strerror})"
            raise RankLostError(problem) from None

    def _watch(
        self, rank: int, process: "subprocess.Popen[bytes]", on_death: Callable[[], object]
    ) -> None:
        code = process.wait()
        if code == AFTER_ANOTHER:
            self._closing.wait(_REPORT_S)
        if not self._closing.is_set():
            logger.error(
                "tensor-parallel rank %d (process %d) died (exit %d)", rank, process.pid, code
            )
            self.died = self.died or RankDied(rank, process.pid, code)
            on_death()


def _folder_in_memory(size: int) -> Path | None:
    """A file system in memory with room for what ``size`` ranks share, if there is one."""
    found = Path("/dev/shm")
    # half of it stays free
    needed = 2 * SharedMemory.num_bytes(size)
    return found if found.is_dir() and shutil.disk_usage(found).free > needed else None


def _start(entry: str, settings: RankSettings) -> tuple["subprocess.Popen[bytes]", Channel]:
    """A process that calls ``main`` of this file, and the channel to it."""
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
    call = f"main({entry!r}, {theirs.fileno()}, {os.getpid()})"
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; {call}"
    with theirs, shielded():
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    with Connection(os.dup(ours.fileno())) as connection:
        connection.send(settings)
    return process, Channel(ours, RankAnswer, _MOST_ANSWER_BYTES)


def main(entry: str, descriptor: int, parent: int) -> None:
    """Run one rank, in the process that ``Ranks`` started in the process ``parent``."""
    # the end of the connection would not end a rank that hangs, is stopped or loads; the signal
    # comes when the thread that started this process ends, so ``Ranks`` needs the main thread
    end_with(parent)
    with Connection(os.dup(descriptor)) as connection:
        settings = connection.recv()
    channel = Channel(socket(fileno=descriptor), RankMessage)
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(channel, settings)
