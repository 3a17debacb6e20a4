"""A trained table divided by columns: each process computes its columns of all lookups.

This is the parallel memory of "Memory Layers at Scale" (arXiv 2412.09764).
"""

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups
from memory_ops.tables.sharded import ShardedTable
from memory_ops.tables.trained import TableReads


class ColumnShardedTable(ShardedTable):
    """A lookup sends row ids and weights to all processes, and gets its sums' columns back.

    The backward pass sends the gradients' columns. So every process sees the reads of all
    processes, and updates its columns of all rows that they read.
    """

    def gather(self, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        rows, weights = self._of_all(rows_THK), self._of_all(weights_THK)
        out_TV = operations.gather_rows(self.table_RV, torch.cat(rows), torch.cat(weights))
        return self._returned_columns(out_TV, [len(one) for one in rows])

    def row_dots(self, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        rows = self._of_all(rows_THK)
        lengths = [len(one) for one in rows]
        own_TV = self._own_columns(x_TV, lengths)
        dots_THK = operations.row_dots(self.table_RV, torch.cat(rows), own_TV)
        return self._returned_sums(dots_THK, lengths)

    def read_backward(self, reads: TableReads, *, needs_weights: bool) -> Tensor | None:
        whole, lengths = self._whole(reads)
        self.record(whole)
        if not needs_weights:
            return None
        dots_THK = operations.row_dots(self.table_RV, whole.rows_THK, whole.grad_TV)
        return self._returned_sums(dots_THK, lengths)

    def dots_backward(self, reads: TableReads, *, needs_vectors: bool) -> Tensor | None:
        whole, lengths = self._whole(reads)
        self.record(whole)
        if not needs_vectors:
            return None
        sums_TV = operations.gather_rows(self.table_RV, whole.rows_THK, whole.weights_THK)
        return self._returned_columns(sums_TV, lengths)

    def update(
        self, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
    ) -> None:
        """A step of Adam; the mean square of a row's gradient is that of all its columns."""
        if moments.first_RV is not None:
            super().update(moments, groups, grad_TV, step)
            return
        second_R, rows_U = moments.second, groups.rows_U
        assert len(groups.tokens_L) == len(rows_U)  # take_reads has summed them
        grad_UV = grad_TV[groups.tokens_L] * step.scale
        squares_U = grad_UV.square().sum(dim=1)
        self.exchange.sum_in_place([squares_U])
        mean_U = squares_U / self.value_dim
        second_R[rows_U] = step.beta2 * second_R[rows_U] + (1 - step.beta2) * mean_U
        roots_U1 = (second_R[rows_U].sqrt() + step.eps).unsqueeze(1)
        self.table_RV[rows_U] -= step.step_size * grad_UV / roots_U1

    def _whole(self, reads: TableReads) -> tuple[TableReads, list[int]]:
        """The reads of all processes, with this one's columns, and the tokens of each process."""
        rows, weights = self._of_all(reads.rows_THK), self._of_all(reads.weights_THK)
        lengths = [len(one) for one in rows]
        own_TV = self._own_columns(reads.grad_TV, lengths)
        return TableReads(torch.cat(rows), torch.cat(weights), own_TV), lengths

    def _of_all(self, part_THK: Tensor) -> list[Tensor]:
        return self.exchange.gather_parts(part_THK)

    def _own_columns(self, values_TV: Tensor, lengths: list[int]) -> Tensor:
        """This process's columns of the vectors of all tokens, from all columns of its tokens."""
        shapes = [(length, self.shard.size) for length in lengths]
        return torch.cat(
            self.exchange.swap(torch.split(values_TV, self.shard.sizes, dim=1), shapes)
        )

    def _returned_columns(self, values_TV: Tensor, lengths: list[int]) -> Tensor:
        """All columns of this process's tokens, from its columns of all tokens."""
        own = lengths[self.exchange.rank]
        shapes = [(own, size) for size in self.shard.sizes]
        return torch.cat(self.exchange.swap(torch.split(values_TV, lengths), shapes), dim=1)

    def _returned_sums(self, partial_THK: Tensor, lengths: list[int]) -> Tensor:
        """Sums over all columns for this process's tokens, from partial sums for all tokens."""
        own = (lengths[self.exchange.rank], *partial_THK.shape[1:])
        parts = self.exchange.swap(torch.split(partial_THK, lengths), [own] * self.exchange.count)
        return torch.stack(parts).sum(dim=0)
