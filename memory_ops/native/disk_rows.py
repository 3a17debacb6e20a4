"""Reads and caches rows of a file through the native library (disk_rows.h)."""

import ctypes
import functools
import os
import sysconfig
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from memory_ops.native.row_fetcher import (
    FAILED,
    ON_PROGRESS,
    STILL_READING,
    ReadFailure,
    RowFetcher,
)
from memory_ops.tables.table_statistics import TableStatistics

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "open": (
        _POINTER,
        (_INT32, *[_INT64] * 4, _POINTER, *[_INT64] * 8, ctypes.POINTER(_INT32)),
    ),
    "close": (None, (_POINTER,)),
    "fetcher": (None, (_POINTER, _INT64, ON_PROGRESS, ctypes.POINTER(RowFetcher))),
    "lookup_start": (
        _POINTER,
        (_POINTER, _POINTER, *[_INT64] * 3, _POINTER, ctypes.POINTER(_INT64)),
    ),
    "lookup_next": (_INT64, (_POINTER, ctypes.POINTER(ReadFailure))),
    "lookup_drop": (None, (_POINTER, _INT32)),
    "hint": (None, (_POINTER, _POINTER, _INT64, _INT64)),
    "fill": (None, (_POINTER, _POINTER, _INT64)),
    "is_lost": (_INT32, (_POINTER, ctypes.POINTER(_INT32))),
    "num_layers": (_INT64, (_POINTER,)),
    "counts": (None, (_POINTER, _INT64, _POINTER)),
}


class RowFile(NamedTuple):
    """Position of a table's rows in a file: ``RowFile`` of row_file.h."""

    descriptor: int
    offset: int
    num_rows: int
    row_bytes: int
    alignment: int


class RingError(OSError):
    """io_uring is not available: the kernel is too old, forbids it, or lacks memory."""


class ReadFault(NamedTuple):
    """Faults that tests inject into reads; the defaults inject none.

    Attributes:
        every: each n-th read ends with ``result``; 0 disables this fault.
        result: -errno, or the number of bytes read.
        submits: number of initial submits that fail.
        submit_error: errno of the failed submits.
        retry_ms: limit of the total pause between retries of transient errors, in milliseconds.
    """

    every: int = 0
    result: int = 0
    submits: int = 0
    submit_error: int = 0
    retry_ms: int = 10_000


