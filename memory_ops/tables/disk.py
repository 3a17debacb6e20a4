"""The disk tier: rows in the checkpoint's own file, those that are used often in memory."""

import ctypes
import errno
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
from memory_ops.native.disk_rows import DiskRows, ReadFault, RowFile
from memory_ops.native.row_fetcher import NO_ROOM, ON_PROGRESS, OUTSIDE
from memory_ops.row_formats import RowFormat, RowRecords, row_bytes
from memory_ops.tables.disk_lookup import DiskLookup, Operation
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.tables.value_table import TableReadError

_DEPTH = 256  # reads under way; whoever hands a kernel's queue more than that waits for it
_THREADS = 16  # where the kernel has no io_uring
_ALIGNMENTS = (512, 4096)
_MOST_SLOTS = 2**31 - 2
# of a slot, beside its row: where it is, and whose it is
_SLOT_BYTES = 40

logger = logging.getLogger(__name__)


class DiskTable:
    """A value table of a file, read by many direct reads at once, never by page faults.

    Attributes:
        file: where they lie.
        num_slots: rows that memory is for.
        slots: these rows.
        rows: what finds and reads them.
        place: where the file has them.
        on_progress: ``tell``, for a fetcher to call.
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
    ) -> None:
        """Open the file; nothing is read.

        Args:
            file: holds the rows, one behind another.
            offset: of the first, in bytes.
            shape: R and V.
            row_format: their dtype, or that of their records.
            cache_bytes: memory for rows, and to choose those that stay: ``row_cache_bytes``.
            is_direct: read past the page cache, by O_DIRECT.
            threads: that read; 0 for io_uring, or 16 of them where the kernel has none.
            fault: a fault to be injected.

        Raises:
            TableReadError: the file cannot be opened so, or is too short.
            ValueError: ``cache_bytes`` are not enough for one row, or more than there are.
        """
        self.num_rows, self.value_dim = shape
        self.file = file
        size = _row_size(row_format, shape[1])
        least = row_cache_bytes(1, size, self.num_rows)
        if cache_bytes < least:
            raise ValueError(f"table_cache: {cache_bytes} bytes are less than {least}, for one row")
        room = (cache_bytes - least) // (size + _SLOT_BYTES) + 1
        self.num_slots = min(room, self.num_rows, _MOST_SLOTS)
        self._descriptor, alignment = _open(file, is_direct)
        try:
            self._state = self._file_state()
            if offset + self.num_rows * size > self._state[0]:
                raise TableReadError(f"{file}: ends before the last row")
            memory = anonymous_zeros((self.num_slots, size), torch.uint8)
            self.place = RowFile(self._descriptor, offset, self.num_rows, size, alignment)
            self.rows = _disk_rows(self.place, memory, threads, fault)
        except OSError as error:
            os.close(self._descriptor)
            taken = row_cache_bytes(self.num_slots, size, self.num_rows)
            raise ValueError(f"table_cache: no {taken} bytes: {error.strerror}") from None
        except TableReadError:
            os.close(self._descriptor)
            raise
        self.slots = _as_table(memory, row_format, shape[1])
        self._watchers: list[Callable[[], None]] = []
        self.on_progress = ON_PROGRESS(partial(_tell, self._watchers))

    def close(self) -> None:
        """Wait for the reads that are under way, and give the file up."""
        self.rows.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

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

    def watch(self, on_progress: Callable[[], None]) -> None:
        self._watchers.append(on_progress)

    def tell(self) -> None:
        """Tell who watches that a lookup gets on."""
        _tell(self._watchers)

    def statistics(self) -> Mapping[int, TableStatistics]:
        return {
            layer: counts
            for layer, counts in self.rows.counts().items()
            if counts != TableStatistics()
        }

    def _lookup(
        self, rows_THK: Tensor, operand: Tensor, layer: int, operation: Operation
    ) -> DiskLookup:
        self.check_file()
        return DiskLookup(self, rows_THK, operand, layer, operation)

    def read_error(self, row: int, error: int) -> TableReadError:
        if error == NO_ROOM:
            return TableReadError(f"{self.file}: no room in memory for one token's rows")
        if error == OUTSIDE:
            return TableReadError(f"{self.file}: row {row} is outside the table")
        why = os.strerror(error) if error else "the file ends before it"
        return TableReadError(f"{self.file}: row {row}: {why}")

    def check_file(self) -> None:
        if self._file_state() != self._state:
            raise TableReadError(f"{self.file}: was changed since it was opened")

    def _file_state(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns


class FetchedRows:
    """The slots of a disk table, for native kernels, and the fetcher that reads rows into them."""

    def __init__(self, table: DiskTable, layer: int) -> None:
        self._table, self.rows = table, table.slots
        self._fetcher = table.rows.fetcher(layer, table.on_progress)
        self.fetcher_address = ctypes.addressof(self._fetcher)

    def check(self) -> None:
        self._table.check_file()

    def read_error(self, row: int, error: int) -> TableReadError:
        return self._table.read_error(row, error)

    def count(self, rows_THK: Tensor) -> None:
        """Nothing to do: the fetcher counts its lookups."""


def row_cache_bytes(num_slots: int, row_size: int, num_rows: int) -> int:
    """The memory that it takes to hold so many rows, and to count the uses of all of a table's."""
    return num_slots * (row_size + _SLOT_BYTES) + num_rows


def _tell(watchers: list[Callable[[], None]]) -> None:
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


def _open(file: Path, is_direct: bool) -> tuple[int, int]:
    """A descriptor, and what offsets and sizes of its reads must be multiples of."""
    try:
        descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if is_direct else 0))
    except OSError as error:
        if is_direct and error.errno == errno.EINVAL:
            logger.warning(
                "%s: its filesystem has no direct reads: the page cache takes part", file
            )
            return _open(file, is_direct=False)
        raise TableReadError(f"{file}: {error.strerror}") from None
    if not is_direct:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor, 1
    memory = anonymous_zeros((_ALIGNMENTS[-1],), torch.uint8).numpy().data
    for alignment in _ALIGNMENTS:
        try:
            os.preadv(descriptor, [memory[:alignment]], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                continue
            os.close(descriptor)
            raise TableReadError(f"{file}: {error.strerror}") from None
        return descriptor, alignment
    os.close(descriptor)
    most = _ALIGNMENTS[-1]
    raise TableReadError(f"{file}: its filesystem has no direct reads of {most} bytes")


def _disk_rows(place: RowFile, memory: Tensor, threads: int, fault: ReadFault | None) -> DiskRows:
    def made(threads: int) -> DiskRows:
        return DiskRows(place, memory, depth=_DEPTH, threads=threads, fault=fault)

    try:
        return made(threads)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return made(_THREADS)
