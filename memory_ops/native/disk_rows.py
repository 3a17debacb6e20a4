"""Rows of a file, by the native library: cached, read many at once (disk_rows.h)."""

import ctypes
import functools
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from memory_ops.native.row_fetcher import ALL_THERE, STILL_READING, RowFetcher

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "open": (
        _POINTER,
        (_INT32, *[_INT64] * 4, _POINTER, *[_INT64] * 8, ctypes.POINTER(_INT32)),
    ),
    "close": (None, (_POINTER,)),
    "start": (_INT64, (_POINTER, _POINTER, _INT64, _INT64, _INT32, _INT64, _POINTER)),
    "finish": (_INT64, (_POINTER, _POINTER, _INT64, _INT64, ctypes.POINTER(_INT32))),
    "release": (None, (_POINTER, _POINTER, _INT64)),
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


class DiskCounts(NamedTuple):
    """Totals of a layer's lookups, in the order of disk_rows.h."""

    requested_rows: int
    lookups: int
    unique_rows: int
    hits: int
    late: int
    misses: int
    bytes_read: int
    prefetched: int
    prefetched_used: int
    stall_ns: int


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
        if not self._rows:
            raise ValueError("table: is closed")
        return int(self._rows)

    def close(self) -> None:
        """Wait for the reads that are under way, and give everything up."""
        rows, self._rows = self._rows, None
        if rows:
            self._functions["close"](rows)

    def start(self, rows_TL: Tensor, slots_TL: Tensor, *, is_new: bool, layer: int) -> int:
        """Pin slots for the rows of the first so many tokens, and begin to read what is missing.

        Returns how many; ``slots_TL`` has their slots. Both are contiguous int64. ``is_new`` says
        that these are the first of a lookup, ``layer`` whose it is.

        Raises:
            IndexError: a row id lies outside the table.
        """
        num_tokens, token_rows = rows_TL.shape
        shape = num_tokens, token_rows
        arguments = rows_TL.data_ptr(), *shape, is_new, layer, slots_TL.data_ptr()
        done: int = self._functions["start"](self._open_rows, *arguments)
        if done < 0:
            raise IndexError(f"rows: {int(rows_TL.flatten()[-1 - done])} is outside the table")
        return done

    def finish(
        self, slots: Tensor, *, layer: int, on_progress: Callable[[], None]
    ) -> tuple[int, int] | None:
        """Wait for all slots; the index of one that could not be read, and its errno, or None.

        The errno is 0 where the file ends before the row. ``on_progress`` is called about every
        half second as long as reads end or are retried.
        """
        error = _INT32()
        arguments = slots.data_ptr(), slots.numel(), layer, ctypes.byref(error)
        while (index := self._functions["finish"](self._open_rows, *arguments)) == STILL_READING:
            on_progress()
        return None if index == ALL_THERE else (index, error.value)

    def release(self, slots: Tensor) -> None:
        """Unpin what ``start`` has pinned."""
        if self._rows:
            self._functions["release"](self._rows, slots.data_ptr(), slots.numel())

    def hint(self, rows: Tensor, *, layer: int) -> None:
        """Begin to read rows, as many as there is room for, without waiting."""
        self._functions["hint"](self._open_rows, rows.data_ptr(), rows.numel(), layer)

    def fetcher(self, layer: int, on_progress: "ctypes._CFunctionType") -> RowFetcher:
        """What kernels call for a layer's lookups; valid until ``close``, and as long as both."""
        calls = (self._functions[name] for name in ("start", "finish", "release"))
        addresses = [ctypes.cast(call, _POINTER) for call in (*calls, on_progress)]
        return RowFetcher(*(address.value for address in addresses), self._open_rows, layer)

    def lost_error(self) -> int | None:
        """The errno of the last read if all fail now (0: the file ends before it), else None.

        All fail if 8 different rows could not be read one after another, for other errors than
        those that pass by themselves. The first row that is read again ends it.
        """
        error = _INT32()
        is_lost = self._functions["is_lost"](self._open_rows, ctypes.byref(error))
        return error.value if is_lost else None

    def counts(self) -> dict[int, DiskCounts]:
        """Totals so far, by layer."""
        counts = (_INT64 * len(DiskCounts._fields))()
        by_layer = {}
        for layer in range(self._functions["num_layers"](self._open_rows)):
            self._functions["counts"](self._open_rows, layer, counts)
            by_layer[layer] = DiskCounts(*counts)
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
