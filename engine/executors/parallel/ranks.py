"""The processes of tensor-parallel ranks 1 and up, which rank 0 starts, feeds and watches."""

import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socketpair

from engine.errors import ConfigError
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.messages import RankMessage, RankReady, RankRefused
from engine.executors.parallel.shared_memory import SharedMemory
from engine.parent_death import end_with
from engine.shielded_start import shielded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSettings:
    """Settings of the process of one rank.

    Attributes:
        rank, size: as in ``RankGroup``.
        store: the file through which the ranks meet.
        model: what the process's entry function loads its share with.
    """

    rank: int
    size: int
    store: Path
    model: object


class Ranks:
    """Ranks 1 to N - 1 of a model; this process is rank 0. Any thread may send.

    A daemonic process, as the engine's is, may not use ``multiprocessing.Process``: these are plain
    subprocesses. The kernel kills each when the thread that made this object ends: make it in the
    main thread. Ctrl+C does not reach them.
    """

    def __init__(self, entry: str, size: int, model: object) -> None:
        """Start the processes; each calls ``entry`` (``"module:function"``) with its connection and
        ``RankSettings``.
        """
        # others cannot write to a folder that this process just made
        folder = _folder_in_memory(size)
        self._folder = tempfile.TemporaryDirectory(prefix="memplus-ranks-", dir=folder)
        self.store = Path(self._folder.name) / "store"
        self.size = size
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            process, connection = _start(entry)
            self._connections.append(connection)
            self._processes.append(process)
            connection.send(RankSettings(rank, size, self.store, model))

    def wait_until_ready(self) -> None:
        """Wait until every rank has loaded its share.

        Raises:
            ConfigError: a rank cannot load it.
            RankLostError: a rank has ended.
        """
        pairs = zip(self._connections, self._processes, strict=True)
        for rank, (connection, process) in enumerate(pairs, 1):
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                raise RankLostError(
                    f"tensor-parallel rank {rank} died while it loaded its share"
                    f" (exit {process.wait()})"
                ) from None
            if isinstance(answer, RankRefused):
                self.close()
                raise ConfigError(answer.message)
            assert isinstance(answer, RankReady)

    def watch(self, on_death: Callable[[], object]) -> None:
        """From now on, log the end of a rank before ``close``, and call ``on_death``, in a thread.

        Call it when all ranks are ready: before, ``wait_until_ready`` reports why a rank ends.
        """
        for rank, process in enumerate(self._processes, 1):
            arguments = rank, process, self._closing, on_death
            threading.Thread(target=_watch, args=arguments, daemon=True).start()

    def delete_store(self) -> None:
        """Delete the file through which the ranks have met."""
        self._folder.cleanup()

    def send(self, messages: Sequence[RankMessage]) -> None:
        """Send each rank its message: the first one goes to rank 1. RankLostError if it is dead."""
        assert len(messages) == self.size - 1
        with self._lock:
            for rank, message in enumerate(messages, 1):
                self._send(rank, message)

    def send_to(self, rank: int, message: RankMessage) -> None:
        """Send one rank a message; a ``send`` of another thread waits for this message at most.

        Raises:
            RankLostError: the rank is dead.
        """
        with self._lock:
            self._send(rank, message)

    def _send(self, rank: int, message: RankMessage) -> None:
        try:
            self._connections[rank - 1].send(message)
        except OSError as error:
            problem = f"tensor-parallel rank {rank} has died ({error.strerror})"
            raise RankLostError(problem) from None

    def close(self) -> None:
        """End the processes, also while they load, and wait; does nothing the second time."""
        self._closing.set()
        for connection, process in zip(self._connections, self._processes, strict=True):
            process.kill()
            process.wait()
            connection.close()
        self._folder.cleanup()


def _folder_in_memory(size: int) -> Path | None:
    """A file system in memory with room for what ``size`` ranks share, if there is one."""
    found = Path("/dev/shm")
    # half of it stays free
    needed = 2 * SharedMemory.num_bytes(size)
    return found if found.is_dir() and shutil.disk_usage(found).free > needed else None


def _start(entry: str) -> tuple["subprocess.Popen[bytes]", Connection]:
    """A process that calls ``main`` of this file, and the connection to it."""
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
    call = f"main({entry!r}, {theirs.fileno()}, {os.getpid()})"
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; {call}"
    with theirs, shielded():
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    return process, Connection(ours.detach())


def _watch(
    rank: int,
    process: "subprocess.Popen[bytes]",
    closing: threading.Event,
    on_death: Callable[[], object],
) -> None:
    code = process.wait()
    if not closing.is_set():
        logger.error("tensor-parallel rank %d (process %d) died (exit %d)", rank, process.pid, code)
        on_death()


def main(entry: str, descriptor: int, parent: int) -> None:
    """Run one rank, in the process that ``Ranks`` started in the process ``parent``."""
    # the end of the connection would not end a rank that hangs, is stopped or loads; the signal
    # comes when the thread that started this process ends, so ``Ranks`` needs the main thread
    end_with(parent)
    connection = Connection(descriptor)
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(connection, connection.recv())
