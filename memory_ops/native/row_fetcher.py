"""Callbacks through which native kernels fetch missing rows (row_fetcher.h)."""

import ctypes

# as in row_fetcher.h
ALL_THERE, STILL_READING = -1, -2
FAILED = -1  # returned instead of the end of a part
# returned instead of an errno
NO_ROOM, OUTSIDE = -1, -2
START = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p),
)
FINISH = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
)
RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
ON_PROGRESS = ctypes.CFUNCTYPE(None)


class RowFetcher(ctypes.Structure):
    """``memplus::RowFetcher``; its creator keeps the objects alive that it points to."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("finish", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("on_progress", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("layer", ctypes.c_int64),
    )


class ReadFailure(ctypes.Structure):
    """``memplus::ReadFailure``."""

    _fields_ = (
        ("memory", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("error", ctypes.c_int64),
    )
    memory: int
    row: int
    error: int
