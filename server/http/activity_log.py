"""The line that says, now and then while there is work, what the server is doing."""

import asyncio
import logging
import time
from collections.abc import Callable

from engine.request import EngineStatistics
from memory_ops.tables.table_statistics import TableStatistics
from server.http.table_gains import TableGains

logger = logging.getLogger(__name__)


class ActivityLog:
    """Sums up the engine's steps between two lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``say`` prints a line, ``clock`` tells seconds."""
        self._say = say
        self._clock = clock
        self._table_gains = TableGains()
        self._last = EngineStatistics()
        self._rows = TableStatistics()
        self._begin()

    def observe_step(self, statistics: EngineStatistics) -> None:
        """Take over what the engine tells after a step."""
        self._last = statistics
        self._computed += statistics.step_tokens
        self._generated += statistics.new_tokens
        gains = self._table_gains.since(statistics.tables)
        self._rows = TableStatistics.sum([self._rows, *(gained for _, gained in gains)])

    async def run(self, every_s: float) -> None:
        """Tell every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                self.tell()
            except Exception:  # one line that cannot be said is not the end of all others
                logger.exception("what is done could not be told")

    def tell(self) -> None:
        """Say what was done since the last call, if anything was."""
        last, elapsed_s = self._last, max(self._clock() - self._start, 1e-9)
        if self._computed or last.num_running or last.num_waiting:
            used = last.kv_blocks_used / max(last.kv_blocks_total, 1)
            self._say(
                f"{last.num_running} running, {last.num_waiting} waiting, {used:.1%} of KV blocks"
                f" used; tokens a second: {self._computed / elapsed_s:.1f} computed,"
                f" {self._generated / elapsed_s:.1f} generated{self._tables(elapsed_s)}"
            )
        self._begin()

    def _tables(self, elapsed_s: float) -> str:
        if not self._rows.unique_rows:
            return ""
        found = self._rows.hits / self._rows.unique_rows
        # tables are looked at now and then, so that a wait may be told of in the next line
        stalled = min(1.0, self._rows.stall_seconds / elapsed_s)
        return f"; table rows: {found:.1%} were in memory, {stalled:.1%} of the time waited for"

    def _begin(self) -> None:
        self._start = self._clock()
        self._computed = self._generated = 0
        self._rows = TableStatistics()
