"""The host tier: every row in page-locked host memory, read by a GPU, those in use kept there.

What follows what, and why nothing else has to:

* Cache, staging and counts belong to the stream beside the caller's, which does a whole lookup:
  places, fetches, sums. There, work follows work. So no lookup can lose rows to a later one, whose
  ever stream wants it, and no caller has to be waited for before rows are replaced.
* The caller's stream and the one beside it share a lookup's operands and its result, which are the
  lookup's own. So each lookup has two events: the stream beside begins when the caller's has made
  the operands, and the caller's goes on from ``finish`` when the result is there.
* Operands and result are memory of the caller's stream, which may use it for other things once
  they are forgotten: after ``finish``, and so after the stream beside has used them. Those of a
  hint, or of a lookup that was never finished, it keeps.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memory_ops.checks import Table, check_rows, check_vectors, table_shape
from memory_ops.page_lock import PageLock
from memory_ops.tables.row_cache import RowCache, rows_memory
from memory_ops.tables.streams import Stream, StreamPair, cuda_streams
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels.table_view import value_kind


class HostTable:
    """A value table in host memory, looked up by a stream beside the caller's.

    The host never learns a row id and never waits, but in ``statistics`` and ``close``. A lookup
    can be captured in a CUDA graph; so can a hint, before a lookup of the same graph or a ``join``.

    A replay follows its own stream alone, and nothing else that was given to the stream beside,
    hint or lookup, finished or not, by any caller: ``join`` on the replay's stream comes before it.
    What is given afterwards, by any caller, comes from a stream that follows the replay. So replays
    follow one another, those of different graphs too.

    Attributes:
        rows: ``[R, V]``, or R records of V values.
    """

    tier = "host"
    fault = None

    def __init__(
        self, rows: Table, cache: RowCache, streams: StreamPair, lock: PageLock | None = None
    ) -> None:
        """Read ``rows`` through ``cache``, made on the caller's stream; see ``host_table``.

        Cache and lock are the table's alone from now on.
        """
        self._num_rows, self._value_dim = table_shape(rows)
        self.rows = rows
        self._cache, self._streams, self._lock = cache, streams, lock
        # the cache was made on this caller's stream, and may be asked from another one
        streams.beside.wait(streams.caller().record())

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
        """No source: a GPU reads these rows."""

    def start(self, rows_THK: Tensor, weights_THK: Tensor, layer: int = 0) -> "HostLookup":
        """Begin to read; see ``ValueTable.start``. Row ids are not checked.

        Raises:
            ValueError: the operands do not fit together or are on another device than the cache, a
                gradient is asked for, or the layer is not counted.
        """
        check_rows(self.rows, rows_THK, weights_THK)
        _check_no_gradient("weights", weights_THK)
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
        """Begin to read; see ``ValueTable.start_dots`` (ValueError as ``start``)."""
        check_vectors(self.rows, rows_THK, x_TV)
        value_kind("x", x_TV)
        _check_no_gradient("x", x_TV)
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
        """Begin to fetch rows that may soon be read, int64 of any shape; see ``RowCache.hint``.

        Raises:
            ValueError: they are of another dtype or device, or the layer is not counted.
        """
        if rows.dtype is not torch.int64:
            raise ValueError(f"rows: expected int64 row ids, got {rows.dtype}")
        self._cache.check_hint(rows, layer)
        beside = self._streams.beside
        beside.wait(self._streams.caller().record())
        beside.run(lambda: self._cache.hint(rows, layer))
        beside.keep(rows)

    def watch(self, on_progress: Callable[[], None]) -> None:
        """Nothing to do: no lookup waits on the host."""

    def join(self) -> None:
        """Have the caller's stream wait for all that the stream beside was given by anybody.

        Before a replay, and where a capture ends with a hint.
        """
        self._streams.caller().wait(self._streams.beside.record())

    def statistics(self) -> Mapping[int, TableStatistics]:
        """Totals by layer; waits for the device. Stalls are not timed, and no row is late."""
        self.join()
        return self._cache.statistics()

    def close(self) -> None:
        """Wait for the device, and unlock the rows.

        Raises:
            PageLockError: they stay locked.
        """
        if self._lock is not None:
            self._lock.close()


class HostLookup:
    """A lookup under way on the stream beside the caller's.

    ``finish`` is called once, with the stream current that was so at the start.
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
        self._beside = streams.beside
        self._beside.wait(self._caller.record())
        self._beside.run(read)
        self._is_read = self._beside.record()

    def finish(self) -> Tensor:
        """Have the caller's stream wait for the rows, and return what they give, in fp32."""
        self._caller.wait(self._is_read)
        result, *_ = self._held
        self._held = ()
        return result

    def __del__(self) -> None:
        for tensor in self._held:
            self._beside.keep(tensor)


def host_table(
    rows: Table, cache_bytes: int, device: torch.device, *, num_layers: int = 1
) -> HostTable:
    """Page-lock rows where they are, and have ``device`` read them.

    Args:
        rows: contiguous rows of fp32, fp16 or bf16, or records, on the CPU; ``anonymous_zeros``,
            filled from a file, has no second copy and huge pages.
        cache_bytes: memory of the device for the rows in use; see ``RowCache``.
        device: a GPU.
        num_layers: whose lookups are counted.

    Raises:
        ValueError: there is no such GPU, the rows are no such table, or ``cache_bytes`` are too few
            or too many.
        PageLockError: they cannot be page-locked.
    """
    if device.type != "cuda":
        raise ValueError(f"table_tier: host is for a GPU that reads host memory, not for {device}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= num_gpus:
        raise ValueError(f"table_tier: host needs {device}, and torch finds {num_gpus} GPUs")
    memory = rows_memory(rows)
    if not memory.is_cpu:
        raise ValueError(f"table: expected rows in host memory, got them on {memory.device}")
    cache = RowCache(rows, cache_bytes, device, num_layers=num_layers)
    return HostTable(rows, cache, cuda_streams(device), PageLock(memory, device))


def _empty(shape: tuple[int, ...], beside: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=beside.device)


def _check_no_gradient(name: str, operand: Tensor) -> None:
    if operand.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: tables in host memory are for serving, and give no gradients")
