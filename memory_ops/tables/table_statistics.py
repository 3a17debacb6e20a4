"""Counts of what a value table was asked for, and of what that cost."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class TableStatistics:
    """Totals since the table was made. In the device tier all but the first two are 0.

    Attributes:
        rows_requested: row ids given to ``start``, repeats included.
        lookups: calls of ``start``.
        unique: of these rows, each counted once a lookup.
        hits: unique rows that were in memory.
        late: unique rows that were being fetched already.
        misses: unique rows that had to be fetched.
        bytes_read: from where the rows lie.
        prefetched: rows fetched for hints.
        prefetched_used: of these, that a lookup wanted before they were given up.
        stall_seconds: waited for rows.
    """

    rows_requested: int = 0
    lookups: int = 0
    unique: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    bytes_read: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    stall_seconds: float = 0.0

    def after(self, rows_THK: Tensor) -> "TableStatistics":
        """The totals after one lookup more, of these rows."""
        return replace(
            self,
            rows_requested=self.rows_requested + rows_THK.numel(),
            lookups=self.lookups + 1,
        )
