"""How much of a value table is read: the share of its rows, and how evenly."""

import math

import torch

from memory_ops.sparse_adam import RowGroups


class TableUsage:
    """Counts of reads by row, since the last summary."""

    def __init__(self, num_rows: int) -> None:
        self._counts_R = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, groups: RowGroups) -> None:
        """Count these reads."""
        self._counts_R[groups.rows_U.cpu()] += groups.starts_U1.diff().cpu()

    def summary(self) -> dict[str, float]:
        """``share`` of the rows that were read, and ``entropy`` of the reads, then begin anew.

        The entropy is relative to that of reads which are spread evenly: 1 is even, 0 is one row.
        """
        counts = self._counts_R[self._counts_R > 0].double()
        share = len(counts) / len(self._counts_R)
        shares = counts / counts.sum()
        entropy = float(-(shares * shares.log()).sum())
        most = math.log(len(self._counts_R))
        self._counts_R.zero_()
        return {"share": share, "entropy": entropy / most if most else 1.0}
