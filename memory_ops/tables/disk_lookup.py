"""A lookup in a disk table, split into parts if its rows do not fit in memory at once."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from memory_ops.checks import Table
from memory_ops.native.disk_rows import DiskRows
from memory_ops.native.row_fetcher import ReadFailure
from memory_ops.tables.value_table import TableReadError

Operation = Callable[[Table, Tensor, Tensor], Tensor]


class SlotTable(Protocol):
    """The parts of a disk table that a lookup uses: its reader, its cache slots and its checks."""

    rows: DiskRows
    slots: Table

    def check_file(self) -> None: ...
    def read_error(self, row: int, error: int) -> TableReadError: ...
    def report_progress(self) -> None: ...


class DiskLookup:
    """A lookup in flight: reads the rows of as many tokens as fit in memory, ``finish`` the rest.

    The native lookup splits the tokens and pins slots. Deleting an unfinished lookup unpins them.
    """

    def __init__(
        self,
        table: SlotTable,
        rows_THK: Tensor,
        operand: Tensor,
        layer: int,
        operation: Operation,
    ) -> None:
        self._handle: int | None = None
        self._table = table  # keeps the table open
        self._rows_THK = rows_THK.contiguous()
        self._slots_THK = torch.empty_like(self._rows_THK)
        self._operand, self._operation = operand, operation
        rows_TL, slots_TL = self._rows_THK.flatten(1), self._slots_THK.flatten(1)
        self._handle = table.rows.start(rows_TL, slots_TL, layer=layer)

    def finish(self) -> Tensor:
        """Wait for the rows and return the result, in fp32 (fp64 for an fp64 table).

        Raises:
            TableReadError: a row could not be read, or one token's rows do not fit in memory.
        """
        try:
            outs = [
                self._operation(self._table.slots, self._slots_THK[part], self._operand[part])
                for part in self._parts()
            ]
        finally:
            self._drop()
        self._table.check_file()
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def __del__(self) -> None:
        self._drop()

    def _parts(self) -> Iterator[slice]:
        """Ranges of tokens whose rows are in their slots, each until the next one is requested."""
        assert self._handle is not None, "a lookup is finished once"
        first = 0
        while True:
            last = self._table.rows.next_part(self._handle, self._table.report_progress)
            if isinstance(last, ReadFailure):
                raise self._table.read_error(last.row, last.error)
            yield slice(first, last)
            self._table.report_progress()
            if last == len(self._rows_THK):
                return
            first = last

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._table.rows.drop(handle)
