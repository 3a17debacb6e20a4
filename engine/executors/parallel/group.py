"""The collectives of tensor-parallel ranks: through shared memory, and over gloo."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from engine.executors.parallel import shared_memory
from engine.executors.parallel.network_store import MEETING_TIMEOUT, NetworkPlace
from engine.executors.parallel.shared_memory import MOST_BYTES, RankGoneError, SharedMemory

# bounds one collective's wait for a rank that hangs; a rank that dies ends the collective at once
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class RankLostError(RuntimeError):
    """A collective failed, most often because another rank has ended or cannot be reached."""


class RankGroup:
    """The ranks of one model. All call the same methods in the same order.

    Results have the same bits on all ranks.

    Attributes:
        rank: the index of this rank.
        size: the number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._joined: Any = None
        self._memory: SharedMemory | None = None

    def meet(self, store: Path) -> None:
        """Wait until all ranks, which run on one machine, have called this.

        Before, no other method may be called. ``store`` is a new file that all ranks can write, in
        a folder that other users cannot. Afterwards the folder may be deleted.

        Raises:
            RankLostError: a rank has ended, or did not come in time.
        """
        c10d: Any = distributed  # torch's stubs lack these names
        if self.rank == 0 and shared_memory.is_available():
            SharedMemory.create(store.parent, self.size)
        try:
            meeting = c10d.FileStore(str(store), self.size)
            meeting.set_timeout(MEETING_TIMEOUT)
            # the default listens on an address that other machines can reach
            self._join(meeting, "127.0.0.1", _COLLECTIVE_TIMEOUT)
        except RuntimeError as error:
            raise failed_exchange(error) from error
        pids_1S = self.gather_columns(torch.tensor([[os.getpid()]]))
        if shared_memory.is_available():
            timeout_s = _COLLECTIVE_TIMEOUT.total_seconds()
            memory = SharedMemory(store.parent, self.rank, pids_1S[0].tolist(), timeout_s)
        else:
            memory = None
        # no rank opens a file of the folder any more when all have come here
        self.sum(torch.zeros(1))
        self._memory = memory

    def meet_over_network(self, place: NetworkPlace, port: int) -> None:
        """Wait until all ranks, which run on several machines, have called this.

        Before, no other method may be called. All tensors then go over gloo, which listens at
        ``place.own``. ``port`` is that of node 0's ``NetworkStore``; afterwards it may be closed.

        Raises:
            RankLostError: a rank has ended, cannot be reached, or did not come in time.
        """
        try:
            self._join(place.store(port), place.own, MEETING_TIMEOUT)
        except RuntimeError as error:
            raise failed_exchange(error) from error
        # no rank needs the store any more when all have come here; a firewall between two ranks
        # is noticed only now
        self.sum(torch.zeros(1))
        self._group._set_default_timeout(_COLLECTIVE_TIMEOUT)

    def _join(self, meeting: Any, address: str, timeout: timedelta) -> None:
        """Connect to all other ranks through a store, and listen for them at ``address``.

        ``timeout`` bounds each collective.
        """
        c10d: Any = distributed  # torch's stubs lack these names
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        self._joined = c10d.ProcessGroupGloo(meeting, self.rank, self.size, options)

    @property
    def _group(self) -> Any:
        assert self._joined is not None, "the ranks have not met"
        return self._joined

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks. It may overwrite ``x``."""
        if (parts := self._exchanged(x)) is not None:
            return parts.sum(0)
        x = x.contiguous()
        self._run(lambda: self._group.allreduce([x]))
        return x

    def gather_columns(self, x_TC: Tensor) -> Tensor:
        """The columns of all ranks, ``[T, size * C]``, in the order of the ranks."""
        num_tokens, columns = x_TC.shape
        if (exchanged := self._exchanged(x_TC)) is not None:
            return torch.cat(list(exchanged), dim=1)
        parts = list(x_TC.new_empty((self.size, num_tokens, columns)))
        self._run(lambda: self._group.allgather([parts], [x_TC.contiguous()]))
        return torch.cat(parts, dim=1)

    def exchange_columns(self, x_TV: Tensor) -> Tensor:
        """This rank's columns, ``[T, V / size]``, of the sum of ``x`` over all ranks.

        Each rank sends each other one the columns that are not its own (an all-to-all).
        """
        num_tokens, width = x_TV.shape
        columns = width // self.size
        if (parts := self._exchanged(x_TV)) is not None:
            return parts[:, :, columns * self.rank : columns * (self.rank + 1)].sum(0)
        sent = x_TV.view(num_tokens, self.size, columns).transpose(0, 1).contiguous()
        got = torch.empty_like(sent)
        self._run(lambda: self._group.alltoall_base(got, sent, [], []))
        return got.sum(0)

    def leave(self) -> None:
        """End the other ranks' waits for this one, which calls no other method any more.

        Without it they notice the end of this process only at their next check of its id.
        """
        if self._memory is not None:
            self._memory.leave()

    def _exchanged(self, x: Tensor) -> Tensor | None:
        """All ranks' ``x`` if shared memory can carry it, until the next collective."""
        if self._memory is None or x.nbytes > MOST_BYTES:
            return None
        try:
            return self._memory.exchange(x)
        except RankGoneError as error:
            raise failed_exchange(error) from error

    def _run(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise failed_exchange(error) from error


def failed_exchange(error: RuntimeError) -> RankLostError:
    """The error for one of gloo or nccl, in one line; nccl gives the reason in its last lines."""
    # both raise the same type for a lost connection and for other failures
    message, _, _ = str(error).partition("Exception raised from")
    text = " ".join(message.split())
    return RankLostError(f"an exchange between tensor-parallel ranks failed: {text}")
