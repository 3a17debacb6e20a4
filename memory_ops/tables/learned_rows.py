"""A value table in memory with trainable deltas of chosen rows; the rows themselves are frozen."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memory_ops.tables.device import DeviceTable, ReadyLookup
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.trained import TrainedTable


class LearnedRows:
    """A table whose chosen rows have deltas: lookups give ``sum w (row + delta)``.

    Lookups are differentiable in the weights. The deltas record their reads for a sparse
    optimiser, as a ``TrainedTable`` does.

    Attributes:
        rows_P: int64 ids of the chosen rows, ascending.
        deltas: ``[P + 1, V]``, fp32. All other rows read the last one with weight 0: it stays 0.
    """

    tier = "device"
    fault = None
    fetched_capacity = None

    def __init__(self, base: DeviceTable, rows_P: Tensor) -> None:
        """Begin with deltas of 0.

        Raises:
            ValueError: no row is given, or the ids do not ascend or are not in the table.
        """
        in_table = len(rows_P) and int(rows_P[0]) >= 0 and int(rows_P[-1]) < base.num_rows
        if not in_table or not bool((rows_P.diff() > 0).all()):
            raise ValueError(f"rows: expected ascending ids below {base.num_rows}, at least one")
        self._base, self.rows_P = base, rows_P
        self.deltas = TrainedTable(torch.zeros(len(rows_P) + 1, base.value_dim))
        # the place of each row in the deltas
        self._places_R = torch.full((base.num_rows,), len(rows_P), dtype=torch.int32)
        self._places_R[rows_P] = torch.arange(len(rows_P), dtype=torch.int32)

    @property
    def num_rows(self) -> int:
        return self._base.num_rows

    @property
    def value_dim(self) -> int:
        return self._base.value_dim

    def row_source(self, layer: int) -> None:
        """None: native kernels record no reads for gradients."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> ReadyLookup:
        base = self._base.start(rows_THK, weights_THK, layer)
        places_THK = self._places_R[rows_THK].long()
        is_chosen_THK = places_THK < len(self.rows_P)
        change = self.deltas.start(places_THK, weights_THK * is_chosen_THK, layer)
        return ReadyLookup(lambda: base.finish() + change.finish())

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> ReadyLookup:
        """Raise ValueError: only PEER reads so, which is not linear in its rows."""
        raise ValueError("rows of a PEER layer cannot be learned: its output is not linear in them")

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Does nothing: all rows are in memory."""

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Does nothing: no lookup waits."""

    def statistics(self) -> Mapping[int, TableStatistics]:
        return self._base.statistics()
