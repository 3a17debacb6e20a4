"""Measures how fast this machine reads memory: sequentially, and random rows."""

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.alternating import Contestant
from memory_ops.anonymous import anonymous_zeros

# rows that the loop prefetches ahead, none leaves it to the processor; and into which cache
_PREFETCHES = ((0, 1), *((ahead, cache) for cache in (1, 2) for ahead in (2, 4, 8, 16, 32)))
_ROWS_A_TURN = 2**17
_SEQUENTIAL_BYTES = 2**28
# rows that a table is made of: what a row holds takes no time
DRAWN_ROWS = 2**12


def repeated(part_PB: Tensor, num_rows: int, huge_pages: bool = True) -> Tensor:
    """A large table whose rows are those of ``part_PB`` again and again, on pages of that kind."""
    shape = (num_rows, part_PB.shape[1])
    if huge_pages:
        whole_RB = anonymous_zeros(shape, part_PB.dtype)
    else:
        num_bytes = num_rows * part_PB.shape[1] * part_PB.itemsize
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        whole_RB = torch.frombuffer(memory, dtype=part_PB.dtype).view(shape)
    for start in range(0, num_rows, len(part_PB)):
        some_RB = whole_RB[start : start + len(part_PB)]
        some_RB.copy_(part_PB[: len(some_RB)])
    return whole_RB


def row_readers(library: ctypes.CDLL, tables: Sequence[Tensor]) -> list[Contestant]:
    """Readers of random rows of each of these tables, for every way of prefetching."""
    return [_row_reader(library, table, *how) for table in tables for how in _PREFETCHES]


def row_limit(seconds: Sequence[float], table: Tensor) -> float:
    """GB/s of the fastest of the row readers, given their seconds."""
    return _ROWS_A_TURN * table.stride(0) * table.itemsize / min(seconds) / 1e9


def sequential_reader(library: ctypes.CDLL) -> Contestant:
    """A reader of memory from first to last."""
    memory = anonymous_zeros((_SEQUENTIAL_BYTES,), torch.uint8).fill_(1)

    def read() -> None:
        library.memplus_read_all(memory.data_ptr(), memory.nbytes)

    return Contestant("sequential", read, lambda calls: [()] * calls, 1)


def sequential_limit(seconds: float) -> float:
    """GB/s of the sequential reader, given its seconds."""
    return _SEQUENTIAL_BYTES / seconds / 1e9


def _row_reader(library: ctypes.CDLL, table: Tensor, ahead: int, cache: int) -> Contestant:
    row_bytes = table.stride(0) * table.itemsize

    def read(rows: Tensor) -> None:
        memory, ids = table.data_ptr(), rows.data_ptr()
        library.memplus_read_rows(memory, row_bytes, ids, rows.numel(), ahead, cache)

    def inputs(calls: int) -> list[tuple[Tensor]]:
        return [(torch.randint(0, len(table), (_ROWS_A_TURN,)),) for _ in range(calls)]

    return Contestant(f"{ahead} ahead, cache {cache}", read, inputs, 1)
