"""The device tier: every row in the memory of the device that runs the model."""

from dataclasses import dataclass

from torch import Tensor

import memory_ops
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import Lookup


class DeviceTable:
    """A value table held as one tensor, the trainer's ``Parameter`` included."""

    def __init__(self, table_RV: Tensor) -> None:
        """Hold ``table_RV``, ``[R, V]``, without copying it.

        Raises:
            ValueError: the tensor is not a floating-point matrix.
        """
        if table_RV.dim() != 2 or not table_RV.is_floating_point():
            found = f"{table_RV.dtype} {tuple(table_RV.shape)}"
            raise ValueError(f"table: expected a floating-point [R, V] tensor, got {found}")
        self.table_RV = table_RV
        self._statistics = TableStatistics()

    @property
    def num_rows(self) -> int:
        return self.table_RV.shape[0]

    @property
    def value_dim(self) -> int:
        return self.table_RV.shape[1]

    def start(self, rows_THK: Tensor, weights_THK: Tensor) -> Lookup:
        self.count(rows_THK)
        return DeviceLookup(self.table_RV, rows_THK, weights_THK)

    def count(self, rows_THK: Tensor) -> None:
        """Count a lookup as ``start`` does; for who reads these rows of ``table_RV`` itself."""
        self._statistics = self._statistics.after(rows_THK)

    def hint(self, rows: Tensor) -> None:
        """Nothing to do: the rows are already where they are read."""

    def statistics(self) -> TableStatistics:
        return self._statistics


@dataclass(frozen=True)
class DeviceLookup:
    """A read of rows that need no fetching: the gather itself runs in ``finish``."""

    table_RV: Tensor
    rows_THK: Tensor
    weights_THK: Tensor

    def finish(self) -> Tensor:
        return memory_ops.gather_rows(self.table_RV, self.rows_THK, self.weights_THK)
