"""The protocol through which memory layers read a value table, the same for every tier."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from memory_ops.checks import Table
from memory_ops.tables.table_statistics import TableStatistics


class TableReadError(RuntimeError):
    """Rows could not be read: the message gives the file and the reason."""


class Lookup(Protocol):
    """A lookup in flight. Callers call ``finish`` once."""

    def finish(self) -> Tensor:
        """Wait for the rows and return the result, in fp32 (fp64 for an fp64 table).

        Raises:
            TableReadError: a row could not be read, or one token's rows do not fit in memory.
        """
        ...


class RowSource(Protocol):
    """Direct access to a table's rows for native CPU kernels, for the lookups of one layer."""

    @property
    def rows(self) -> Table:
        """All rows of the table, or the cache slots that receive fetched rows."""
        ...

    @property
    def fetcher_address(self) -> int | None:
        """Address of the C struct ``RowFetcher`` to call per lookup; None if no row is fetched.

        It is valid as long as the source lives.
        """
        ...

    def check(self) -> None:
        """Raise TableReadError if the file has changed since it was opened."""
        ...

    def read_error(self, row: int, error: int) -> TableReadError:
        """The exception for a row that the fetcher could not read, from the fetcher's ``error``."""
        ...

    def count(self, rows_THK: Tensor) -> None:
        """Add a kernel's lookup to the statistics; does nothing if a fetcher counts lookups."""
        ...


class ValueTable(Protocol):
    """R value rows of width V, shared by all memory layers that use this table.

    A layer calls ``start`` as soon as it knows its row ids, computes something else, then calls
    ``finish``. Slower tiers fetch rows meanwhile. Rows do not change while a lookup is in flight.
    ``layer`` is the layer whose statistics count the lookup.

    Attributes:
        tier: where the rows are stored: ``device``, ``host`` or ``disk``.
    """

    tier: str

    @property
    def fault(self) -> str | None:
        """The reason why the table is lost, set by a failed lookup; None if rows can be read."""
        ...

    @property
    def num_rows(self) -> int:
        """R."""
        ...

    @property
    def value_dim(self) -> int:
        """V."""
        ...

    @property
    def fetched_capacity(self) -> int | None:
        """Number of fetched rows that fit in memory; None if no row is ever fetched."""
        ...

    def row_source(self, layer: int) -> RowSource | None:
        """The rows for native CPU kernels; None if only ``start`` can read this table."""
        ...

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        """Start a lookup whose result is the weighted sum ``out_TV`` of rows. Does not block."""
        ...

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        """Start a lookup whose result is ``dots_THK``, each row's inner product with ``x``."""
        ...

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Prefetch int64 row ids that may soon be read. Never blocks; a tier may ignore it."""
        ...

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Call ``on_progress`` repeatedly while a slow lookup makes progress."""
        ...

    def statistics(self) -> Mapping[int, TableStatistics]:
        """Totals since the table was created, by layer."""
        ...
