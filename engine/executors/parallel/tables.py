"""Value tables that tensor-parallel ranks share: by columns of every row, or by whole rows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from engine.executors.parallel.collectives import Collectives
from engine.executors.parallel.shares import RankShare
from memory_ops import operations
from memory_ops.tables.device import DeviceTable, ReadyLookup
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import Lookup, RowSource, ValueTable


class _Joined(NamedTuple):
    """A lookup of this rank's part, which ``join`` completes with those of the other ranks."""

    lookup: Lookup
    join: Callable[[Tensor], Tensor]

    def finish(self) -> Tensor:
        return self.join(self.lookup.finish())


class SharedTable:
    """A table of which this rank has a part in its device's memory.

    All ranks start and finish the same lookups in the same order. The result of ``start`` has this
    rank's columns ``[T, V / size]`` of the weighted sum; that of ``start_dots`` is whole. The
    statistics count the lookups of the whole table.
    """

    tier = "device"
    fault = None
    fetched_capacity = None

    def __init__(self, part: DeviceTable, share: RankShare, group: Collectives) -> None:
        """Take over this rank's part: its columns of all rows, or its rows."""
        assert share.config.memory is not None
        self._part, self._share, self._group = part, share, group
        self._memory = share.config.memory

    @property
    def num_rows(self) -> int:
        return self._memory.num_rows

    @property
    def value_dim(self) -> int:
        return self._memory.value_dim

    def row_source(self, layer: int) -> RowSource | None:
        # kernels that read rows themselves would miss those of the other ranks
        return None

    def count(self, num_references: int, layer: int) -> None:
        """Count a lookup of that many row ids that a graph replays: it does not call ``start``."""
        self._part.count(num_references, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Does nothing: no row needs fetching."""

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Does nothing: no lookup waits for a disk."""

    def statistics(self) -> Mapping[int, TableStatistics]:
        return self._part.statistics()


class CapturedPart(DeviceTable):
    """A rank's part of a table whose lookups graphs capture; it leaves counting to the executor."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        return ReadyLookup(partial(operations.gather_rows, self.rows, rows_THK, weights_THK))

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        return ReadyLookup(partial(operations.row_dots, self.rows, rows_THK, x_TV))


class ColumnTable(SharedTable):
    """Each rank reads its columns of every row, as in arXiv 2412.09764, section 3.2."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        return self._part.start(rows_THK, weights_THK, layer)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        columns = self._share.value_columns
        x_TC = x_TV[:, columns.start : columns.stop].contiguous()
        return _Joined(self._part.start_dots(rows_THK, x_TC, layer), self._group.sum)


class RowTable(SharedTable):
    """Each rank reads the rows that it owns; then each gets its columns of the sum of all rows."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        own_THK, is_own_THK = self._own(rows_THK)
        lookup = self._part.start(own_THK, weights_THK * is_own_THK, layer)
        return _Joined(lookup, self._group.exchange_columns)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> Lookup:
        own_THK, is_own_THK = self._own(rows_THK)
        lookup = self._part.start_dots(own_THK, x_TV, layer)
        return _Joined(lookup, lambda dots_THK: self._group.sum(dots_THK * is_own_THK))

    def _own(self, rows_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the rows in this rank's part, and whether it has them; 0 if it has not."""
        owned = self._share.table_rows
        is_own_THK = (rows_THK >= owned.start) & (rows_THK < owned.stop)
        return (rows_THK - owned.start) * is_own_THK, is_own_THK


def shared_table(part: DeviceTable, share: RankShare, group: Collectives) -> ValueTable:
    """The table of which this rank has a part, split as ``share`` says."""
    kind = ColumnTable if share.table_sharding == "columns" else RowTable
    return kind(part, share, group)
