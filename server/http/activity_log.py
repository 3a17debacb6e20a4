"""Periodic log lines of throughput, queue lengths and cache hits while the server is busy."""

import asyncio
import logging
import time
from collections.abc import Callable

from engine.request import EngineStatistics
from memory_ops.tables.table_statistics import TableStatistics
from server.http.table_gains import TableGains

logger = logging.getLogger(__name__)


class ActivityLog:
    """Sums the engine's step statistics from one log line to the next."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``say`` prints a line; ``clock`` returns seconds."""
        self._say = say
        self._clock = clock
        self._table_gains = TableGains()
        self._last = EngineStatistics()
        self._rows = TableStatistics()
        self._begin()

    def observe_step(self, statistics: EngineStatistics) -> None:
        """Add the statistics of one step."""
        self._last = statistics
        self._computed += statistics.step_tokens
        self._generated += statistics.new_tokens
        gains = self._table_gains.since(statistics.tables)
        self._rows = TableStatistics.sum([self._rows, *(gained for _, gained in gains)])

    async def run(self, every_s: float) -> None:
        """Print a line every ``every_s`` seconds until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                self.report()
            except Exception:  # one failed line must not stop the later ones
                logger.exception("writing the throughput line failed")

    def report(self) -> None:
        """Print a line about the time since the last call, unless the server was idle."""
        last, elapsed_s = self._last, max(self._clock() - self._start, 1e-9)
        if self._computed or last.num_running or last.num_waiting:
            used = last.kv_blocks_used / max(last.kv_blocks_total, 1)
            self._say(
                f"{last.num_running} running, {last.num_waiting} waiting, {used:.1%} of KV blocks"
                f" used; tokens/s: {self._computed / elapsed_s:.1f} computed,"
                f" {self._generated / elapsed_s:.1f} generated{self._tables(elapsed_s)}"
            )
        self._begin()

    def _tables(self, elapsed_s: float) -> str:
        if not self._rows.unique_rows:
            return ""
        hit_rate = self._rows.hits / self._rows.unique_rows
        # the engine reads the counters only now and then, so a wait can fall into the next line
        stalled = min(1.0, self._rows.stall_seconds / elapsed_s)
        return f"; table rows: {hit_rate:.1%} cache hits, {stalled:.1%} of the time stalled"

    def _begin(self) -> None:
        self._start = self._clock()
        self._computed = self._generated = 0
        self._rows = TableStatistics()
