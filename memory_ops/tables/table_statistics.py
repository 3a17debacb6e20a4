"""Counts of what a value table was asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableStatistics:
    """Totals since the table was made.

    Attributes:
        rows_requested: row ids given to ``start``, repeats included.
        lookups: calls of ``start``.
    """

    rows_requested: int = 0
    lookups: int = 0
