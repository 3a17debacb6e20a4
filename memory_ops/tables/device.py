"""The device tier: every row in the memory of the device that runs the model."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from memory_ops import operations
from memory_ops.checks import Table, table_shape
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import Lookup, RowSource, TableReadError


class DeviceTable:
    """A value table in the device's memory, as a tensor or as records.

    Attributes:
        rows: ``[R, V]``, or R records of V values.
    """

    tier = "device"
    fault = None
    fetched_capacity = None

    def __init__(self, rows: Table) -> None:
        """Hold the rows without copying them.

        Raises:
            ValueError: they are neither a floating-point matrix nor records.
        """
        self._num_rows, self._value_dim = table_shape(rows)
        self.rows = rows
        self._num_lookups: Counter[int] = Counter()
        self._num_requested: Counter[int] = Counter()

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def value_dim(self) -> int:
        return self._value_dim

    def row_source(self, layer: int) -> RowSource | None:
        return RowsInPlace(self, layer)

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        self.count(rows_THK.numel(), layer)
        return ReadyLookup(partial(operations.gather_rows, self.rows, rows_THK, weights_THK))

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        self.count(rows_THK.numel(), layer)
        return ReadyLookup(partial(operations.row_dots, self.rows, rows_THK, x_TV))

    def count(self, num_references: int, layer: int) -> None:
        """Count a lookup of that many row ids by a kernel that read the rows without ``start``."""
        self._num_lookups[layer] += 1
        self._num_requested[layer] += num_references

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Does nothing: no row needs fetching."""

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Does nothing: no lookup waits."""

    def statistics(self) -> Mapping[int, TableStatistics]:
        return {
            layer: TableStatistics(self._num_requested[layer], lookups)
            for layer, lookups in self._num_lookups.items()
        }


@dataclass(frozen=True)
class RowsInPlace:
    """The rows of a device table, for native kernels; no row is ever fetched."""

    table: DeviceTable
    layer: int

    @property
    def rows(self) -> Table:
        return self.table.rows

    @property
    def fetcher_address(self) -> None:
        return None

    def check(self) -> None:
        """Does nothing: there is no file."""

    def read_error(self, row: int, error: int) -> TableReadError:
        raise AssertionError(f"row {row}: a device table fetches no rows (error {error})")

    def count(self, rows_THK: Tensor) -> None:
        self.table.count(rows_THK.numel(), self.layer)


class ReadyLookup(NamedTuple):
    """A lookup that fetches nothing: it runs in ``finish``."""

    read: Callable[[], Tensor]

    def finish(self) -> Tensor:
        return self.read()
