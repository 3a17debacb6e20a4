"""Base of trained tables of which each process of a group holds a part."""

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.sparse_adam import RowGroups
from memory_ops.tables.exchange import Exchange
from memory_ops.tables.table_shard import TableShard
from memory_ops.tables.trained import TableReads, TrainedTable


class ShardedTable(TrainedTable):
    """A trained table whose lookups are collective: all processes make the same ones in order.

    A process without tokens makes them too. Before a step, reads are summed into one gradient per
    row, so ``take_reads`` is collective as well.

    Attributes:
        table_RV: this process's part of the rows, fp32.
        shard: the part.
    """

    shard: TableShard

    def __init__(self, table_RV: Tensor, shard: TableShard, exchange: Exchange) -> None:
        """Hold ``table_RV``, the part ``shard``, without copying it.

        Raises:
            ValueError: the tensor is not a contiguous fp32 matrix of the part's shape.
        """
        super().__init__(table_RV)
        if tuple(table_RV.shape) != shard.local_shape:
            found = tuple(table_RV.shape)
            raise ValueError(f"table: expected a part of shape {shard.local_shape}, got {found}")
        self.shard, self.exchange = shard, exchange
        # reads behind each gradient that the last take_reads returned
        self._counts_L = torch.empty(0, dtype=torch.int64)

    @property
    def num_rows(self) -> int:
        return self.shard.shape[0]

    @property
    def value_dim(self) -> int:
        return self.shard.shape[1]

    def take_reads(self) -> TableReads | None:
        """Remove all recorded reads; return the summed gradients of this process's part.

        Each read is one row of ``table_RV`` by its place there, with weight 1.
        """
        reads = super().take_reads()
        if reads is None:
            return None
        rows_U, sums_UV = operations.row_gradients(*reads)
        counts_U = torch.unique(reads.rows_THK, return_counts=True)[1]
        rows_L, sums_LV, self._counts_L = self.collected(rows_U, sums_UV, counts_U)
        places_L11 = rows_L.view(-1, 1, 1)
        return TableReads(places_L11, torch.ones_like(places_L11, dtype=torch.float32), sums_LV)

    def collected(
        self, rows_U: Tensor, sums_UV: Tensor, counts_U: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the gradients of this process's reads; return those of its part of the table."""
        return rows_U, sums_UV, counts_U

    def read_counts(self, groups: RowGroups) -> Tensor:
        # a read of the groups stands for all reads that were summed into it
        ends_L = self._counts_L[groups.tokens_L].cumsum(0)
        ends_L1 = torch.cat((ends_L.new_zeros(1), ends_L))
        return ends_L1[groups.starts_U1].diff()
