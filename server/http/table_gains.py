"""What value tables were asked for since the last look, from totals that may begin anew."""

from engine.request import TableCounts

TABLE_LABELS = ("table", "tier", "layer")
TABLE_COUNTS = {
    "requested_rows": "row ids looked up, repeats included",
    "unique_rows": "rows looked up, each once a lookup",
    "hits": "unique rows that were in memory",
    "misses": "unique rows that had to be fetched",
    "late": "unique rows that were being fetched already",
    "bytes_read": "bytes read from where the rows lie",
    "prefetched": "rows that hints had fetched, by the layer hinted for",
    "prefetched_used": "of these, wanted at last, late ones too, by the layer that read",
    "stall_seconds": "seconds waited for rows",
}


Labels = tuple[str, ...]


class TableGains:
    """Differences of totals; those of an engine that was started again begin at zero."""

    def __init__(self) -> None:
        self._seen: dict[Labels, TableCounts] = {}

    def since(
        self, tables: tuple[TableCounts, ...] | None
    ) -> list[tuple[Labels, dict[str, float]]]:
        """By labels, what each of ``TABLE_COUNTS`` has gained; nothing where there was no look.

        No tables at all, as told when an engine ends, are what those of the next begin from. So is
        zero where a total is below what was seen: gains are never negative.
        """
        if tables is None:
            return []
        before, self._seen = self._seen, {}
        gains: list[tuple[Labels, dict[str, float]]] = []
        for counts in tables:
            labels = (counts.table, counts.tier, str(counts.layer))
            gains.append((labels, _gained(counts, before.get(labels))))
            self._seen[labels] = counts
        return gains


def _gained(counts: TableCounts, seen: TableCounts | None) -> dict[str, float]:
    totals = {name: getattr(counts, name) for name in TABLE_COUNTS}
    if seen is None or any(total < getattr(seen, name) for name, total in totals.items()):
        return totals
    return {name: total - getattr(seen, name) for name, total in totals.items()}
