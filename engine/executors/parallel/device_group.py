"""The collectives of tensor-parallel ranks on GPUs: over nccl, also within CUDA graphs."""

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from engine.executors.parallel.group import failed_exchange

# bounds a collective that is launched without a graph, if a rank hangs; see ``DeviceGroup``
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# bounds the wait in ``meet`` for the other ranks, all of which have loaded their share by then
_MEETING_TIMEOUT = timedelta(minutes=1)
# seconds in which nccl ends the collectives of a rank that leaves; most often it needs none
_LEAVING_S = 5.0

# (store, rank, size, timeout) to a process group of torch.distributed
MakeGroup = Callable[[Any, int, int, timedelta], Any]


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group whose collectives run on the current GPU, in the order of its stream."""
    c10d: Any = distributed  # torch's stubs lack these names
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, size, options)


class DeviceGroup:
    """The ranks of one model, one GPU each; see ``Collectives``.

    A collective is queued like a kernel: the host does not wait for it. Sums have the dtype of
    their tensors: with two ranks that rounds once, with more ranks once for each further rank.
    A graph may capture collectives after ``meet``. All ranks must capture and replay the same ones
    in the same order.

    A rank that hangs stops the others. If a collective without a graph waits for 10 minutes, nccl
    ends the process; for a replayed graph nothing here does.
    """

    def __init__(self, rank: int, size: int, make: MakeGroup = nccl_group) -> None:
        self.rank, self.size = rank, size
        self._make = make
        self._joined: Any = None

    def meet(self, store: Path, device: torch.device) -> None:
        """Wait until all ranks have called this; before, no other method may be called.

        ``store`` is as in ``RankGroup.meet``; ``device`` is this rank's, and the current one.

        Raises:
            RankLostError: a rank has ended, or did not come in time.
        """
        c10d: Any = distributed
        try:
            meeting = c10d.FileStore(str(store), self.size)
            meeting.set_timeout(_MEETING_TIMEOUT)
            self._joined = self._make(meeting, self.rank, self.size, _COLLECTIVE_TIMEOUT)
        except RuntimeError as error:
            raise failed_exchange(error) from error
        # the first collective creates the communicator, which a graph's capture could not
        self.smallest(torch.zeros(1, device=device))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks. It may overwrite ``x``."""
        x = x.contiguous()
        self._run(lambda group: group.allreduce([x]))
        return x

    def gather_columns(self, x_TC: Tensor) -> Tensor:
        """The columns of all ranks, ``[T, size * C]``, in the order of the ranks."""
        num_tokens, columns = x_TC.shape
        sent = x_TC.contiguous()
        got = sent.new_empty(self.size * num_tokens, columns)
        self._run(lambda group: group._allgather_base(got, sent))
        return got.view(self.size, num_tokens, columns).transpose(0, 1).flatten(1)

    def exchange_columns(self, x_TV: Tensor) -> Tensor:
        """This rank's columns, ``[T, V / size]``, of the sum of ``x`` over all ranks.

        Each rank sends each other one the columns that are not its own (an all-to-all).
        """
        num_tokens, width = x_TV.shape
        sent = x_TV.view(num_tokens, self.size, width // self.size).transpose(0, 1).contiguous()
        got = torch.empty_like(sent)
        self._run(lambda group: group.alltoall_base(got, sent, [], []))
        return got.sum(0)

    def copy_from_first(self, x: Tensor) -> None:
        """Overwrite ``x``, contiguous, by that of rank 0."""
        self._run(lambda group: group.broadcast(x, 0))

    def smallest(self, x: Tensor) -> Tensor:
        """The smallest ``x`` of all ranks, by elements. It overwrites ``x``."""
        self._run(lambda group: group.allreduce([x], distributed.ReduceOp.MIN))
        return x

    def leave(self, free_graphs: Callable[[], None] = lambda: None) -> None:
        """End this rank's collectives, also one that waits for another rank; none may follow.

        ``free_graphs`` frees the graphs that have captured collectives: as long as one exists, nccl
        does not end. If a graph is left, this waits for 5 seconds.
        """
        joined, self._joined = self._joined, None
        if joined is None:
            return
        # first end a graph in flight: freeing it could wait for it
        ending = threading.Thread(target=joined.abort, daemon=True)
        ending.start()
        free_graphs()
        ending.join(_LEAVING_S)

    def _run(self, start: Callable[[Any], Any]) -> None:
        assert self._joined is not None, "the ranks have not met, or this one has left"
        try:
            # on a GPU, the current stream waits, not the host
            start(self._joined).wait()
        except RuntimeError as error:
            raise failed_exchange(error) from error
