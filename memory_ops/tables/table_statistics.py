"""Counts of what a value table was asked for, and of what that cost."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class TableStatistics:
    """Totals of some lookups. In the device tier all but the first two are 0.

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

    @classmethod
    def sum(cls, parts: Iterable["TableStatistics"]) -> "TableStatistics":
        """Of several layers, or tables."""
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))
