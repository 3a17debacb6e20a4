"""The disk tier of a GPU: row caches in the GPU's memory and in host memory, in front of a file.

All calls must use one stream, which orders lookups, so there is no side stream. The host waits once
in each part of a lookup, for the row ids; see ``staged_rows``. The kernels that the caller launches
between ``start`` and ``finish`` run while the host waits for the first part and reads its rows.

A CUDA graph can capture lookups and hints only in pieces, between which the host works: see
``HostCalls.capture``. Call ``recover`` before each step.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memory_ops.checks import check_no_gradient, check_rows, check_vectors
from memory_ops.page_lock import PageLock, check_gpu
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.gpu_disk_lookup import GpuDiskLookup, ReadPart, StagedParts
from memory_ops.tables.host_cache_size import NUM_OVERFLOW
from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.staged_rows import StagedRows, pinned_ids
from memory_ops.tables.streams import CudaStream, Stream
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels.gather_rows import gather_rows_into
from memory_ops.triton_kernels.row_dots import row_dots_into
from memory_ops.triton_kernels.table_view import value_kind

# row ids of one hint; the rest is ignored
_MOST_HINTED = 2**12


class GpuDiskTable:
    """A value table in a file, whose rows a GPU reads through two caches.

    Lookups block the host until their rows are read, and must not overlap.

    Attributes:
        disk: the file, and the cache in page-locked host memory.
        calls: runs the host's part of lookups; all tables of a model share it.
    """

    tier = "disk"

    def __init__(
        self,
        disk: DiskTable,
        cache: RowCache,
        stream: Callable[[], Stream],
        calls: HostCalls,
        *,
        num_hints: int = 1,
        most_references: int = NUM_OVERFLOW,
        lock: PageLock | None = None,
    ) -> None:
        """Read ``disk`` through ``cache``, whose table are the disk's slots; see
        ``gpu_disk_table``.

        The table takes ownership of disk, cache and lock.

        Args:
            stream: the current stream, always the same.
            num_hints: the most hints of a step. Those of a step use different page-locked buffers,
                32 KiB each, also those of a graph. A step with more of them may prefetch rows
                that it has not asked for.
            most_references: overflow rows of the cache.
        """
        self.disk, self.calls = disk, calls
        self._cache, self._stream, self._lock = cache, stream, lock
        self._staged = StagedRows(disk, cache, stream, most_references)
        self._hinted_BL = pinned_ids((num_hints, _MOST_HINTED), cache.device)
        self._next_hint = 0

    @property
    def num_rows(self) -> int:
        return self.disk.num_rows

    @property
    def value_dim(self) -> int:
        return self.disk.value_dim

    @property
    def fault(self) -> str | None:
        return self.disk.fault

    @property
    def fetched_capacity(self) -> int:
        return self.disk.num_slots

    def row_source(self, layer: int) -> None:
        """None: native CPU kernels cannot use the GPU's cache."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> GpuDiskLookup:
        """Start a lookup; see ``ValueTable.start``.

        Raises:
            ValueError: the operands do not match each other or the cache's device, need a gradient,
                the layer is outside the cache's layers, or an earlier lookup is not finished.
        """
        check_rows(self._cache.memory, rows_THK, weights_THK)
        check_no_gradient("weights", weights_THK, "on disk")
        out_TV = rows_THK.new_empty((len(rows_THK), self.value_dim), dtype=torch.float32)

        def read(part: slice, places_THK: Tensor) -> None:
            gather_rows_into(out_TV[part], self._cache.memory, places_THK, weights_THK[part])

        return self._lookup(rows_THK, layer, read, out_TV)

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> GpuDiskLookup:
        """Start a lookup; see ``ValueTable.start_dots``. Raises ValueError like ``start``."""
        check_vectors(self._cache.memory, rows_THK, x_TV)
        value_kind("x", x_TV)
        check_no_gradient("x", x_TV, "on disk")
        dots_THK = torch.empty(rows_THK.shape, dtype=torch.float32, device=rows_THK.device)

        def read(part: slice, places_THK: Tensor) -> None:
            row_dots_into(dots_THK[part], self._cache.memory, places_THK, x_TV[part])

        return self._lookup(rows_THK, layer, read, dots_THK)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Read rows into host memory that may soon be read, int64 of any shape, up to 4,096.

        The host learns the row ids during the next lookup of any table that shares ``calls``.

        Raises:
            ValueError: the rows have another dtype or device, or the layer is outside the cache's
                layers.
        """
        if rows.dtype is not torch.int64:
            raise ValueError(f"rows: expected int64 row ids, got {rows.dtype}")
        self._cache.check_hint(rows, layer)
        found_L = self._hinted_BL[self._next_hint, : min(rows.numel(), _MOST_HINTED)]
        self._next_hint = (self._next_hint + 1) % len(self._hinted_BL)

        def prefetch() -> None:
            copied = self._stream().record()

            def read() -> None:
                copied.synchronize()
                self.disk.hint(found_L, layer)

            self.calls.delay(read)

        wanted_L = rows.flatten()[: len(found_L)]
        self._stream().run(lambda: _copy(found_L, wanted_L))
        self.calls.call(prefetch)

    def fill_cache(self, rows: Tensor, layer: int = 0) -> None:
        """Read int64 row ids ``[L]``, most read first, into unused host memory, and wait."""
        self.disk.fill_cache(rows)

    def recover(self) -> None:
        """Forget what a failed step left: call it before each step.

        A step may fail after the cache got places for rows that the host then could not read.
        """
        self.calls.drop_delayed()
        self._staged.recover()

    def watch(self, on_progress: Callable[[], None]) -> None:
        self.disk.watch(on_progress)

    def statistics(self) -> Mapping[int, TableStatistics]:
        """Totals by layer; hits are rows that were in the GPU's memory or in host memory."""
        return self._staged.statistics()

    def close(self) -> None:
        """Wait for the device and the reads in flight, then unlock the memory and close the file.

        Raises:
            PageLockError: the memory cannot be unlocked.
        """
        try:
            try:
                self._staged.release()
            finally:
                if self._lock is not None:
                    self._lock.close()
        finally:
            self.disk.close()

    def _lookup(
        self, rows_THK: Tensor, layer: int, read: ReadPart, result: Tensor
    ) -> GpuDiskLookup:
        self._cache.check_lookup(rows_THK, layer)
        if self._staged.is_unfinished and not self.calls.is_capturing:
            raise ValueError("lookup: finish the earlier lookup of this table first, or recover")
        parts = list(self._cache.parts(rows_THK)) if rows_THK.numel() else []
        staged = StagedParts(self._staged, self._stream, self.calls, rows_THK, layer)
        return GpuDiskLookup(staged, parts, read, result)


def gpu_disk_table(
    disk: DiskTable,
    cache_bytes: int,
    device: torch.device,
    calls: HostCalls,
    *,
    num_layers: int = 1,
    num_hints: int = 1,
) -> GpuDiskTable:
    """Page-lock the slots of a disk table and return a table that ``device`` reads.

    Args:
        disk: a table of fp32, fp16 or bf16 rows, or of records.
        cache_bytes: device memory for the cache of rows in use; see ``RowCache``.
        device: a GPU.
        calls: shared by all tables of a model.
        num_layers: number of layers whose lookups are counted.
        num_hints: the most hints of a step.

    Raises:
        ValueError: the GPU does not exist, the rows are fp64, or ``cache_bytes`` is too small or
            cannot be allocated.
        PageLockError: the slots cannot be page-locked.
    """
    check_gpu("disk", device)
    cache = RowCache(disk.slots, cache_bytes, device, num_layers=num_layers, num_rows=disk.num_rows)
    lock = PageLock(rows_memory(disk.slots), device)

    def current() -> Stream:
        return CudaStream(torch.cuda.current_stream(device))

    return GpuDiskTable(disk, cache, current, calls, num_hints=num_hints, lock=lock)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
