"""Sparse Adam for value tables: the cost of a step depends only on the rows that were read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.sparse_adam import AdamStep, RowGroups
from memory_ops.tables.trained import TrainedTable
from weights.training.replicas import Replicas
from weights.training.table_usage import RowUse


class TableOptimizer:
    """torch.optim.SparseAdam for tables that record their reads; no weight decay.

    Row-wise, it keeps one moment per row instead of two per value: a third of the total memory.
    With moments in bf16, the total is two thirds.

    Attributes:
        moments: moments of each table.
        step_count: steps done.
        used: rows that the last step updated here, and their reads, per table; None if it read
            none.
    """

    def __init__(
        self,
        tables: Sequence[TrainedTable],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        is_row_wise: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        replicas: Replicas | None = None,
    ) -> None:
        """Create moments of 0, whose pages take no memory before their first use.

        ``moment_dtype`` is for two moments per value, fp32 or bf16; others are fp32.
        """
        self._tables = tuple(tables)
        self._replicas = replicas or Replicas()
        self._betas, self._eps, self._is_row_wise = betas, eps, is_row_wise
        self._gradients: list[tuple[RowGroups, Tensor] | None] | None = None
        self.moments = [
            table.new_moments(is_row_wise=is_row_wise, dtype=moment_dtype) for table in tables
        ]
        self.step_count = 0
        self.used: list[RowUse | None] = [None for _ in tables]

    def collect(self) -> float:
        """Take the tables' gradients for the next step; return their squared norm."""
        assert self._gradients is None, "collect was called twice without a step"
        self._gradients = [self._grouped(table) for table in self._tables]
        whole = divided = 0.0
        for table, one in zip(self._tables, self._gradients, strict=True):
            square = 0.0 if one is None else operations.squared_norm(*one)
            if table.shard is None:
                whole += square
            else:
                divided += square
        if any(table.shard is not None for table in self._tables):
            (divided,) = self._replicas.sum_numbers(divided)
        return whole + divided

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Apply the collected gradients, multiplied by ``scale`` for clipping."""
        self.step_count += 1
        step = AdamStep.at(
            self.step_count, lr, self._betas, self._eps, scale=scale, is_row_wise=self._is_row_wise
        )
        assert self._gradients is not None, "step was called without collect"
        for table, moments, gradient in zip(
            self._tables, self.moments, self._gradients, strict=True
        ):
            if gradient is not None:
                table.update(moments, *gradient, step)
        self.used = [
            None if one is None else RowUse(one[0].rows_U, table.read_counts(one[0]))
            for table, one in zip(self._tables, self._gradients, strict=True)
        ]
        self._gradients = None

    def _grouped(self, table: TrainedTable) -> tuple[RowGroups, Tensor] | None:
        reads = table.take_reads()
        if reads is None:
            return None
        if table.shard is None:  # else the table has exchanged them
            reads = self._replicas.gather(reads)
        return operations.group_rows(reads.rows_THK, reads.weights_THK), reads.grad_TV
