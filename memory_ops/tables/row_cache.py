"""Rows of a table in slower memory, those in use kept on the device: read as if all were there.

Shape suffixes: T tokens, H memory heads, K rows read per head, V value width, R rows of the table,
P rows of the cache's memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from memory_ops.checks import Table, table_shape
from memory_ops.row_formats import RowRecords
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels import place_rows as counted
from memory_ops.triton_kernels.fetch_rows import fetch_rows
from memory_ops.triton_kernels.gather_rows import gather_rows_into
from memory_ops.triton_kernels.place_rows import CacheSets, place_rows
from memory_ops.triton_kernels.row_dots import row_dots_into
from memory_ops.triton_kernels.sort_rows import sort_rows
from memory_ops.triton_kernels.table_view import table_view

_WAYS = 16
_BESIDE = 2**14  # rows that find no way, at most, of one part of a lookup: 128 tokens of 128 rows
_STATE_BYTES = 16  # of a way, beside its row


class RowCache:
    """A cache of rows, and the operations that read the table through it.

    All of it belongs to one stream, the current one of whoever calls: there, work follows work, so
    that rows have places before they are fetched, are fetched before they are read, and read before
    they are replaced. Nothing waits for the device, and nothing but shapes decides what is
    launched: calls can be captured in a graph.

    What a set has no way for is fetched to a place beside the sets, for one part of one lookup.
    Sums are those of ``gather_rows`` over rows in other places, so they have the same bits.

    Attributes:
        row_bytes: of a row.
        memory: P rows on the device, like the table's: those of the sets, then those beside them.
        sets: which rows stand in the sets.
        device: where all of it is, and what is asked for must be.
    """

    def __init__(
        self,
        table: Table,
        cache_bytes: int,
        device: torch.device,
        *,
        num_layers: int = 1,
        num_ways: int = _WAYS,
        beside: int = _BESIDE,
    ) -> None:
        """Take memory on ``device``, once; nothing is fetched.

        Args:
            table: contiguous rows of fp32, fp16 or bf16, or records, where ``device`` can read
                them. They are not copied, and must not change.
            cache_bytes: for rows, those beside the sets included, and for what is known of them.
            num_layers: whose lookups are counted.
            num_ways: rows of a set, a power of two.
            beside: rows that a lookup may read at once, repeats included; more are read in parts,
                and hinted not at all.

        Raises:
            ValueError: the table is of another kind, ``num_ways`` is no power of two, or
                ``cache_bytes`` are less than one set and the rows beside it take, or more than the
                device has.
        """
        if num_ways < 1 or num_ways & (num_ways - 1):
            raise ValueError(f"num_ways: {num_ways} is no power of two")
        table_view(table)
        stored_RC = rows_memory(table)
        if not stored_RC.is_contiguous():
            raise ValueError(f"table: expected contiguous rows, got strides {stored_RC.stride()}")
        num_rows, _ = table_shape(table)
        self.row_bytes = stored_RC.shape[1] * stored_RC.element_size()
        set_bytes = num_ways * (self.row_bytes + _STATE_BYTES)
        least = beside * self.row_bytes + set_bytes
        if cache_bytes < least:
            what = f"one set of {num_ways} rows and {beside} beside it"
            raise ValueError(
                f"table_cache: {cache_bytes} bytes are less than the {least} of {what}"
            )
        num_sets = min((cache_bytes - least) // set_bytes + 1, -(-num_rows // num_ways))
        shape = num_sets * num_ways + beside, stored_RC.shape[1]
        counts_shape = num_layers, counted.NUM_COUNTS
        try:
            memory_PC = torch.empty(shape, dtype=stored_RC.dtype, device=device)
            tags_SW = torch.full((num_sets, num_ways), -1, dtype=torch.int64, device=device)
            self.sets = CacheSets(tags_SW, torch.zeros_like(tags_SW))
            self._counts = torch.zeros(counts_shape, dtype=torch.int64, device=device)
        except torch.OutOfMemoryError:
            raise ValueError(f"table_cache: no {cache_bytes} bytes on {device}") from None
        self.memory = memory_PC if isinstance(table, Tensor) else _like(table, memory_PC)
        word = _widest_word(stored_RC)
        self._words_RC, self._memory_words_PC = stored_RC.view(word), memory_PC.view(word)
        self._beside, self.device = beside, memory_PC.device

    @property
    def capacity(self) -> int:
        """Rows that stand in the sets at once."""
        return self.sets.tags_SW.numel()

    def gather_rows(
        self, out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, layer: int
    ) -> None:
        """``operations.gather_rows`` of the table, into contiguous fp32 ``[T, V]``."""
        for part, places_THK in self._placed(rows_THK, layer):
            gather_rows_into(out_TV[part], self.memory, places_THK, weights_THK[part])

    def row_dots(self, dots_THK: Tensor, rows_THK: Tensor, x_TV: Tensor, layer: int) -> None:
        """``operations.row_dots`` of the table, into contiguous fp32 ``[T, H, K]``."""
        for part, places_THK in self._placed(rows_THK, layer):
            row_dots_into(dots_THK[part], self.memory, places_THK, x_TV[part])

    def hint(self, rows: Tensor, layer: int) -> None:
        """Fetch those of int64 ``rows`` that their sets have room for beside rows in use.

        Of more than a part of a lookup, the first: one hint after another would find room again.
        """
        if rows.numel():
            self._place(rows.flatten()[: self._beside], layer, is_hint=True)

    def check_hint(self, rows: Tensor, layer: int) -> None:
        """Raise ValueError for rows on another device than the cache, or an uncounted layer."""
        if rows.device != self.device:
            # kernels run where the rows are, where the cache's pointers mean nothing
            raise ValueError(f"rows: on {rows.device}, and they are looked up by {self.device}")
        if not 0 <= layer < len(self._counts):
            raise ValueError(f"layer: {layer} is outside [0, {len(self._counts)})")

    def check_lookup(self, rows_THK: Tensor, layer: int) -> None:
        """Raise ValueError as ``check_hint``, and for more rows a token than fit beside."""
        self.check_hint(rows_THK, layer)
        per_token = rows_THK.shape[1:].numel()
        if per_token > self._beside:
            raise ValueError(f"rows: {per_token} a token, and at most {self._beside} are read")

    def statistics(self) -> dict[int, TableStatistics]:
        """Totals by layer, of layers that asked for something. Waits for the current stream.

        Each part of a lookup counts its distinct rows anew.
        """
        return {
            layer: self._statistics(counts)
            for layer, counts in enumerate(self._counts.tolist())
            if any(counts)
        }

    def _placed(self, rows_THK: Tensor, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens that are read at once, and where their rows are, until the next are asked for."""
        per_token = rows_THK.shape[1:].numel()
        tokens = self._beside // max(per_token, 1)
        for first in range(0, len(rows_THK), tokens):
            part = slice(first, first + tokens)
            part_THK = rows_THK[part]
            if not per_token:
                yield part, part_THK
                continue
            is_first = first == 0
            places_L = self._place(part_THK.flatten(), layer, is_hint=False, is_first=is_first)
            yield part, places_L.view(part_THK.shape)

    def _place(self, rows_L: Tensor, layer: int, *, is_hint: bool, is_first: bool = True) -> Tensor:
        """Have rows at their places, which are not told for a hint."""
        wanted, counts = sort_rows(rows_L.contiguous()), self._counts[layer]
        placed = place_rows(self.sets, wanted, counts, is_hint=is_hint, is_first=is_first)
        fetch_rows(self._words_RC, wanted.keys_L, placed.fetch_L, self._memory_words_PC)
        return placed.places_L

    def _statistics(self, counts: list[int]) -> TableStatistics:
        unique, misses = counts[counted.UNIQUE.value], counts[counted.MISSES.value]
        prefetched = counts[counted.PREFETCHED.value]
        return TableStatistics(
            requested_rows=counts[counted.REQUESTED.value],
            lookups=counts[counted.LOOKUPS.value],
            unique_rows=unique,
            hits=unique - misses,
            misses=misses,
            bytes_read=(misses + prefetched) * self.row_bytes,
            prefetched=prefetched,
            prefetched_used=counts[counted.PREFETCHED_USED.value],
        )


def rows_memory(table: Table) -> Tensor:
    """The tensor that holds a table's rows, or its records."""
    return table.records_RB if isinstance(table, RowRecords) else table


def _like(table: RowRecords, records_RB: Tensor) -> RowRecords:
    return RowRecords(records_RB, table.row_format, table.value_dim)


def _widest_word(memory_RC: Tensor) -> torch.dtype:
    """Of 32 bits at most, and such that rows are whole words at multiples of their size."""
    size = memory_RC.element_size()
    # an address may be odd although the offset is even: storage can begin anywhere
    places = memory_RC.shape[1] * size, memory_RC.storage_offset() * size, memory_RC.data_ptr()
    return torch.int16 if any(place % 4 for place in places) else torch.int32
