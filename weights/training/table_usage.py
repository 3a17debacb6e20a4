"""Usage statistics of a value table: fraction of rows read, and entropy of the reads."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weights.training.replicas import Replicas


class RowUse(NamedTuple):
    """Distinct rows ``rows_U`` of a table, or of a process's part, and reads of each, int64."""

    rows_U: Tensor
    counts_U: Tensor


class TableUsage:
    """Read counts of each row since the last summary.

    Attributes:
        counts_R: int64 reads of each row, or of each row that this process holds.
    """

    def __init__(
        self, num_rows: int, num_counted: int | None = None, replicas: Replicas | None = None
    ) -> None:
        """Count the reads of a table's rows.

        Args:
            num_rows: rows of the table.
            num_counted: rows of the part that this process counts; None counts all.
            replicas: the processes that count the other rows; None if there are none.
        """
        self._num_rows = num_rows
        self._replicas = replicas or Replicas()
        self.counts_R = torch.zeros(num_counted or num_rows, dtype=torch.int64)

    def add(self, use: RowUse) -> None:
        """Add the reads of a step."""
        self.counts_R[use.rows_U.cpu()] += use.counts_U.cpu()

    def summary(self) -> dict[str, float]:
        """Return ``share``, the fraction of rows read, and ``entropy`` of the reads; reset counts.

        Entropy is relative to a uniform distribution: 1 is uniform, 0 is a single row. All
        processes that count rows of the table must call this.
        """
        counts = self.counts_R[self.counts_R > 0].double()
        used, total = self._replicas.sum_numbers(len(counts), float(counts.sum()))
        shares = counts / total
        (entropy,) = self._replicas.sum_numbers(float(-(shares * shares.log()).sum()))
        uniform = math.log(self._num_rows)
        self.counts_R.zero_()
        share = used / self._num_rows
        return {"share": share, "entropy": entropy / uniform if uniform else 1.0}
