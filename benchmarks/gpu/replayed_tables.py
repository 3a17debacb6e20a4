"""Value tables of all GPU tiers that read the rows of a replay; they import triton."""

import torch
from torch import Tensor

from benchmarks.gpu.row_replay import RowReplay
from benchmarks.memory_variant import MEMORY_LAYERS
from engine.executors.cuda.micro_batches import HINTS_PER_LAYER
from memory_ops.checks import Table
from memory_ops.page_lock import PageLock
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.gpu_disk import GpuDiskTable
from memory_ops.tables.gpu_disk_lookup import GpuDiskLookup
from memory_ops.tables.host import HostLookup, HostTable
from memory_ops.tables.host_cache_size import NUM_WAYS, host_cache_bytes
from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.streams import cuda_streams
from memory_ops.tables.value_table import Lookup


class ReplayedDeviceTable(DeviceTable):
    """A table in device memory."""

    def __init__(self, rows: Table, replay: RowReplay) -> None:
        super().__init__(rows)
        self._replay = replay

    def row_source(self, layer: int) -> None:
        """None: the layer must call ``start``."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> Lookup:
        return super().start(self._replay.rows(len(rows_THK), layer), weights_THK, layer)


class ReplayedHostTable(HostTable):
    """A table in host memory, whose pages the caller has locked."""

    def __init__(
        self,
        rows: Table,
        cached_share: float,
        device: torch.device,
        num_layers: int,
        replay: RowReplay,
    ) -> None:
        """Make a cache for this fraction of the rows; 0 makes the smallest one.

        Raises:
            ValueError: the cache cannot be allocated.
        """
        num_rows = len(rows_memory(rows))
        cache = _cache(rows, num_rows, cached_share, device, num_layers)
        super().__init__(rows, cache, cuda_streams(device))
        self._replay = replay

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> HostLookup:
        return super().start(self._replay.rows(len(rows_THK), layer), weights_THK, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        super().hint(self._replay.predicted(rows, layer), layer)

    def warm(self, rows_THK: Tensor, layer: int) -> None:
        """Read rows into the cache, as a lookup of the layer does."""
        weights_THK = torch.ones(rows_THK.shape, device=rows_THK.device)
        super().start(rows_THK, weights_THK, layer).finish()


class ReplayedDiskTable(GpuDiskTable):
    """A table in a file, with caches in the device's memory and in host memory."""

    def __init__(
        self,
        disk: DiskTable,
        cached_share: float,
        device: torch.device,
        num_layers: int,
        replay: RowReplay,
        lock: PageLock | None,
        *,
        is_whole: bool = False,
    ) -> None:
        """Make a cache on the device for this fraction of the rows.

        ``lock`` is that of the slots. With ``is_whole``, steps never run as micro-batches.

        Raises:
            ValueError: the cache cannot be allocated.
        """
        cache = _cache(disk.slots, disk.num_rows, cached_share, device, num_layers)
        caller = cuda_streams(device).caller
        num_hints = MEMORY_LAYERS * HINTS_PER_LAYER
        super().__init__(disk, cache, caller, HostCalls(), num_hints=num_hints, lock=lock)
        self._replay, self._is_whole = replay, is_whole

    @property
    def fetched_capacity(self) -> int:
        # only steps whose rows fit are split
        return 1 if self._is_whole else super().fetched_capacity

    @property
    def rows(self) -> Table:
        """The slots, whose rows have the size of all rows."""
        return self.disk.slots

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> GpuDiskLookup:
        return super().start(self._replay.rows(len(rows_THK), layer), weights_THK, layer)

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        super().hint(self._replay.predicted(rows, layer), layer)

    def warm(self, rows_THK: Tensor, layer: int) -> None:
        """Read rows into the caches, as a lookup of the layer does."""
        weights_THK = torch.ones(rows_THK.shape, device=rows_THK.device)
        super().start(rows_THK, weights_THK, layer).finish()


def _cache(
    table: Table, num_rows: int, cached_share: float, device: torch.device, num_layers: int
) -> RowCache:
    """A cache for a fraction of ``num_rows``, of the rows of ``table``."""
    memory = rows_memory(table)
    row_bytes = memory.shape[1] * memory.itemsize
    cached = max(1, round(num_rows * cached_share / NUM_WAYS)) * NUM_WAYS
    cache_bytes = host_cache_bytes(cached, row_bytes)
    return RowCache(table, cache_bytes, device, num_layers=num_layers, num_rows=num_rows)
