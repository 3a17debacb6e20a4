"""Rows of a large table in page-locked host memory, shared by the tasks that read the table."""

from typing import cast

from benchmarks.drawn_tables import PLAIN, drawn_rows, repeated
from benchmarks.gpu.drawn_models import GPU
from benchmarks.gpu.part import Skipped
from memory_ops.checks import Table
from memory_ops.page_lock import PageLock
from memory_ops.row_formats import ROW_FORMATS, RowFormat, RowRecords, row_bytes
from memory_ops.tables.row_cache import rows_memory
from weights.available_memory import available_memory

# for everything but the table
_RESERVE_BYTES = 8 * 2**30


class HostRows:
    """Keeps the rows of one table at a time."""

    def __init__(self) -> None:
        self._key: tuple[int, str, int] | None = None
        self._rows: Table | None = None
        self._lock: PageLock | None = None

    def get(self, num_rows: int, dtype: str, width: int) -> Table:
        """The rows of such a table; the table of another earlier call is freed.

        Raises:
            Skipped: the machine has too little free memory.
            PageLockError: the memory cannot be locked.
        """
        key = num_rows, dtype, width
        if key != self._key:
            self.close()
            self._check_memory(*key)
            rows_RB = repeated(drawn_rows(dtype, width), num_rows)
            plain = dtype in PLAIN
            self._rows = rows_RB if plain else RowRecords(rows_RB, cast(RowFormat, dtype), width)
            self._lock = PageLock(rows_memory(self._rows), GPU)
            self._key = key
        assert self._rows is not None
        return self._rows

    def close(self) -> None:
        """Unlock and free the rows."""
        lock, self._lock, self._rows, self._key = self._lock, None, None, None
        if lock is not None:
            lock.close()

    def _check_memory(self, num_rows: int, dtype: str, width: int) -> None:
        size = row_bytes(dtype, width) if dtype in ROW_FORMATS else width * PLAIN[dtype].itemsize
        needed, free = num_rows * size + _RESERVE_BYTES, available_memory().num_bytes
        if needed > free:
            gib = f"{needed / 2**30:.0f} GiB of host memory, {free / 2**30:.0f} GiB are free"
            raise Skipped(f"the table and its work need {gib}")
