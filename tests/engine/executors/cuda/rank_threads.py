"""Tensor-parallel ranks of the CUDA executor as threads of one process, over gloo, interpreted.

Triton's interpreter has state of the process: one thread at a time runs, and passes the turn on
while it waits for other ranks.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import torch

from engine.executors.cuda.rank_executors import FirstRankExecutor, OtherRankExecutor
from engine.executors.cuda.step import DeviceModel, DeviceRank
from engine.executors.parallel.device_group import DeviceGroup
from engine.executors.parallel.message_codec import decoded, encoded
from engine.executors.parallel.messages import RankMessage
from engine.executors.parallel.rank_loop import follow
from engine.executors.parallel.shares import RankShare
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.prompt_device import PromptDevice
from tests.engine.executors.parallel.test_device_group import gloo_group
from tests.engine.executors.parallel.test_sharded_model import share_of

CPU = torch.device("cpu")
# ends a test whose ranks wait for each other
TIMEOUT = timedelta(seconds=60)


class Turn:
    """The right to run, which one thread at a time has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            yield

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Let other threads run."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class TurnGroup(DeviceGroup):
    """A group that lets the other ranks run while this one is in a collective.

    Attributes:
        num_collectives: collectives so far.
    """

    def __init__(self, rank: int, size: int, turn: Turn) -> None:
        super().__init__(rank, size, self._connect)
        self._turn, self.num_collectives = turn, 0

    def _connect(self, store, rank, size, _timeout):
        with self._turn.passed_on():
            return gloo_group(store, rank, size, TIMEOUT)

    def _run(self, start):
        self.num_collectives += 1
        with self._turn.passed_on():
            super()._run(start)


class QueueConnection:
    """The end of a connection to rank 0 that takes messages out of a queue."""

    def __init__(self, turn: Turn) -> None:
        self.messages: queue.SimpleQueue = queue.SimpleQueue()
        self._turn = turn

    def recv(self):
        with self._turn.passed_on():
            message = self.messages.get()
        if message is None:
            raise EOFError
        return decoded(*message, get_args(RankMessage))


class ThreadRanks:
    """``Ranks`` whose other ranks are threads."""

    def __init__(self, connections: "list[QueueConnection]") -> None:
        self._connections = connections

    def send(self, messages) -> None:
        for rank, message in enumerate(messages, 1):
            self.send_to(rank, message)

    def send_to(self, rank, message) -> None:
        # rank 0 may change the batch after the call
        header, parts = encoded(message)
        data = b"".join(part.tobytes() for part in parts)
        body = np.frombuffer(bytearray(data), np.uint8)
        self._connections[rank - 1].messages.put((header, body))

    def await_report(self) -> None:
        """Does nothing: no thread watches the others."""

    def close(self) -> None:
        for connection in self._connections:
            connection.messages.put(None)


@contextmanager
def rank_threads(
    model, size: int, sharding: str, turn: Turn, work: Callable[[DeviceModel, DeviceRank], object]
) -> Iterator[tuple[DeviceModel, DeviceRank]]:
    """Rank 0's model, while threads call ``work`` with those of the other ranks.

    The ``with`` block has the turn. Its end waits for the threads.
    """

    def made(group, store):
        share = RankShare(model.config, group.rank, size, sharding)
        group.meet(store, CPU)
        with torch.inference_mode():
            part = share_of(model, share, group, is_captured=True)
        rank = DeviceRank(share, group)
        return DeviceModel(part, rank=rank), rank

    def other(group, store):
        with turn.taken():
            try:
                work(*made(group, store))
            except BaseException:
                # rank 0 gets a less telling error
                traceback.print_exc()
                group.leave()
                raise

    groups = [TurnGroup(rank, size, turn) for rank in range(size)]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(size) as threads, turn.taken():
        store = Path(folder) / "store"
        running = [threads.submit(other, group, store) for group in groups[1:]]
        try:
            yield made(groups[0], store)
        except BaseException:
            groups[0].leave()
            raise
        finally:
            with turn.passed_on():
                wait(running)
        for one in running:
            one.result()


@contextmanager
def ranked_executor(
    model, config, size, sharding="columns", num_blocks=64
) -> "Iterator[tuple[FirstRankExecutor, list[OtherRankExecutor]]]":
    """Rank 0's executor of a model, and those of the other ranks, which follow it."""
    others: dict[int, OtherRankExecutor] = {}
    turn = Turn()
    connections = [QueueConnection(turn) for _ in range(size - 1)]

    def run(own, rank):
        executor = OtherRankExecutor(own, config, PromptDevice(), num_blocks)
        others[rank.share.rank] = executor
        follow(connections[rank.share.rank - 1], CPU, executor.follow)

    with rank_threads(model, size, sharding, turn, run) as (own, rank):
        ranks = ThreadRanks(connections)
        executor = FirstRankExecutor(own, config, FakeDevice(), num_blocks, rank, ranks)
        try:
            yield executor, others
        finally:
            ranks.close()
