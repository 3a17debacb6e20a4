"""Counts of what a value table was asked for, and of what that cost."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import Any


def _counter(meaning: str) -> Any:
    return field(default=0, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TableStatistics:
    """Totals of some lookups. In the device tier all but the first two are 0.

    This is the only list of the counters: the disk tier's library fills them in this order, and
    the server makes a metric of each that has a ``meaning`` in its field's metadata.
    """

    requested_rows: int = _counter("row ids looked up, repeats included")
    lookups: int = 0  # each of all tokens of a layer's step
    unique_rows: int = _counter("rows looked up, each once a lookup")
    hits: int = _counter("unique rows that were in memory")
    late: int = _counter("unique rows that were being fetched already")
    misses: int = _counter("unique rows that had to be fetched")
    bytes_read: int = _counter("bytes read from where the rows lie")
    prefetched: int = _counter("rows that hints had fetched, by the layer hinted for")
    prefetched_used: int = _counter(
        "of these, wanted at last, late ones too, by the layer that read"
    )
    stall_seconds: float = _counter("seconds waited for rows")

    @classmethod
    def sum(cls, parts: Iterable["TableStatistics"]) -> "TableStatistics":
        """Of several layers, or tables."""
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    def since(self, before: "TableStatistics") -> "TableStatistics":
        """What has been added to earlier totals."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return TableStatistics(*(now - then for now, then in pairs))
