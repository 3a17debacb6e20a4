"""Lookup counts of a model's value tables, read at most once a second, and their faults."""

import time
from collections.abc import Callable, Mapping

from engine.request import TableCounts
from memory_ops.tables.value_table import ValueTable

EVERY_S = 1.0


class TableCounter:
    """Reads the counts of a model's tables, at most once a second while there is work."""

    def __init__(
        self, tables: Mapping[str, ValueTable], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Count a model's tables, given by name; ``clock`` returns seconds."""
        self._tables = tables
        self._clock = clock
        self._next = clock()

    def take(self, is_idle: bool) -> tuple[TableCounts, ...] | None:
        """Totals by table and layer; None if it is too soon and another step will follow."""
        now = self._clock()
        if now < self._next and not is_idle:
            return None
        self._next = now + EVERY_S
        return tuple(
            TableCounts(name, table.tier, layer, totals)
            for name, table in self._tables.items()
            for layer, totals in sorted(table.statistics().items())
        )

    def faults(self) -> tuple[str, ...]:
        """The faults of the tables that can no longer be read."""
        # a fault may be a native call: ask each table once
        faults = (table.fault for table in self._tables.values())
        return tuple(fault for fault in faults if fault is not None)
