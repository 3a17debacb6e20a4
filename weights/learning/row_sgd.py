"""SGD without momentum for value tables; updates only the rows that were read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.tables.trained import TrainedTable


class RowSgd:
    """SGD without momentum, with the methods of ``TableOptimizer``.

    Attributes:
        moments: no moments of any table.
        step_count: steps done.
    """

    def __init__(self, tables: Sequence[TrainedTable]) -> None:
        self._tables = tuple(tables)
        self._gradients: list[tuple[Tensor, Tensor] | None] | None = None
        self.moments: list[tuple[Tensor, ...]] = [() for _ in tables]
        self.step_count = 0

    @torch.no_grad()
    def collect(self) -> float:
        """Take the tables' gradients for the next step; return their squared norm."""
        assert self._gradients is None, "collect was called twice without a step"
        self._gradients = []
        for table in self._tables:
            reads = table.take_reads()
            gradient = None if reads is None else operations.row_gradients(*reads)
            self._gradients.append(gradient)
        return sum(float(one[1].double().square().sum()) for one in self._gradients if one)

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Apply the collected gradients, multiplied by ``scale`` for clipping."""
        self.step_count += 1
        assert self._gradients is not None, "step was called without collect"
        for table, gradient in zip(self._tables, self._gradients, strict=True):
            if gradient is not None:
                rows_U, sums_UV = gradient
                table.table_RV.index_add_(0, rows_U, sums_UV, alpha=-lr * scale)
        self._gradients = None
