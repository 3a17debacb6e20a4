"""Value tables of both GPU tiers that read the rows of a replay; they import triton."""

import torch
from torch import Tensor

from benchmarks.gpu.row_replay import RowReplay
from memory_ops.checks import Table
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.host import HostLookup, HostTable
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.streams import cuda_streams
from memory_ops.tables.value_table import Lookup

_WAYS, _OVERFLOW = 16, 2**14
_WAY_BYTES = 16  # bookkeeping


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
        memory = rows_memory(rows)
        row_bytes = memory.shape[1] * memory.itemsize
        sets = max(1, round(len(memory) * cached_share / _WAYS))
        cache_bytes = _OVERFLOW * row_bytes + sets * _WAYS * (row_bytes + _WAY_BYTES)
        cache = RowCache(
            rows,
            cache_bytes,
            device,
            num_layers=num_layers,
            num_ways=_WAYS,
            num_overflow=_OVERFLOW,
        )
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
