"""A read of a table whose rows are fetched from its file, part by part where memory is small."""

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
    """What a lookup needs of its table: what finds and reads rows, and the slots that get them."""

    rows: DiskRows
    slots: Table

    def check_file(self) -> None: ...
    def read_error(self, row: int, error: int) -> TableReadError: ...
    def tell(self) -> None: ...


class DiskLookup:
    """Reads under way, of as many tokens as memory has room for; ``finish`` reads for the others.

    The native lookup splits and pins. What is not finished is unpinned when it is forgotten.
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
        self._table = table  # which must not be closed before
        self._rows_THK = rows_THK.contiguous()
        self._slots_THK = torch.empty_like(self._rows_THK)
        self._operand, self._operation = operand, operation
        rows_TL, slots_TL = self._rows_THK.flatten(1), self._slots_THK.flatten(1)
        self._handle = table.rows.start(rows_TL, slots_TL, layer=layer)

    def finish(self) -> Tensor:
        """Wait for the rows and return what they give, in fp32 (fp64 for fp64).

        Raises:
            TableReadError: a row could not be read, or there is no room for those of one token.
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
        """Tokens whose rows are in their slots, until the next ones are asked for."""
        assert self._handle is not None, "a lookup is finished once"
        first = 0
        while True:
            last = self._table.rows.next_part(self._handle, self._table.tell)
            if isinstance(last, ReadFailure):
                raise self._table.read_error(last.row, last.error)
            yield slice(first, last)
            self._table.tell()
            if last == len(self._rows_THK):
                return
            first = last

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._table.rows.drop(handle)
