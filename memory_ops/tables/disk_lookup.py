"""A read of a table whose rows are fetched from its file, part by part where memory is small."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from memory_ops.checks import Table
from memory_ops.native.disk_rows import DiskRows
from memory_ops.native.row_fetcher import NO_ROOM
from memory_ops.tables.value_table import TableReadError

Operation = Callable[[Table, Tensor, Tensor], Tensor]


class SlotTable(Protocol):
    """What a lookup needs of its table: what finds and reads rows, and the slots that get them."""

    rows: DiskRows
    slots: Table

    def check_file(self) -> None: ...
    def read_error(self, row: int, error: int) -> TableReadError: ...
    def tell(self) -> None: ...


class DiskLookup:
    """Reads under way, of as many tokens as memory has room for; ``finish`` reads for the others.

    What is not finished gives its room back when it is forgotten.
    """

    def __init__(
        self,
        table: SlotTable,
        rows_THK: Tensor,
        operand: Tensor,
        layer: int,
        operation: Operation,
    ) -> None:
        self._table = table  # which must not be closed before
        self._rows_THK = rows_THK.contiguous()
        self._slots_THK = torch.empty_like(self._rows_THK)
        self._operand, self._layer, self._operation = operand, layer, operation
        self._first = self._count = 0
        self._begin()

    def finish(self) -> Tensor:
        """Wait for the rows and return what they give, in fp32 (fp64 for fp64).

        Raises:
            TableReadError: a row could not be read, or there is no room for those of one token.
        """
        try:
            parts = [self._part()]
            while self._first < len(self._rows_THK):
                self._begin()
                if not self._count:
                    row = int(self._rows_THK[self._first].flatten()[0])
                    raise self._table.read_error(row, NO_ROOM)
                parts.append(self._part())
        finally:
            self._release()
        self._table.check_file()
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __del__(self) -> None:
        self._release()

    def _begin(self) -> None:
        rows, slots = (part[self._first :].flatten(1) for part in (self._rows_THK, self._slots_THK))
        self._count = self._table.rows.start(
            rows, slots, is_new=self._first == 0, layer=self._layer
        )

    def _part(self) -> Tensor:
        part = slice(self._first, self._first + self._count)
        slots_THK = self._slots_THK[part]
        wrong = self._table.rows.finish(slots_THK, layer=self._layer, on_progress=self._table.tell)
        if wrong is not None:
            index, error = wrong
            raise self._table.read_error(int(self._rows_THK[part].flatten()[index]), error)
        out = self._operation(self._table.slots, slots_THK, self._operand[part])
        self._release()
        self._first = part.stop
        self._table.tell()
        return out

    def _release(self) -> None:
        count, self._count = self._count, 0
        if count:
            self._table.rows.release(self._slots_THK[self._first : self._first + count])
