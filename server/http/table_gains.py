"""Increases of the value tables' counters between two calls, across engine restarts."""

from dataclasses import astuple, fields

from engine.request import TableCounts
from memory_ops.tables.table_statistics import TableStatistics

TABLE_LABELS = ("table", "tier", "layer")
# the meaning of each counter that is a metric
TABLE_COUNTS = {
    counter.name: counter.metadata["meaning"]
    for counter in fields(TableStatistics)
    if counter.metadata
}

Labels = tuple[str, ...]


class TableGains:
    """Computes increases of counter totals; the totals of a restarted engine begin at zero."""

    def __init__(self) -> None:
        self._seen: dict[Labels, TableStatistics] = {}

    def since(self, tables: tuple[TableCounts, ...] | None) -> list[tuple[Labels, TableStatistics]]:
        """(labels, increase of each counter) per table; empty if ``tables`` is None.

        An empty tuple, sent when an engine has died, resets all totals to zero. A total below the
        last one also counts from zero, so that no increase is negative.
        """
        if tables is None:
            return []
        before, self._seen = self._seen, {}
        gains: list[tuple[Labels, TableStatistics]] = []
        for counts in tables:
            labels = (counts.table, counts.tier, str(counts.layer))
            gained = counts.totals.since(before.get(labels, TableStatistics()))
            gains.append((labels, counts.totals if min(astuple(gained)) < 0 else gained))
            self._seen[labels] = counts.totals
        return gains
