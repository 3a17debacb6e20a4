"""Counts of what a value table was asked for, and of what that cost."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class TableStatistics:
    """Totals of some lookups. In the device tier all but the first two are 0.

    Attributes:
        requested_rows: row ids of lookups, repeats included.
        lookups: of all their tokens.
        unique_rows: of these rows, each counted once a lookup.
        hits: unique rows that were in memory.
        late: unique rows that were being fetched already.
        misses: unique rows that had to be fetched.
        bytes_read: from where the rows lie.
        prefetched: rows fetched for hints.
        prefetched_used: of these, that a lookup then wanted; late ones too.
        stall_seconds: waited for rows.
    """

    requested_rows: int = 0
    lookups: int = 0
    unique_rows: int = 0
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
