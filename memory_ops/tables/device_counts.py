"""Reads counters of a device without waiting for it: exact if it is idle, else an earlier copy."""

import torch
from torch import Tensor

from memory_ops.tables.streams import Event, StreamPair


class DeviceCounts:
    """Counters that device work increases, and their last known values.

    A read never waits. If the device has work left, it returns what the last finished copy brought,
    and queues a new copy to pinned memory. Values of later reads are never smaller.
    """

    def __init__(self, counts: Tensor) -> None:
        """``counts`` is a matrix of integers on the device."""
        self._counts = counts
        self._copy = torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self._latest: list[list[int]] = self._copy.tolist()
        self._copied: Event | None = None  # of the copy in flight

    def read(self, streams: StreamPair) -> list[list[int]]:
        """The values, row by row.

        All work that changes the counters must be on these streams, or in graphs that are replayed
        on the caller's stream.
        """
        caller, side = streams.caller(), streams.side
        if self._copied is not None and self._copied.query():
            self._latest, self._copied = self._copy.tolist(), None
        if self._copied is not None:
            return self._latest
        if caller.is_idle() and side.is_idle():
            self._latest = self._counts.tolist()
        else:
            # on the caller's stream, which replays and later lookups follow
            caller.wait(side.record())
            caller.run(self._queue_copy)
            self._copied = caller.record()
        return self._latest

    def _queue_copy(self) -> None:
        self._copy.copy_(self._counts, non_blocking=True)
