"""Measures how fast this machine reads: sequential memory, random rows of memory or of a file."""

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.alternating import Contestant
from engine.errors import ConfigError
from memory_ops.anonymous import anonymous_zeros
from memory_ops.native.disk_rows import RingError, RowFile
from memory_ops.native.library import NativeLibrary

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
READ_LIBRARY = NativeLibrary(
    Path(__file__).parent / "native",
    {
        "memplus_read_rows": (ctypes.c_uint32, (_POINTER, _INT64, _POINTER, *[_INT64] * 3, _INT32)),
        "memplus_read_all": (ctypes.c_uint32, (_POINTER, _INT64)),
        "memplus_read_file_ns": (_INT64, (_INT32, *[_INT64] * 7)),
    },
    "benchmarks cannot measure how fast this machine reads",
)

# rows that the loop reads side by side, line by line; rows that it prefetches ahead, none leaves
# it to the processor; and into which cache
_ORDERS = ((1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (16, 16), (32, 32))
_PREFETCHES = ((1, 0, 1), *((*order, cache) for cache in (1, 2) for order in _ORDERS))
_ROWS_A_TURN = 2**17
_SEQUENTIAL_BYTES = 2**28


def read_library() -> ctypes.CDLL:
    """The best build of the read loops for this machine.

    Raises:
        ConfigError: memplus was installed without its native library.
    """
    build = READ_LIBRARY.best_build
    if build is None:
        raise ConfigError("bench: memplus was installed without its native library")
    return READ_LIBRARY.load(build)


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


def random_reads_per_s(file: RowFile, depth: int, count: int, seed: int) -> float:
    """Reads ``count`` random rows of a file, ``depth`` of them in flight; returns rows per second.

    Raises:
        ConfigError: memplus was installed without its native library.
        RingError: the kernel lacks io_uring or forbids it.
        OSError: a read fails, or memory cannot be allocated.
    """
    taken: int = read_library().memplus_read_file_ns(*file, depth, count, seed)
    if taken < 0:
        is_forbidden = -taken in (errno.ENOSYS, errno.EPERM)
        raise (RingError if is_forbidden else OSError)(-taken, os.strerror(-taken))
    return count / taken * 1e9


def _row_reader(
    library: ctypes.CDLL, table: Tensor, group: int, ahead: int, cache: int
) -> Contestant:
    row_bytes = table.stride(0) * table.itemsize

    def read(rows: Tensor) -> None:
        memory, ids = table.data_ptr(), rows.data_ptr()
        library.memplus_read_rows(memory, row_bytes, ids, rows.numel(), group, ahead, cache)

    def inputs(calls: int) -> list[tuple[Tensor]]:
        return [(torch.randint(0, len(table), (_ROWS_A_TURN,)),) for _ in range(calls)]

    return Contestant(f"{group} rows, {ahead} ahead, cache {cache}", read, inputs, 1)
