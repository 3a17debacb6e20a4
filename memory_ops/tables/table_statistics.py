"""Counts of what a value table was asked for."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TableStatistics:
    """Totals since the table was made.

    Attributes:
        rows_requested: row ids given to ``start``, repeats included.
        lookups: calls of ``start``.
    """

    rows_requested: int = 0
    lookups: int = 0

    def after(self, rows_THK: Tensor) -> "TableStatistics":
        """The totals after one lookup more, of these rows."""
        return TableStatistics(self.rows_requested + rows_THK.numel(), self.lookups + 1)
