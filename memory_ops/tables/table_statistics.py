"""Counters of a value table's lookups: rows, cache hits, bytes read and stalls."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import Any


def _counter(meaning: str) -> Any:
    return field(default=0, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TableStatistics:
    """Totals over lookups. In the device tier all but the first two are 0.

    This is the only list of the counters: the disk tier's library fills them in this order. The
    server exports a metric for each field that has a ``meaning`` in its metadata.
    """

    requested_rows: int = _counter("row ids looked up, repeats included")
    lookups: int = 0  # one lookup covers all tokens of one layer's step
    unique_rows: int = _counter("distinct rows per lookup, summed over lookups")
    hits: int = _counter("unique rows that were in memory")
    late: int = _counter("unique rows whose fetch was already in flight")
    misses: int = _counter("unique rows that had to be fetched")
    bytes_read: int = _counter("bytes read from the slower tier")
    prefetched: int = _counter("rows prefetched by hints, by the layer of the hint")
    prefetched_used: int = _counter(
        "prefetched rows that lookups used, late ones included, by the layer of the lookup"
    )
    stall_seconds: float = _counter("seconds spent waiting for rows")

    @classmethod
    def sum(cls, parts: Iterable["TableStatistics"]) -> "TableStatistics":
        """The sum over several layers or tables."""
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    def since(self, before: "TableStatistics") -> "TableStatistics":
        """The difference to earlier totals."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return TableStatistics(*(now - then for now, then in pairs))
