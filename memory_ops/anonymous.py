"""Allocates CPU tensors on memory mappings; unwritten pages take no memory."""

import functools
import logging
import math
import mmap

import torch
from torch import Tensor

# glibc never reuses a freed block of this size, whatever its thresholds
_ALWAYS_MAPPED_BYTES = 32 * 2**20

logger = logging.getLogger(__name__)


def anonymous_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A non-empty CPU tensor of zeros on private anonymous memory, with huge pages if possible.

    The kernel allocates a page when it is first written. Random reads of a large tensor miss the
    TLB on 4 kB pages, which costs up to half the bandwidth. If the kernel has no huge pages, the
    tensor uses small ones, with one warning per process.

    Raises:
        OSError: the system has not enough memory.
    """
    memory = _mapping(math.prod(shape) * dtype.itemsize)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        _log_small_pages(error.strerror)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def unpooled_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros whose memory is free for the whole system once the tensor is freed.

    malloc keeps freed memory for later. The pages are small: to make huge ones, the kernel may move
    others, which takes three times as long as reading a row patch.

    Raises:
        OSError: the system has not enough memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_mapping(num_bytes), dtype=dtype).view(shape)


def uninitialized(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like ``torch.empty`` on the CPU, but with huge pages for tensors of 32 MiB and more."""
    if math.prod(shape) * dtype.itemsize < _ALWAYS_MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return anonymous_zeros(shape, dtype)


def _mapping(num_bytes: int) -> mmap.mmap:
    # shared memory, mmap's default, gets no transparent huge pages
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@functools.cache  # once a process
def _log_small_pages(reason: str) -> None:
    logger.warning("no transparent huge pages (%s): random reads of tables are slower", reason)
