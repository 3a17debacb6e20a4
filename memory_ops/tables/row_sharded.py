"""A trained table divided by rows: each process holds a range of rows, and answers for them."""

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.tables.sharded import ShardedTable


class RowShardedTable(ShardedTable):
    """A lookup asks the owners for its distinct rows; the weighted sums are computed here.

    The backward pass asks for them again, so that no pass keeps copies of rows. Gradients are
    summed per row, and then sent to the owners of the rows, who alone update them.
    """

    def gather(self, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
        rows_UV, places_THK = self._fetched(rows_THK)
        return operations.gather_rows(rows_UV, places_THK, weights_THK)

    def row_dots(self, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
        rows_UV, places_THK = self._fetched(rows_THK)
        return operations.row_dots(rows_UV, places_THK, x_TV)

    def collected(
        self, rows_U: Tensor, sums_UV: Tensor, counts_U: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sent, received = self._counts_by_owner(rows_U)
        width = self.value_dim
        rows = self._swapped(rows_U, sent, [(one,) for one in received])
        sums = self._swapped(sums_UV, sent, [(one, width) for one in received])
        counts = self._swapped(counts_U, sent, [(one,) for one in received])
        return torch.cat(rows) - self.shard.first, torch.cat(sums), torch.cat(counts)

    def _fetched(self, rows_THK: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows of a lookup, ``[U, V]``, and the place of each read among them."""
        rows_U, places_L = torch.unique(rows_THK.flatten(), return_inverse=True)
        sent, received = self._counts_by_owner(rows_U)
        asked = self._swapped(rows_U, sent, [(one,) for one in received])
        answers = [self.table_RV[rows - self.shard.first] for rows in asked]
        shapes = [(one, self.value_dim) for one in sent]
        rows_UV = torch.cat(self.exchange.swap(answers, shapes))
        return rows_UV, places_L.view(rows_THK.shape)

    def _counts_by_owner(self, rows_U: Tensor) -> tuple[list[int], list[int]]:
        """Count the rows that this process asks of each, and those that each asks of this one."""
        bounds = torch.tensor(self.shard.bounds, device=rows_U.device)
        sent: list[int] = torch.searchsorted(rows_U, bounds).diff().tolist()
        return sent, self.exchange.swap_counts(sent)

    def _swapped(
        self, values_U: Tensor, counts: list[int], shapes: list[tuple[int, ...]]
    ) -> list[Tensor]:
        return self.exchange.swap(torch.split(values_U, counts), shapes)
