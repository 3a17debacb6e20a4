"""The disk tier: reads rows from the checkpoint's file and caches the most-used rows in memory."""

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memory_ops import operations
from memory_ops.anonymous import anonymous_zeros
from memory_ops.checks import Table, check_rows, check_vectors
from memory_ops.native.disk_rows import DiskRows, ReadFault, RingError, RowFile
from memory_ops.native.row_fetcher import NO_ROOM, ON_PROGRESS, OUTSIDE
from memory_ops.row_formats import RowFormat, RowRecords, row_bytes
from memory_ops.tables.disk_lookup import DiskLookup, Operation
from memory_ops.tables.table_file import TableFile
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import TableReadError

_DEPTH = 256  # reads in flight; a deeper queue makes the submitting thread wait
_THREADS = 16  # if io_uring is not available
_MOST_SLOTS = 2**31 - 2
_FILLED_TOGETHER = 2**16
# bookkeeping of a slot, in addition to its row
_SLOT_BYTES = 40

logger = logging.getLogger(__name__)


class DiskTable:
    """A value table in a file, read with many concurrent direct reads, never by page faults.

    Attributes:
        file: the file that holds the rows.
        num_slots: number of rows that fit in memory.
        slots: the rows in memory.
        rows: the native reader and cache.
        location: position of the rows in the file.
        on_progress: C callback of ``report_progress``, for row fetchers.
    """

    tier = "disk"

    def __init__(
        self,
        file: Path,
        offset: int,
        shape: tuple[int, int],
        row_format: torch.dtype | RowFormat,
        cache_bytes: int,
        *,
        is_direct: bool = True,
        threads: int = 0,
        fault: ReadFault | None = None,
        checksum: str | None = None,
    ) -> None:
        """Open the file.

        Args:
            file: path of the file that holds the rows contiguously.
            offset: bytes before the first row.
            shape: R and V.
            row_format: the rows' dtype, or the format of their records.
            cache_bytes: memory for cached rows and their use counts; see ``row_cache_bytes``.
            is_direct: bypass the page cache (O_DIRECT) if the filesystem supports it.
            threads: reader threads; 0 uses io_uring, or 16 threads if it is not available.
            fault: faults to inject in tests.
            checksum: SHA-256 of all rows, in hexadecimal digits; see ``TableFile``.

        Raises:
            TableReadError: the file cannot be opened or read, or is too short.
            ValueError: ``cache_bytes`` is too small for one row, or cannot be allocated.
        """
        self.num_rows, self.value_dim = shape
        self.file = file
        size = _row_size(row_format, shape[1])
        least = row_cache_bytes(1, size, self.num_rows)
        if cache_bytes < least:
            needed = f"one row needs at least {least} bytes"
            raise ValueError(f"table_cache: {cache_bytes} bytes are too small: {needed}")
        fitting = (cache_bytes - least) // (size + _SLOT_BYTES) + 1
        self.num_slots = min(fitting, self.num_rows, _MOST_SLOTS)
        num_bytes = self.num_rows * size
        opened = TableFile(file, offset, num_bytes, is_direct=is_direct, checksum=checksum)
        self._table_file = opened
        try:
            memory = anonymous_zeros((self.num_slots, size), torch.uint8)
            self.location = RowFile(
                opened.descriptor, offset, self.num_rows, size, opened.alignment
            )
            self.rows = _disk_rows(self.location, memory, threads, fault)
        except OSError as error:
            opened.close()
            taken = row_cache_bytes(self.num_slots, size, self.num_rows)
            message = f"cannot allocate {taken} bytes: {error.strerror}"
            raise ValueError(f"table_cache: {message}") from None
        self.slots = _as_table(memory, row_format, shape[1])
        self._watchers: list[Callable[[], None]] = []
        self.on_progress = ON_PROGRESS(partial(_call_all, self._watchers))

    def close(self) -> None:
        """Wait for the reads in flight, then close the file."""
        self.rows.close()
        self._table_file.close()

    def __del__(self) -> None:
        if hasattr(self, "rows"):
            self.close()

    @property
    def fetched_capacity(self) -> int:
        return self.num_slots

    def row_source(self, layer: int) -> "FetchedRows":
        return FetchedRows(self, layer)

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> DiskLookup:
        check_rows(self.slots, rows_THK, weights_THK)
        return self._lookup(rows_THK, weights_THK, layer, operations.gather_rows)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> DiskLookup:
        check_vectors(self.slots, rows_THK, x_TV)
        return self._lookup(rows_THK, x_TV, layer, operations.row_dots)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        if rows.dtype is not torch.int64 or not rows.is_cpu:
            raise ValueError(f"rows: expected int64 on the CPU, got {rows.dtype}")
        self.rows.hint(rows.contiguous(), layer=layer)

    def fill_cache(self, rows: Tensor) -> None:
        """Read int64 row ids ``[L]``, most read first, into unused slots; wait for the reads.

        Statistics do not count it. Rows outside the table and rows that cannot be read are skipped.
        """
        # in parts, so that Python handles signals between them
        for part in torch.split(rows[: self.num_slots].contiguous(), _FILLED_TOGETHER):
            self.rows.fill(part)

    def watch(self, on_progress: Callable[[], None]) -> None:
        self._watchers.append(on_progress)

    def report_progress(self) -> None:
        """Call the functions passed to ``watch``: a lookup makes progress."""
        _call_all(self._watchers)

    def statistics(self) -> Mapping[int, TableStatistics]:
        return {
            layer: counts
            for layer, counts in self.rows.counts().items()
            if counts != TableStatistics()
        }

    @property
    def fault(self) -> str | None:
        """The file and the reason why the table is lost; None while rows can be read.

        The table is lost if its contents changed, if the file cannot be examined (see
        ``TableFile``), or if no row can be read any more (see ``DiskRows.lost_error``). A failed
        lookup sets the fault. Changed contents are final; a later successful lookup clears the
        other faults.
        """
        if self._table_file.fault is not None:
            return self._table_file.fault
        error = self.rows.lost_error()
        return None if error is None else f"{self.file}: no row can be read: {_reason(error)}"

    def _lookup(
        self, rows_THK: Tensor, operand: Tensor, layer: int, operation: Operation
    ) -> DiskLookup:
        self.check_file()
        return DiskLookup(self, rows_THK, operand, layer, operation)

    def read_error(self, row: int, error: int) -> TableReadError:
        if error == NO_ROOM:
            return TableReadError(
                f"{self.file}: one token's rows do not fit in memory: increase table_cache"
            )
        if error == OUTSIDE:
            return TableReadError(f"{self.file}: row {row} is outside the table")
        # report a changed file as lost now instead of at the next lookup
        with contextlib.suppress(TableReadError):
            self.check_file()
        return TableReadError(f"{self.file}: row {row}: {_reason(error)}")

    def check_file(self) -> None:
        self._table_file.check(self.report_progress)


