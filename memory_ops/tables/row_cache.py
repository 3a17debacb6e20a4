"""Device-memory cache of a table in slower memory, and lookups through this cache.

Shape suffixes: T tokens, H memory heads, K rows read per head, V value width, R rows of the table,
P rows of the cache's memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memory_ops.checks import Table, table_shape
from memory_ops.row_formats import RowRecords
from memory_ops.tables.host_cache_size import (
    NUM_OVERFLOW,
    NUM_WAYS,
    STATE_BYTES,
    host_cache_bytes,
)
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels import place_rows as columns
from memory_ops.triton_kernels.fetch_rows import fetch_rows
from memory_ops.triton_kernels.gather_rows import gather_rows_into
from memory_ops.triton_kernels.place_rows import CacheSets, place_rows
from memory_ops.triton_kernels.row_dots import row_dots_into
from memory_ops.triton_kernels.sort_rows import sort_rows
from memory_ops.triton_kernels.table_view import table_view


class PlacedRows(NamedTuple):
    """Rows of one part of a lookup, with their places in the cache's memory.

    Attributes:
        keys_L: int64 keys of the rows, sorted; see ``SortedRows``.
        fetch_L: int64, in the same order: the place that each row must be fetched to, or -1.
        places_THK: int64, the place of each row that the lookup reads.
    """

    keys_L: Tensor
    fetch_L: Tensor
    places_THK: Tensor


class RowCache:
    """A set-associative cache of rows, and the operations that read the table through it.

    All calls must use one stream. Its order ensures that rows are placed, fetched, read and only
    then evicted. No call waits for the device, and launches depend on shapes alone, so CUDA graphs
    can capture calls.

    A row that finds no free way in its set goes to an overflow row, for one part of one lookup.
    Results are bit-identical to ``gather_rows`` on the table.

    Attributes:
        row_bytes: bytes of a row.
        memory: P rows on the device, in the table's format: rows of the sets, then overflow rows.
        sets: row ids and priorities of the cached rows.
        counts: int64 totals on the device, a row for each layer; see ``totals``.
        device: the device of the cache; operands must be on it.
    """

    def __init__(
        self,
        table: Table,
        cache_bytes: int,
        device: torch.device,
        *,
        num_layers: int = 1,
        num_ways: int = NUM_WAYS,
        num_overflow: int = NUM_OVERFLOW,
        num_rows: int | None = None,
    ) -> None:
        """Allocate the cache on ``device``; fetches nothing.

        Args:
            table: contiguous rows of fp32, fp16 or bf16, or records, in memory that ``device`` can
                read. They are not copied and must not change.
            cache_bytes: memory for cached rows, overflow rows and bookkeeping.
            num_layers: number of layers whose lookups are counted.
            num_ways: rows of a set, a power of two.
            num_overflow: overflow rows. A lookup reads at most this many rows at once, repeats
                included, and splits larger requests into parts; hints ignore the excess.
            num_rows: R, by default the rows of ``table``. A caller that gives it fetches rows with
                ``fetch``, and ``table`` holds only the rows that are being fetched.

        Raises:
            ValueError: the table is of another kind, ``num_ways`` is not a power of two, or
                ``cache_bytes`` is too small for one set and the overflow rows, or cannot be
                allocated.
        """
        if num_ways < 1 or num_ways & (num_ways - 1):
            raise ValueError(f"num_ways: {num_ways} is not a power of two")
        table_view(table)
        stored_RC = rows_memory(table)
        if not stored_RC.is_contiguous():
            raise ValueError(f"table: expected contiguous rows, got strides {stored_RC.stride()}")
        num_rows = num_rows or table_shape(table)[0]
        self.row_bytes = stored_RC.shape[1] * stored_RC.element_size()
        set_bytes = num_ways * (self.row_bytes + STATE_BYTES)
        least = host_cache_bytes(1, self.row_bytes, num_ways=num_ways, num_overflow=num_overflow)
        if cache_bytes < least:
            what = f"one set of {num_ways} rows and {num_overflow} overflow rows need {least}"
            raise ValueError(f"table_cache: {cache_bytes} bytes are too small: {what}")
        num_sets = min((cache_bytes - least) // set_bytes + 1, -(-num_rows // num_ways))
        shape = num_sets * num_ways + num_overflow, stored_RC.shape[1]
        counts_shape = num_layers, columns.NUM_COUNTS
        try:
            memory_PC = torch.empty(shape, dtype=stored_RC.dtype, device=device)
            tags_SW = torch.full((num_sets, num_ways), -1, dtype=torch.int64, device=device)
            self.sets = CacheSets(tags_SW, torch.zeros_like(tags_SW))
            self.counts = torch.zeros(counts_shape, dtype=torch.int64, device=device)
        except torch.OutOfMemoryError:
            message = f"cannot allocate {cache_bytes} bytes on {device}"
            raise ValueError(f"table_cache: {message}") from None
        self.memory = memory_PC if isinstance(table, Tensor) else _like(table, memory_PC)
        word = _widest_word(stored_RC)
        self._words_RC, self._memory_words_PC = stored_RC.view(word), memory_PC.view(word)
        self._num_overflow, self.device = num_overflow, memory_PC.device

    @property
    def capacity(self) -> int:
        """Number of rows that the sets hold."""
        return self.sets.tags_SW.numel()

    def gather_rows(
        self, out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, layer: int
    ) -> None:
        """``operations.gather_rows`` on the table, into contiguous fp32 ``[T, V]``."""
        for part, places_THK in self._placed(rows_THK, layer):
            gather_rows_into(out_TV[part], self.memory, places_THK, weights_THK[part])

    def row_dots(self, dots_THK: Tensor, rows_THK: Tensor, x_TV: Tensor, layer: int) -> None:
        """``operations.row_dots`` on the table, into contiguous fp32 ``[T, H, K]``."""
        for part, places_THK in self._placed(rows_THK, layer):
            row_dots_into(dots_THK[part], self.memory, places_THK, x_TV[part])

    def parts(self, rows_THK: Tensor) -> Iterator[slice]:
        """Ranges of tokens whose rows the cache can hold at once, repeats included."""
        tokens = self._num_overflow // max(rows_THK.shape[1:].numel(), 1)
        for first in range(0, len(rows_THK), tokens):
            yield slice(first, first + tokens)

    def place(self, part_THK: Tensor, layer: int, *, is_first: bool = True) -> PlacedRows:
        """Place the rows of one of ``parts``, at least one row; the caller fetches missing rows.

        ``is_first`` counts a lookup. The places are valid until the next call.
        """
        placed = self._place(part_THK.flatten(), layer, is_hint=False, is_first=is_first)
        return placed._replace(places_THK=placed.places_THK.view(part_THK.shape))

    def fetch(self, keys_L: Tensor, fetch_L: Tensor) -> None:
        """Copy rows of the table, by key, to their places; see ``PlacedRows``."""
        fetch_rows(self._words_RC, keys_L, fetch_L, self._memory_words_PC)

    def clear(self) -> None:
        """Forget all rows."""
        self.sets.tags_SW.fill_(-1)
        self.sets.priorities_SW.zero_()

    def hint(self, rows: Tensor, layer: int) -> None:
        """Prefetch int64 ``rows`` into ways that hold no row in use; skip the other rows.

        Only the first ``num_overflow`` rows count: further placements would evict rows in use.
        """
        if rows.numel():
            placed = self._place(rows.flatten()[: self._num_overflow], layer, is_hint=True)
            self.fetch(placed.keys_L, placed.fetch_L)

    def fill(self, rows: Tensor, layer: int) -> None:
        """Prefetch int64 ``rows``, most read first, into an unused cache, up to its capacity.

        Of the rows that share a set, those that do not fit are left out.
        """
        parts = torch.split(rows.flatten()[: self.capacity], self._num_overflow)
        # in a full set, hints evict rows of earlier hints
        for part in reversed(parts):
            self.hint(part, layer)

    def check_hint(self, rows: Tensor, layer: int) -> None:
        """Raise ValueError if the rows are on another device, or ``layer`` is out of range."""
        if rows.device != self.device:
            # kernels run on the rows' device, where the cache's pointers are invalid
            raise ValueError(f"rows: expected row ids on {self.device}, got {rows.device}")
        if not 0 <= layer < len(self.counts):
            raise ValueError(f"layer: {layer} is outside [0, {len(self.counts)})")

    def check_lookup(self, rows_THK: Tensor, layer: int) -> None:
        """Raise ValueError like ``check_hint``, or if a token reads too many rows."""
        self.check_hint(rows_THK, layer)
        per_token = rows_THK.shape[1:].numel()
        if per_token > self._num_overflow:
            allowed = f"at most {self._num_overflow} are allowed"
            raise ValueError(f"rows: a token reads {per_token} rows, {allowed}")

    def statistics(self) -> dict[int, TableStatistics]:
        """Totals by layer. Waits for the current stream."""
        return self.totals(self.counts.tolist())

    def totals(self, counts: Sequence[Sequence[int]]) -> dict[int, TableStatistics]:
        """Totals by layer, without unused layers, from the values of ``counts``.

        Each part of a lookup counts its distinct rows separately.
        """
        return {layer: self._statistics(one) for layer, one in enumerate(counts) if any(one)}

    def _placed(self, rows_THK: Tensor, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Parts of a lookup: each a range of tokens, and places of their rows that it may use."""
        for part in self.parts(rows_THK):
            part_THK = rows_THK[part]
            if not part_THK.numel():
                yield part, part_THK
                continue
            placed = self.place(part_THK, layer, is_first=part.start == 0)
            self.fetch(placed.keys_L, placed.fetch_L)
            yield part, placed.places_THK

    def _place(
        self, rows_L: Tensor, layer: int, *, is_hint: bool, is_first: bool = True
    ) -> PlacedRows:
        """Place rows; the places to read are flat, and undefined for a hint."""
        wanted, counts = sort_rows(rows_L.contiguous()), self.counts[layer]
        placed = place_rows(self.sets, wanted, counts, is_hint=is_hint, is_first=is_first)
        return PlacedRows(wanted.keys_L, placed.fetch_L, placed.places_L)

    def _statistics(self, counts: Sequence[int]) -> TableStatistics:
        unique, misses = counts[columns.UNIQUE.value], counts[columns.MISSES.value]
        prefetched = counts[columns.PREFETCHED.value]
        return TableStatistics(
            requested_rows=counts[columns.REQUESTED.value],
            lookups=counts[columns.LOOKUPS.value],
            unique_rows=unique,
            hits=unique - misses,
            misses=misses,
            bytes_read=(misses + prefetched) * self.row_bytes,
            prefetched=prefetched,
            prefetched_used=counts[columns.PREFETCHED_USED.value],
        )


def rows_memory(table: Table) -> Tensor:
    """The tensor that holds a table's rows, or its records."""
    return table.records_RB if isinstance(table, RowRecords) else table


def _like(table: RowRecords, records_RB: Tensor) -> RowRecords:
    return RowRecords(records_RB, table.row_format, table.value_dim)


def _widest_word(memory_RC: Tensor) -> torch.dtype:
    """The widest word, up to 32 bits, to which all rows are aligned."""
    size = memory_RC.element_size()
    # check the address too, because storage itself may be unaligned
    places = memory_RC.shape[1] * size, memory_RC.storage_offset() * size, memory_RC.data_ptr()
    return torch.int16 if any(place % 4 for place in places) else torch.int32
