"""What value tables were asked for since the last look, from totals that may begin anew."""

from dataclasses import astuple, fields

from engine.request import TableCounts
from memory_ops.tables.table_statistics import TableStatistics

TABLE_LABELS = ("table", "tier", "layer")
# the counters that are metrics, and what they mean
TABLE_COUNTS = {
    counter.name: counter.metadata["meaning"]
    for counter in fields(TableStatistics)
    if counter.metadata
}

Labels = tuple[str, ...]


class TableGains:
    """Differences of totals; those of an engine that was started again begin at zero."""

    def __init__(self) -> None:
        self._seen: dict[Labels, TableStatistics] = {}

    def since(self, tables: tuple[TableCounts, ...] | None) -> list[tuple[Labels, TableStatistics]]:
        """By labels, what each counter has gained; nothing where there was no look.

        No tables at all, as told when an engine ends, are what those of the next begin from. So is
        zero where a total is below what was seen: gains are never negative.
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
