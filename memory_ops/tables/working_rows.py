"""Device copies of the rows, and their moments, that a training step of a host table uses.

Synchronisation between the caller's stream and a side stream:

* The side stream makes all copies over the bus, in order. So the copies of a step follow those that
  wrote back the step before, and read the rows that it wrote.
* The caller's stream computes row ids, reads the rows, and updates rows and moments. Before a copy,
  the side stream waits for the caller's stream. Before a use, the caller's stream waits for the
  copy: an event for each fetch of rows, and one for the moments.
* Memory belongs to the caller's stream, which may have work on it from an earlier owner. Row ids
  that only the side stream still uses are kept for it by ``Stream.keep``. Other memory is freed
  only after the caller's stream has waited for the side stream.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from memory_ops.tables.streams import Event, Stream, StreamPair
from memory_ops.triton_kernels.copy_rows import copy_rows


class WorkingRows:
    """The rows of one step: each crosses the bus once before its uses, and once after its update.

    ``fetch`` and ``begin_update`` wait for the device, because the number of new rows is a shape.
    Results do not depend on the order in which rows are fetched.

    Attributes:
        rows_PV: device copies of rows; ``places`` says where a row is.
        moments: device copies of the moments, ``[P, V]`` each, at the same places.
    """

    def __init__(self, table_RV: Tensor, device: torch.device, streams: StreamPair) -> None:
        """Copy rows of ``table_RV``, host memory that ``device`` can read, to ``device``."""
        self._sources: list[Tensor] = [table_RV]
        self._streams = streams
        # where each row is; -1: not on the device
        self._places_R = torch.full((len(table_RV),), -1, dtype=torch.int32, device=device)
        self._copies = [_buffer(table_RV, 0, device)]
        self._count = 0
        self._fetched: list[tuple[Tensor, Tensor]] = []  # rows and their places
        self._are_fetched = streams.side.record()
        self._with_moments = 0  # entries of _fetched whose moments follow

    def add_moments(self, moments: Sequence[Tensor]) -> None:
        """Also copy these matrices, ``[R, V]`` in host memory. Call it before the first fetch."""
        assert not self._count
        self._sources += moments
        self._copies += [_buffer(one, 0, self.device) for one in moments]

    @property
    def device(self) -> torch.device:
        """The device of the copies."""
        return self._places_R.device

    @property
    def rows_PV(self) -> Tensor:
        return self._copies[0]

    @property
    def moments(self) -> list[Tensor]:
        return self._copies[1:]

    def places(self, rows: Tensor) -> Tensor:
        """Places of rows that have been fetched, int64, in the shape of ``rows``."""
        return self._places_R[rows].long()

    def fetch(self, rows: Tensor) -> Event:
        """Start to copy those rows that are not on the device yet, int64 of any shape.

        The caller's stream must wait for the event before it reads ``rows_PV``.
        """
        rows_L = rows.flatten()
        new_U: Tensor = torch.unique(rows_L[self._places_R[rows_L] < 0])
        if len(new_U):
            begin, self._count = self._count, self._count + len(new_U)
            self._reserve(begin)
            places_U = torch.arange(begin, self._count, device=new_U.device)
            self._places_R[new_U] = places_U.int()
            self._fetched.append((new_U, places_U))
            side = self._follow_caller()
            side.run(partial(copy_rows, self._sources[0], new_U, self.rows_PV, places_U))
            self._are_fetched = side.record()
        return self._are_fetched

    def fetch_moments(self) -> None:
        """Start to copy the moments of all rows that have been fetched."""
        # the side stream has waited for their places in ``fetch``, and for nothing later
        side = self._streams.side
        for rows_U, places_U in self._fetched[self._with_moments :]:
            for source, copy in zip(self._sources[1:], self.moments, strict=True):
                side.run(partial(copy_rows, source, rows_U, copy, places_U))
        self._with_moments = len(self._fetched)

    def begin_update(self, rows_U: Tensor) -> Tensor:
        """Make rows and moments ready for the caller's stream; return the rows' places."""
        self.fetch(rows_U)
        self.fetch_moments()
        self.join()
        return self.places(rows_U)

    def end_update(self, rows_U: Tensor, places_U: Tensor) -> None:
        """Start to copy updated rows and moments back; no row is on the device then."""
        side = self._follow_caller()
        for source, copy in zip(self._sources, self._copies, strict=True):
            side.run(partial(copy_rows, copy, places_U, source, rows_U))
        for tensor in (rows_U, places_U):
            side.keep(tensor)
        # the caller's stream has waited for the copies of these rows in ``begin_update``
        for fetched_U, _ in self._fetched:
            self._places_R[fetched_U] = -1
        self._fetched, self._with_moments, self._count = [], 0, 0

    def join(self) -> None:
        """Make the caller's stream wait for all copies so far."""
        self._streams.caller().wait(self._streams.side.record())

    def synchronize(self) -> None:
        """Wait on the host until all copies so far are complete."""
        self._streams.side.synchronize()

    def _follow_caller(self) -> Stream:
        """The side stream; its next work follows what the caller's stream has queued."""
        self._streams.side.wait(self._streams.caller().record())
        return self._streams.side

    def _reserve(self, num_used: int) -> None:
        """Make the buffers hold all rows, and keep the first ones."""
        capacity = len(self.rows_PV)
        if self._count <= capacity:
            return
        # half as much again, so that buffers are seldom copied
        size = min(max(self._count, capacity * 3 // 2), len(self._places_R))
        self.join()
        caller = self._streams.caller()
        for index, old_PV in enumerate(self._copies):
            new_PV = _buffer(old_PV, size, old_PV.device)
            caller.run(partial(_move, old_PV[:num_used], new_PV[:num_used]))
            self._copies[index] = new_PV


def _move(old_PV: Tensor, new_PV: Tensor) -> None:
    new_PV.copy_(old_PV)


def _buffer(like: Tensor, num_rows: int, device: torch.device) -> Tensor:
    return torch.empty((num_rows, *like.shape[1:]), dtype=like.dtype, device=device)
