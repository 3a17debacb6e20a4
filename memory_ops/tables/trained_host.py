"""A trained table in page-locked host memory, for tables that exceed the GPU's memory.

A lookup copies its rows to the device on a side stream, unless an earlier lookup of the step did.
The first backward pass lets the moments follow. The optimiser updates the copies, which then return
to host memory. So each row and its moments cross the bus once each way per step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.page_lock import PageLock
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups
from memory_ops.tables.device import ReadyLookup
from memory_ops.tables.streams import StreamPair, cuda_streams
from memory_ops.tables.trained import TableReads, TrainedTable
from memory_ops.tables.working_rows import WorkingRows


class TrainedHostTable(TrainedTable):
    """A ``TrainedTable`` whose rows are in host memory; results are the same bit for bit.

    Lookups without gradients, as in evaluations, read rows over the bus in place, because an
    evaluation may read more rows than the device can hold.

    Attributes:
        table_RV: the rows in host memory. Call ``synchronize`` before the host reads or writes
            them, or the moments.
    """

    tier = "host"

    def __init__(
        self,
        table_RV: Tensor,
        device: torch.device,
        streams: StreamPair,
        lock: Callable[[Tensor], PageLock | None],
    ) -> None:
        """Page-lock ``table_RV`` by ``lock``, and train it on ``device``."""
        super().__init__(table_RV)
        self._lock, self._streams = lock, streams
        self._locks = [lock(table_RV)]
        self._working = WorkingRows(table_RV, device, streams)

    def new_moments(self, *, is_row_wise: bool, dtype: torch.dtype) -> AdamMoments:
        if is_row_wise:  # one number per row, small enough for the device
            second_R = torch.zeros(self.num_rows, device=self._working.device)
            return AdamMoments(None, second_R)
        moments = super().new_moments(is_row_wise=False, dtype=dtype)
        in_host_memory = [one for one in moments if one is not None]
        self._locks += [self._lock(one) for one in in_host_memory]
        self._working.add_moments(in_host_memory)
        return moments

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> ReadyLookup:
        self.count(rows_THK.numel(), layer)
        if not torch.is_grad_enabled():
            return self._in_place(operations.gather_rows, rows_THK, weights_THK)
        return self._fetched(self.read, rows_THK, weights_THK)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> ReadyLookup:
        self.count(rows_THK.numel(), layer)
        if not torch.is_grad_enabled():
            return self._in_place(operations.row_dots, rows_THK, x_TV)
        return self._fetched(self.dots, rows_THK, x_TV)

    def gather(self, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        working = self._working
        return operations.gather_rows(working.rows_PV, working.places(rows_THK), weights_THK)

    def row_dots(self, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        working = self._working
        return operations.row_dots(working.rows_PV, working.places(rows_THK), x_TV)

    def record(self, reads: TableReads) -> None:
        # no lookup of this forward pass waits for rows any more
        self._working.fetch_moments()
        super().record(reads)

    def update(
        self, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
    ) -> None:
        working, rows_U = self._working, groups.rows_U
        places_U = working.begin_update(rows_U)
        # the order of the groups stays that of the rows, so the results do too
        placed = replace(groups, rows_U=places_U)
        if moments.first_RV is None:
            second_P = moments.second.new_zeros(len(working.rows_PV))
            second_P[places_U] = moments.second[rows_U]
            copies = AdamMoments(None, second_P)
        else:
            copies = AdamMoments(*working.moments)
        operations.sparse_adam(working.rows_PV, copies, placed, grad_TV, step)
        if moments.first_RV is None:
            moments.second[rows_U] = copies.second[places_U]
        working.end_update(rows_U, places_U)

    def synchronize(self) -> None:
        """Wait until the updated rows and moments are in host memory."""
        self._working.synchronize()

    def _in_place(
        self, read: Callable[[Tensor, Tensor, Tensor], Tensor], rows_THK: Tensor, operand: Tensor
    ) -> ReadyLookup:
        def finish() -> Tensor:
            self._working.join()
            return read(self.table_RV, rows_THK, operand)

        return ReadyLookup(finish)

    def _fetched(
        self, read: Callable[[Tensor, Tensor], Tensor], rows_THK: Tensor, operand: Tensor
    ) -> ReadyLookup:
        are_here = self._working.fetch(rows_THK)

        def finish() -> Tensor:
            self._streams.caller().wait(are_here)
            return read(rows_THK, operand)

        return ReadyLookup(finish)


def trained_host_table(table_RV: Tensor, device: torch.device) -> TrainedHostTable:
    """Page-lock rows in place and return a table that trains on ``device``, a GPU.

    Raises:
        ValueError: the device is not a GPU, or the rows are not contiguous fp32 on the CPU.
        PageLockError: the rows cannot be page-locked.
    """
    if device.type != "cuda":
        raise ValueError(f"host memory needs a GPU that reads it, not {device}")
    return TrainedHostTable(
        table_RV, device, cuda_streams(device), partial(PageLock, device=device)
    )
