"""Usage statistics of a value table: fraction of rows read, and entropy of the reads."""

import math

import torch

from memory_ops.sparse_adam import RowGroups


class TableUsage:
    """Read counts of each row since the last summary.

    Attributes:
        counts_R: int64 reads of each row.
    """

    def __init__(self, num_rows: int) -> None:
        self.counts_R = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, groups: RowGroups) -> None:
        """Add the reads of a step."""
        self.counts_R[groups.rows_U.cpu()] += groups.starts_U1.diff().cpu()

    def summary(self) -> dict[str, float]:
        """Return ``share``, the fraction of rows read, and ``entropy`` of the reads; reset counts.

        Entropy is relative to a uniform distribution: 1 is uniform, 0 is a single row.
        """
        counts = self.counts_R[self.counts_R > 0].double()
        share = len(counts) / len(self.counts_R)
        shares = counts / counts.sum()
        entropy = float(-(shares * shares.log()).sum())
        uniform = math.log(len(self.counts_R))
        self.counts_R.zero_()
        return {"share": share, "entropy": entropy / uniform if uniform else 1.0}
