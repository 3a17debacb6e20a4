"""The protocol by which a memory layer reads a value table, whatever tier holds its rows."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from memory_ops.checks import Table
from memory_ops.tables.table_statistics import TableStatistics


class TableReadError(RuntimeError):
    """Rows could not be read: the message names the file and why."""


class Lookup(Protocol):
    """A read under way. ``finish`` is called once."""

    def finish(self) -> Tensor:
        """Wait for the rows and return what they give, in fp32 (fp64 for fp64).

        Raises:
            TableReadError: a row could not be read, or there is no room for those of one token.
        """
        ...


class RowSource(Protocol):
    """Rows of one table that native CPU kernels read themselves, for the lookups of one layer."""

    @property
    def rows(self) -> Table:
        """All rows of the table, or the slots that rows are fetched into."""
        ...

    @property
    def fetcher_address(self) -> int | None:
        """The C struct ``RowFetcher`` to call for each lookup; None if every row is in place.

        It is valid as long as the source lives.
        """
        ...

    def check(self) -> None:
        """Raise TableReadError if the file has changed since it was opened."""
        ...

    def read_error(self, row: int, error: int) -> TableReadError:
        """The exception for a row that the fetcher could not read; ``error`` is the fetcher's."""
        ...

    def count(self, rows_THK: Tensor) -> None:
        """Add a kernel's lookup to the statistics; a fetcher counts its lookups itself."""
        ...


class ValueTable(Protocol):
    """R value rows of width V, shared by all memory layers that were given it.

    A layer calls ``start`` as soon as it knows its row ids, works on, then calls ``finish``: a tier
    that must fetch does so in between. Rows do not change while a lookup is under way. ``layer``
    says whose lookup it is; statistics tell layers apart.

    Attributes:
        tier: where the rows lie: ``device``, ``host`` or ``disk``.
    """

    tier: str

    @property
    def fault(self) -> str | None:
        """Why the table is lost, as far as lookups found out; None while rows can be read."""
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
        """Fetched rows that fit in memory at once; None if nothing is fetched."""
        ...

    def row_source(self, layer: int) -> RowSource | None:
        """The rows for native CPU kernels to read; None if only ``start`` can read this table."""
        ...

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        """Begin to read int64 ``rows_THK``, whose weighted sums are ``out_TV``; returns at once."""
        ...

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        """Begin to read rows, whose products with each token's ``x`` are ``dots_THK``; likewise."""
        ...

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Say that these int64 row ids may soon be read. Never blocks; a tier may ignore it."""
        ...

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Have this called now and then while a lookup that takes long gets on."""
        ...

    def statistics(self) -> Mapping[int, TableStatistics]:
        """Totals since the table was made, by layer."""
        ...
