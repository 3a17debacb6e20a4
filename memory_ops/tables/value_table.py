"""The protocol by which a memory layer reads a value table, whatever tier holds its rows."""

from typing import Protocol

from torch import Tensor

from memory_ops.tables.table_statistics import TableStatistics


class Lookup(Protocol):
    """A read under way. ``finish`` is called once."""

    def finish(self) -> Tensor:
        """Wait for the rows and return their weighted sums, ``out_TV`` in fp32 (fp64 for fp64)."""
        ...


class ValueTable(Protocol):
    """R value rows of width V, shared by all memory layers that were given it.

    A layer calls ``start`` as soon as it knows its row ids, works on, then calls ``finish``: a tier
    that must fetch does so in between. Rows do not change while a lookup is under way.
    """

    @property
    def num_rows(self) -> int:
        """R."""
        ...

    @property
    def value_dim(self) -> int:
        """V."""
        ...

    def start(self, rows_THK: Tensor, weights_THK: Tensor) -> Lookup:
        """Begin the weighted read of int64 ``rows_THK``; returns at once."""
        ...

    def hint(self, rows: Tensor) -> None:
        """Say that these int64 row ids may soon be read. Never blocks; a tier may ignore it."""
        ...

    def statistics(self) -> TableStatistics:
        """Totals since the table was made."""
        ...
