"""The host tier: rows in page-locked host memory, read by a GPU that caches the rows in use.

Synchronisation between the caller's stream and a side stream:

* The side stream owns the cache and the counts. It runs whole lookups in order: placement, fetches,
  sums. So a later lookup cannot evict rows that an earlier one still reads, whichever stream called
  it, and evictions need not wait for any caller.
* Each lookup has its own operands and result, which both streams use, and two events. The side
  stream waits until the caller's stream has computed the operands. From ``finish`` on, the caller's
  stream waits for the result.
* The caller's stream owns the memory of operands and result. It may reuse this memory when they are
  freed after ``finish``, because the side stream has finished with them by then. For a hint, or a
  lookup that is never finished, ``Stream.keep`` delays the reuse.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memory_ops.checks import (
    Table,
    check_no_gradient,
    check_rows,
    check_vectors,
    table_shape,
)
from memory_ops.page_lock import PageLock, check_gpu
from memory_ops.tables.device_counts import DeviceCounts
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.streams import Stream, StreamPair, cuda_streams
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels.table_view import value_kind


class HostTable:
    """A value table in host memory; a side stream runs its lookups.

    The host never sees a row id and never waits, except in ``close``. A CUDA graph can capture
    lookups. It can capture a hint if a lookup or a ``join`` follows in the graph.

    A graph replay is ordered only by the stream that it runs on, not by the side stream. So call
    ``join`` on the replay's stream before each replay: it orders the replay after all earlier hints
    and lookups of any caller. Hints and lookups after the replay must come from streams that are
    ordered after it. Replays, also of different graphs, must run one after another.

    Attributes:
        rows: ``[R, V]``, or R records of V values.
    """

    tier = "host"
    fault = None

    def __init__(
        self, rows: Table, cache: RowCache, streams: StreamPair, lock: PageLock | None = None
    ) -> None:
        """Read ``rows`` through ``cache``, which the caller's stream created; see ``host_table``.

        The table takes ownership of cache and lock.
        """
        self._num_rows, self._value_dim = table_shape(rows)
        self.rows = rows
        self._cache, self._streams, self._lock = cache, streams, lock
        self._counts = DeviceCounts(cache.counts)
        # the first lookup may come from another stream than the one that created the cache
        streams.side.wait(streams.caller().record())

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def value_dim(self) -> int:
        return self._value_dim

    @property
    def fetched_capacity(self) -> int:
        return self._cache.capacity

    def row_source(self, layer: int) -> None:
        """None: native CPU kernels cannot use the GPU's cache."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> "HostLookup":
        """Start a lookup; see ``ValueTable.start``. Row ids are not checked.

        Raises:
            ValueError: the operands do not match each other or the cache's device, need a gradient,
                or the layer is outside the cache's layers.
        """
        check_rows(self.rows, rows_THK, weights_THK)
        check_no_gradient("weights", weights_THK, "in host memory")
        self._cache.check_lookup(rows_THK, layer)
        out_TV = _empty((len(rows_THK), self._value_dim), rows_THK)
        operands = (rows_THK, weights_THK)
        return HostLookup(
            self._streams,
            lambda: self._cache.gather_rows(out_TV, *operands, layer),
            out_TV,
            operands,
        )

    def start_dots(self, rows_THK: Tensor, x_TV: Tensor, layer: int = 0) -> "HostLookup":
        """Start a lookup; see ``ValueTable.start_dots``. Raises ValueError like ``start``."""
        check_vectors(self.rows, rows_THK, x_TV)
        value_kind("x", x_TV)
        check_no_gradient("x", x_TV, "in host memory")
        self._cache.check_lookup(rows_THK, layer)
        dots_THK = _empty(tuple(rows_THK.shape), rows_THK)
        operands = (rows_THK, x_TV)
        return HostLookup(
            self._streams,
            lambda: self._cache.row_dots(dots_THK, *operands, layer),
            dots_THK,
            operands,
        )

    def hint(self, rows: Tensor, layer: int = 0) -> None:
        """Prefetch rows that may soon be read, int64 of any shape; see ``RowCache.hint``.

        Raises:
            ValueError: the rows have another dtype or device, or the layer is outside the cache's
                layers.
        """
        if rows.dtype is not torch.int64:
            raise ValueError(f"rows: expected int64 row ids, got {rows.dtype}")
        self._prefetch(self._cache.hint, rows, layer)

    def fill_cache(self, rows: Tensor, layer: int = 0) -> None:
        """Prefetch int64 row ids ``[L]``, most read first, into the unused cache.

        Raises:
            ValueError: the layer is outside the cache's layers.
        """
        rows = rows.flatten()[: self._cache.capacity].to(self._cache.device)
        self._prefetch(self._cache.fill, rows, layer)

    def _prefetch(self, prefetch: Callable[[Tensor, int], None], rows: Tensor, layer: int) -> None:
        self._cache.check_hint(rows, layer)
        side = self._streams.side
        side.wait(self._streams.caller().record())
        side.run(lambda: prefetch(rows, layer))
        side.keep(rows)

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Does nothing: no lookup waits on the host."""

    def join(self) -> None:
        """Make the caller's stream wait for all work that the side stream has queued.

        Call it before a graph replay, and after a hint that ends a capture.
        """
        self._streams.caller().wait(self._streams.side.record())

    def statistics(self) -> Mapping[int, TableStatistics]:
        """Totals by layer, without waiting. Stalls and late rows are not measured.

        They are exact if the caller's stream and the side stream are idle. Otherwise they are the
        totals that an earlier call began to copy. Call it outside of captures.
        """
        return self._cache.totals(self._counts.read(self._streams))

    def close(self) -> None:
        """Wait for the device, then unlock the rows.

        Raises:
            PageLockError: the rows cannot be unlocked.
        """
        if self._lock is not None:
            self._lock.close()


class HostLookup:
    """A lookup in flight on the side stream.

    Call ``finish`` once, with the same current stream as at ``start``.
    """

    def __init__(
        self,
        streams: StreamPair,
        read: Callable[[], None],
        result: Tensor,
        operands: tuple[Tensor, Tensor],
    ) -> None:
        self._held: tuple[Tensor, ...] = (result, *operands)
        self._caller: Stream = streams.caller()
        self._side = streams.side
        self._side.wait(self._caller.record())
        self._side.run(read)
        self._is_read = self._side.record()

    def finish(self) -> Tensor:
        """Make the caller's stream wait for the rows, and return the result, in fp32."""
        self._caller.wait(self._is_read)
        result, *_ = self._held
        self._held = ()
        return result

    def __del__(self) -> None:
        for tensor in self._held:
            self._side.keep(tensor)


def host_table(
    rows: Table, cache_bytes: int, device: torch.device, *, num_layers: int = 1
) -> HostTable:
    """Page-lock rows in place and return a table that ``device`` reads.

    Args:
        rows: contiguous rows of fp32, fp16 or bf16, or records, on the CPU. Fill a tensor of
            ``anonymous_zeros`` from a file to get huge pages and no second copy.
        cache_bytes: device memory for the cache of rows in use; see ``RowCache``.
        device: a GPU.
        num_layers: number of layers whose lookups are counted.

    Raises:
        ValueError: the GPU does not exist, the rows are of another kind, or ``cache_bytes`` is too
            small or cannot be allocated.
        PageLockError: the rows cannot be page-locked.
    """
    check_gpu("host", device)
    memory = rows_memory(rows)
    if not memory.is_cpu:
        raise ValueError(f"table: expected rows in host memory, got rows on {memory.device}")
    cache = RowCache(rows, cache_bytes, device, num_layers=num_layers)
    return HostTable(rows, cache, cuda_streams(device), PageLock(memory, device))


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
