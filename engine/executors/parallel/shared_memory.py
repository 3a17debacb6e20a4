"""Memory that the ranks of one machine share, through which they exchange small tensors."""

import ctypes
import functools
import mmap
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# a step's activations; gloo sends what is larger, which takes longer than its start anyway
MOST_BYTES = 2**20
_LINE = 64  # bytes of a rank's line of counters: what it has arrived at
_CHECK_US = 100_000  # between checks whether the others live
_NAME = "shared"


class RankGoneError(RuntimeError):
    """Another rank has ended, or does not answer."""


class SharedMemory:
    """A buffer of each rank, twice: while ranks read one, they may write the other.

    All ranks call ``exchange`` in the same order. A rank that writes a buffer again has seen all
    others arrive at the exchange in between, so they have read what was in it.
    """

    def __init__(self, folder: Path, rank: int, pids: Sequence[int], timeout_s: float) -> None:
        """Map what ``create`` made in ``folder``; ``pids`` are the processes of all ranks."""
        self._rank, self._pids, self._timeout_s = rank, tuple(pids), timeout_s
        self._round = 0
        size = len(self._pids)
        with open(folder / _NAME, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping
        self._lines = whole[: size * _LINE]
        self._buffers_2RB = whole[size * _LINE :].view(2, size, MOST_BYTES)

    @staticmethod
    def num_bytes(size: int) -> int:
        """Bytes of the memory of ``size`` ranks."""
        return size * (_LINE + 2 * MOST_BYTES)

    @staticmethod
    def create(folder: Path, size: int) -> None:
        """Make the memory of ``size`` ranks; OSError if the folder has no room."""
        with open(folder / _NAME, "xb") as file:
            # now, because a page that is missing later ends the process
            os.posix_fallocate(file.fileno(), 0, SharedMemory.num_bytes(size))

    def exchange(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, ``[size, *x.shape]``, valid until the next call.

        Raises:
            RankGoneError: a rank has ended, or did not call this in time.
        """
        data = x.contiguous().view(-1).view(torch.uint8)
        self._round += 1
        buffers_RB = self._buffers_2RB[self._round % 2, :, : len(data)]
        buffers_RB[self._rank] = data
        self._arrive()
        return buffers_RB.view(x.dtype).view(len(self._pids), *x.shape)

    def leave(self) -> None:
        """End the waits of the other ranks; this one exchanges nothing any more."""
        _library().memplus_leave(self._lines.data_ptr(), self._rank)

    def _arrive(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        arguments = self._lines.data_ptr(), self._rank, len(self._pids), self._round, _CHECK_US
        while (status := _library().memplus_arrive(*arguments)) != 1:
            if status < 0:
                raise RankGoneError("a rank has left")
            for rank, pid in enumerate(self._pids):
                if not _is_alive(pid):
                    raise RankGoneError(f"rank {rank} has died")
            if time.monotonic() > deadline:
                raise RankGoneError(f"a rank did not answer within {self._timeout_s:g} s")


def is_available() -> bool:
    """Whether the installation of memplus built the library."""
    return _file().exists()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _file() -> Path:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return Path(__file__).parent / "native" / f"arrivals{suffix}"


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_file()))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.memplus_arrive.argtypes = (pointer, integer, integer, ctypes.c_uint64, integer)
    library.memplus_arrive.restype = ctypes.c_int32
    library.memplus_leave.argtypes = (pointer, integer)
    library.memplus_leave.restype = None
    return library
