"""Fetches rows of a disk table into a GPU's row cache, through page-locked host memory.

The device's work and the host take turns on one stream:

1. The device places a lookup's rows in its cache, and copies keys and places to page-locked memory.
2. The host waits for this copy. It reads the rows that the device lacks into slots of the disk
   table, which are page-locked too, unless they are there already.
3. The device copies these rows from their slots to their places, and then reads its cache.

The host must not evict the rows of a slot, or write the list of rows to copy, before the device has
done step 3. The wait of the next lookup covers that, since its copy lies behind it in the stream.

Shape suffixes: L references to rows, M missing rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from memory_ops.native.row_fetcher import ReadFailure
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.row_cache import PlacedRows, RowCache
from memory_ops.tables.streams import Event, Stream
from memory_ops.tables.table_statistics import TableStatistics
from memory_ops.triton_kernels.sort_rows import KEY_FACTOR, KEY_INVERSE, KEY_MASK


class HeldRead(NamedTuple):
    """A native lookup that pins slots: its handle, and the tensors that it uses."""

    handle: int
    rows_M1: Tensor
    slots_M1: Tensor


class StagedRows:
    """The fetches of one table. One lookup is in flight at a time.

    Attributes:
        is_unfinished: the cache has places for rows that were not fetched.
    """

    def __init__(
        self,
        disk: DiskTable,
        cache: RowCache,
        stream: Callable[[], Stream],
        most_references: int,
    ) -> None:
        """Reserve memory for lists of ``most_references``.

        Args:
            disk: the table; the caller has page-locked its slots.
            cache: the device's cache, whose table are these slots.
            stream: the stream of all calls, which is the current one.
            most_references: the most references of one part of a lookup.
        """
        self._disk, self._cache, self._stream = disk, cache, stream
        # even, so that both lists are aligned to 16 bytes
        shape = 2, -(-most_references // 2) * 2
        self._found_2L, self._sent_2L = (pinned_ids(shape, cache.device) for _ in range(2))
        self._received_2L = torch.zeros(shape, dtype=torch.int64, device=cache.device)
        self._placed: Event | None = None
        self._held: HeldRead | None = None
        self.is_unfinished = False
        self._counts: dict[int, TableStatistics] = {}

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            self._drop()

    def place(self, part_THK: Tensor, layer: int) -> PlacedRows:
        """Queue step 1 where the stream's work is queued."""
        placed = self._cache.place(part_THK, layer)
        count = len(placed.keys_L)
        self._found_2L[0, :count].copy_(placed.keys_L, non_blocking=True)
        self._found_2L[1, :count].copy_(placed.fetch_L, non_blocking=True)
        return placed

    def mark(self) -> None:
        """Note on the host that step 1 is queued."""
        self.is_unfinished = True
        self._placed = self._stream().record()

    def fetch(self, num_references: int, layer: int, *, is_first: bool) -> None:
        """Do step 2 and queue the copies of step 3; ``is_first`` counts a lookup.

        Raises:
            TableReadError: a row could not be read.
            IndexError: a row id lies outside the table.
        """
        assert self._placed is not None, "step 1 is not queued"
        self._placed.synchronize()
        self._drop()
        keys_L, places_L = self._found_2L[:, :num_references]
        self._count(keys_L, layer, is_first)
        is_missing_L = places_L >= 0
        rows_M = keys_L[is_missing_L] * KEY_INVERSE.value & KEY_MASK.value
        if len(rows_M):
            self._disk.check_file()
            self._read(rows_M.unsqueeze(1), places_L[is_missing_L], layer)
            self._disk.check_file()
        self.is_unfinished = False

    def recover(self) -> None:
        """Forget the rows of a lookup that failed; call it before the next lookup.

        After a finished lookup it waits for nothing: the next one waits before it reuses slots.
        """
        if self.is_unfinished:
            self.release()
            self._stream().run(self._cache.clear)
            self.is_unfinished = False

    def release(self) -> None:
        """Wait until the device has read the slots of the last lookup, and unpin them."""
        if self._held is not None:
            self._stream().record().synchronize()
            self._drop()

    def statistics(self) -> dict[int, TableStatistics]:
        """Totals by layer; hits are rows in the device's memory or in the host's."""
        read = self._disk.statistics()
        found = {}
        for layer in sorted({*self._counts, *read}):
            counts, fetched = (one.get(layer, TableStatistics()) for one in (self._counts, read))
            found[layer] = replace(
                fetched,
                requested_rows=counts.requested_rows,
                lookups=counts.lookups,
                unique_rows=counts.unique_rows,
                hits=counts.unique_rows - fetched.misses - fetched.late,
            )
        return found

    def _read(self, rows_M1: Tensor, places_M: Tensor, layer: int) -> None:
        """Read rows and queue their copies, as many at once as the disk table has slots."""
        disk, slots_M1 = self._disk, torch.empty_like(rows_M1)
        self._held = HeldRead(disk.rows.start(rows_M1, slots_M1, layer=layer), rows_M1, slots_M1)
        first = 0
        while first < len(rows_M1):
            if first:
                # the next part may evict the rows of this one, and replaces its list
                self._stream().record().synchronize()
            last = disk.rows.next_part(self._held.handle, disk.report_progress)
            if isinstance(last, ReadFailure):
                raise disk.read_error(last.row, last.error)
            self._send(slots_M1[first:last, 0], places_M[first:last])
            disk.report_progress()
            first = last

    def _send(self, slots_M: Tensor, places_M: Tensor) -> None:
        # every part at the start: Triton compiles the copy once more for pointers that are not
        # aligned to 16 bytes, and a step must not wait for a compiler
        part = slice(len(slots_M))
        sent_2M, received_2M = self._sent_2L[:, part], self._received_2L[:, part]
        sent_2M[0] = slots_M * KEY_FACTOR.value & KEY_MASK.value
        sent_2M[1] = places_M

        def copy() -> None:
            for received_M, sent_M in zip(received_2M, sent_2M, strict=True):
                received_M.copy_(sent_M, non_blocking=True)
            self._cache.fetch(*received_2M)

        self._stream().run(copy)

    def _drop(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._disk.rows.drop(held.handle)

    def _count(self, keys_L: Tensor, layer: int, is_first: bool) -> None:
        num_unique = 1 + int((keys_L[1:] != keys_L[:-1]).sum())
        one = TableStatistics(len(keys_L), int(is_first), num_unique)
        before = self._counts.get(layer, TableStatistics())
        self._counts[layer] = TableStatistics.sum((before, one))


def pinned_ids(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor on the host that ``device`` copies to and from while the host goes on."""
    return torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
