"""The device tier: every row in the memory of the device that runs the model."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

import memory_ops
from memory_ops.checks import Table, table_shape
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import Lookup


class DeviceTable:
    """A value table held as one tensor, or as records of fewer bits.

    Attributes:
        rows: ``[R, V]``, or R records of V values.
    """

    tier = "device"
    fault = None

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

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        self.count(rows_THK, layer)
        return ReadyLookup(partial(memory_ops.gather_rows, self.rows, rows_THK, weights_THK))

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        self.count(rows_THK, layer)
        return ReadyLookup(partial(memory_ops.row_dots, self.rows, rows_THK, x_TV))

    def count(self, rows_THK: Tensor, layer: int) -> None:
        """Count a lookup as ``start`` does; for who reads ``rows`` itself."""
        self._num_lookups[layer] += 1
        self._num_requested[layer] += rows_THK.numel()

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Nothing to do: the rows are already where they are read."""

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Nothing to do: no lookup waits."""

    def statistics(self) -> Mapping[int, TableStatistics]:
        return {
            layer: TableStatistics(self._num_requested[layer], lookups)
            for layer, lookups in self._num_lookups.items()
        }


class ReadyLookup(NamedTuple):
    """A read of rows that need no fetching: it runs in ``finish``."""

    read: Callable[[], Tensor]

    def finish(self) -> Tensor:
        return self.read()
