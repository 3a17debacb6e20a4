"""Memory for large tensors that are filled bit by bit: untouched pages take no room."""

import functools
import logging
import math
import mmap

import torch
from torch import Tensor

# glibc keeps no freed block of this size for the next call, however its thresholds are set
_ALWAYS_MAPPED_BYTES = 32 * 2**20

logger = logging.getLogger(__name__)


def anonymous_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor, not empty, of zeros on private anonymous memory; huge pages are asked for.

    A page is taken when it is first written. Random reads of a large tensor miss the TLB on 4 kB
    pages, which costs up to half the bandwidth. If the kernel has no huge pages, small ones do,
    and the log says so once.

    Raises:
        OSError: the system has no such memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    # shared memory, which is mmap's default, gets no transparent huge pages
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        _log_small_pages(error.strerror)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As ``torch.empty`` on the CPU; on huge pages where it would take fresh ones at every call."""
    if math.prod(shape) * dtype.itemsize < _ALWAYS_MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return anonymous_zeros(shape, dtype)


@functools.cache  # once a process
def _log_small_pages(reason: str) -> None:
    logger.warning("no transparent huge pages (%s): random reads of tables are slower", reason)