class FetchedRows:
    """The cache slots of a disk table, for native kernels, and the fetcher that fills them."""

    def __init__(self, table: DiskTable, layer: int) -> None:
        self._table, self.rows = table, table.slots
        self._fetcher = table.rows.fetcher(layer, table.on_progress)
        self.fetcher_address = ctypes.addressof(self._fetcher)

    def check(self) -> None:
        self._table.check_file()

    def read_error(self, row: int, error: int) -> TableReadError:
        return self._table.read_error(row, error)

    def count(self, rows_THK: Tensor) -> None:
        """Does nothing: the fetcher counts its lookups."""


def row_cache_bytes(num_slots: int, row_size: int, num_rows: int) -> int:
    """Bytes of a cache of ``num_slots`` rows, plus one use counter for each row of the table."""
    return num_slots * (row_size + _SLOT_BYTES) + num_rows


def _reason(error: int) -> str:
    return os.strerror(error) if error else "the file ends before this row"


def _call_all(watchers: list[Callable[[], None]]) -> None:
    for on_progress in watchers:
        on_progress()


def _row_size(row_format: torch.dtype | RowFormat, value_dim: int) -> int:
    if isinstance(row_format, torch.dtype):
        return value_dim * row_format.itemsize
    return row_bytes(row_format, value_dim)


def _as_table(memory: Tensor, row_format: torch.dtype | RowFormat, value_dim: int) -> Table:
    if isinstance(row_format, torch.dtype):
        return memory.view(row_format)
    return RowRecords(memory, row_format, value_dim)


def _disk_rows(
    location: RowFile, memory: Tensor, threads: int, fault: ReadFault | None
) -> DiskRows:
    create = partial(DiskRows, location, memory, depth=_DEPTH, fault=fault)
    try:
        return create(threads=threads)
    except RingError as error:
        _log_threads(error.strerror)
        return create(threads=_THREADS)


@functools.cache  # once a process
def _log_threads(reason: str) -> None:
    logger.warning("no io_uring (%s): %d threads read disk tables instead", reason, _THREADS)
