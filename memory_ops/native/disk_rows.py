"""Rows of a file, by the native library: cached, read many at once (disk_rows.h)."""

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
    "is_lost": (_INT32, (_POINTER, ctypes.POINTER(_INT32))),
    "num_layers": (_INT64, (_POINTER,)),
    "counts": (None, (_POINTER, _INT64, _POINTER)),
}


class RowFile(NamedTuple):
    """Where rows lie: see row_file.h, whose struct this is."""

    descriptor: int
    offset: int
    num_rows: int
    row_bytes: int
    alignment: int


class RingError(OSError):
    """The kernel gives no io_uring: it is too old, or forbids it, or has no memory for it."""


class ReadFault(NamedTuple):
    """Faults that tests inject into reads; the defaults inject none.

    Attributes:
        every: every so many-th read ends with ``result``; 0 for none.
        result: -errno, or a number of bytes.
        submits: so many submits fail, the first ones.
        submit_error: their errno.
        retry_ms: the sum of the pauses after which transient errors are retried no more.
    """

    every: int = 0
    result: int = 0
    submits: int = 0
    submit_error: int = 0
    retry_ms: int = 10_000


class DiskRows:
    """Slots for some of a file's rows, in memory of the caller's, and reads into them."""

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

        ``depth`` reads are under way at once: by io_uring, or by so many ``threads``, if not 0.

        EAGAIN, EBUSY, ENOMEM and EINTR are retried after pauses of 1 to 100 ms, for 10 s in total.
        After that the rows that were asked for fail, and rows asked for later are tried anew.

        Raises:
            RingError: ``threads`` is 0 and the kernel gives no io_uring.
            OSError: there is no memory for it, or there are no threads.
        """
        self._functions = _library()
        self._memory = memory  # what is read into lives as long
        places = memory.data_ptr(), memory.shape[0]
        settings = depth, threads, *(fault or ReadFault())
        error = _INT32()
        self._rows = self._functions["open"](*file, *places, *settings, ctypes.byref(error))
        if not self._rows:
            number = abs(error.value)
            raise (RingError if error.value < 0 else OSError)(number, os.strerror(number))

    @property
    def _open_rows(self) -> int:
        self._check_open()
        return int(self._rows)

    def _check_open(self) -> None:
        if not self._rows:
            raise ValueError("table: is closed")

    def close(self) -> None:
        """Wait for the reads that are under way, and give everything up."""
        rows, self._rows = self._rows, None
        if rows:
            self._functions["close"](rows)

    def start(self, rows_TL: Tensor, slots_TL: Tensor, *, layer: int) -> int:
        """Begin a lookup of contiguous int64 rows; return its handle, for ``drop``.

        The first part's reads are in flight then. ``slots_TL`` receives the slots of each part's
        rows; both tensors must outlive the handle.

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
        """Wait for the rows of a lookup's next tokens, as many as there are slots for.

        Returns the token after the last of them, or the row that could not be read. Slots of the
        tokens before may get other rows. ``on_progress`` is called about every half second as long
        as reads end or are retried.
        """
        failure = ReadFailure()
        while True:
            self._check_open()
            last: int = self._functions["lookup_next"](lookup, ctypes.byref(failure))
            if last != STILL_READING:
                return failure if last == FAILED else last
            on_progress()

    def drop(self, lookup: int) -> None:
        """Unpin the slots of a lookup that has ended, or is given up."""
        self._functions["lookup_drop"](lookup, bool(self._rows))

    def hint(self, rows: Tensor, *, layer: int) -> None:
        """Begin to read rows, as many as there is room for, without waiting."""
        self._functions["hint"](self._open_rows, rows.data_ptr(), rows.numel(), layer)

    def fetcher(self, layer: int, on_progress: "ctypes._CFunctionType") -> RowFetcher:
        """What kernels call for a layer's lookups; valid until ``close``, and as long as both."""
        fetcher = RowFetcher()
        self._functions["fetcher"](self._open_rows, layer, on_progress, ctypes.byref(fetcher))
        return fetcher

    def lost_error(self) -> int | None:
        """The errno of the last read if all fail now (0: the file ends before it), else None.

        All fail if 8 different rows could not be read one after another, for other errors than
        those that pass by themselves. The first row that is read again ends it.
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
    """Whether the library was built when memplus was installed."""
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