class DiskRows:
    """A cache of a file's rows in slots of the caller's memory, and reads into these slots."""

    def __init__(
        self,
        file: RowFile,
        memory: Tensor,
        *,
        depth: int,
        threads: int,
        fault: ReadFault | None = None,
    ) -> None:
        """Read into ``memory``, uint8 ``[slots, row_bytes]``.

        At most ``depth`` reads are in flight, through io_uring, or through ``threads`` if not 0.

        EAGAIN, EBUSY, ENOMEM and EINTR are retried after pauses of 1 to 100 ms, for 10 s in total.
        After that the requested rows fail; later requests try again.

        Raises:
            RingError: ``threads`` is 0 and io_uring is not available.
            OSError: memory or threads cannot be allocated.
        """
        self._functions = _library()
        self._memory = memory  # keeps the slots alive
        slots = memory.data_ptr(), memory.shape[0]
        settings = depth, threads, *(fault or ReadFault())
        error = _INT32()
        self._rows = self._functions["open"](*file, *slots, *settings, ctypes.byref(error))
        if not self._rows:
            number = abs(error.value)
            raise (RingError if error.value < 0 else OSError)(number, os.strerror(number))

    @property
    def _open_rows(self) -> int:
        self._check_open()
        return int(self._rows)

    def _check_open(self) -> None:
        if not self._rows:
            raise ValueError("table: the table is closed")

    def close(self) -> None:
        """Wait for the reads in flight, then free everything."""
        rows, self._rows = self._rows, None
        if rows:
            self._functions["close"](rows)

    def start(self, rows_TL: Tensor, slots_TL: Tensor, *, layer: int) -> int:
        """Start a lookup of contiguous int64 rows and return its handle; free it with ``drop``.

        The reads of the first part are in flight on return. ``slots_TL`` receives the slots of each
        part's rows. Both tensors must outlive the handle.

        Raises:
            IndexError: a row id lies outside the table.
        """
        outside = _INT64()
        arguments = rows_TL.data_ptr(), *rows_TL.shape, layer, slots_TL.data_ptr()
        lookup: int = self._functions["lookup_start"](
            self._open_rows, *arguments, ctypes.byref(outside)
        )
        if outside.value >= 0:
            self.drop(lookup)
            raise IndexError(f"rows: {int(rows_TL.flatten()[outside.value])} is outside the table")
        return lookup

    def next_part(self, lookup: int, on_progress: Callable[[], None]) -> int | ReadFailure:
        """Wait for the rows of a lookup's next tokens, as many tokens as fit in the slots.

        Returns the end of this range of tokens, or the row that could not be read. Slots of earlier
        tokens may be reused. Calls ``on_progress`` about every 0.5 s while reads complete or are
        retried.
        """
        failure = ReadFailure()
        while True:
            self._check_open()
            last: int = self._functions["lookup_next"](lookup, ctypes.byref(failure))
            if last != STILL_READING:
                return failure if last == FAILED else last
            on_progress()

    def drop(self, lookup: int) -> None:
        """Free a lookup, finished or not, and unpin its slots."""
        self._functions["lookup_drop"](lookup, bool(self._rows))

    def hint(self, rows: Tensor, *, layer: int) -> None:
        """Prefetch as many of the rows as fit, without waiting."""
        self._functions["hint"](self._open_rows, rows.data_ptr(), rows.numel(), layer)

    def fill(self, rows: Tensor) -> None:
        """Read contiguous int64 rows into unused slots, as many as there are, and wait for them.

        Counts no statistics. Ignores failed reads: a lookup of the row tries again.
        """
        self._functions["fill"](self._open_rows, rows.data_ptr(), rows.numel())

    def fetcher(self, layer: int, on_progress: "ctypes._CFunctionType") -> RowFetcher:
        """Callbacks for a layer's lookups; valid until ``close`` and while both objects live."""
        fetcher = RowFetcher()
        self._functions["fetcher"](self._open_rows, layer, on_progress, ctypes.byref(fetcher))
        return fetcher

    def lost_error(self) -> int | None:
        """The last read's errno (0: the file ends before the row) if all reads fail, else None.

        All reads count as failing after 8 different rows failed in a row with errors that are not
        transient. The next successful read ends this state.
        """
        error = _INT32()
        is_lost = self._functions["is_lost"](self._open_rows, ctypes.byref(error))
        return error.value if is_lost else None

    def counts(self) -> dict[int, TableStatistics]:
        """Totals so far, by layer."""
        totals = (_INT64 * len(fields(TableStatistics)))()
        by_layer = {}
        for layer in range(self._functions["num_layers"](self._open_rows)):
            self._functions["counts"](self._open_rows, layer, totals)
            counts = TableStatistics(*totals)
            by_layer[layer] = replace(counts, stall_seconds=counts.stall_seconds / 1e9)  # from ns
        return by_layer


def is_available() -> bool:
    """Whether the installation of memplus built the library."""
    return _file().exists()


def _file() -> Path:
    return Path(__file__).parent / f"disk_rows_calls{sysconfig.get_config_var('EXT_SUFFIX')}"


@functools.cache
def _library() -> dict[str, "ctypes._NamedFuncPointer"]:
    library = ctypes.CDLL(str(_file()))
    functions = {}
    for name, (result, arguments) in _PROTOTYPES.items():
        function = functions[name] = getattr(library, f"memplus_disk_{name}")
        function.restype, function.argtypes = result, arguments
    return functions
