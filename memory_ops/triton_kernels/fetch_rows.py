"""Copies missing rows into a cache, as a Triton kernel: one program per piece of a row."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import RowLaunch, on_device_of
from memory_ops.triton_kernels.sort_rows import row_of

# in 32-bit words: a lane reads 128 bits at once, twice on NVIDIA GPUs
_WARP_WORDS, _MOST_WARPS = 256, 2


def fetch_rows(words_RC: Tensor, keys_L: Tensor, fetch_L: Tensor, memory_PC: Tensor) -> None:
    """Copy missing rows to their places in the cache.

    Args:
        words_RC: the table's bytes as words, contiguous, on the GPU or in page-locked host memory.
        keys_L: the rows' keys; see ``SortedRows``.
        fetch_L: destination places; see ``Placed``.
        memory_PC: the cache's memory as words of the same size.
    """
    width = words_RC.shape[1]
    launch = _launch_for(width)
    with on_device_of(memory_PC):
        _fetch_rows[(len(keys_L), triton.cdiv(width, launch.columns))](
            words_RC,
            memory_PC,
            keys_L,
            fetch_L,
            WIDTH=width,
            BLOCK=launch.columns,
            **launch.options(),
        )


def _launch_for(width: int) -> RowLaunch:
    """One program per row if it fits: most programs fetch nothing and cost only their launch."""
    warps = min(_MOST_WARPS, triton.next_power_of_2(triton.cdiv(width, _WARP_WORDS)))
    return RowLaunch(rows=1, columns=_WARP_WORDS * warps, num_warps=warps)


@triton.jit
def _fetch_rows(
    words_ptr, memory_ptr, keys_ptr, fetch_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """memory[fetch[l]] = words[row of key l] for fetch[l] >= 0."""
    reference = tl.program_id(0).to(tl.int64)
    place = tl.load(fetch_ptr + reference)
    if place >= 0:
        row = row_of(tl.load(keys_ptr + reference))
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0)
        tl.store(memory_ptr + place * WIDTH + columns, words, mask=columns < WIDTH)
