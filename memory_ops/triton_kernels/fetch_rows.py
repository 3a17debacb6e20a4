"""Rows copied to their places in a cache, as a Triton kernel: one program a piece of a row.

Proven in the interpreter and by compiling to machine code; not run on a GPU, and so not timed.
"""

# triton and with it its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import RowLaunch, on_device_of
from memory_ops.triton_kernels.place_rows import Placed, row_of

# of words of 32 bits: a lane reads 128 bits, a warp 512 bytes, and there are as many warps under
# way as there is room for: reads over a bus wait long
FETCH_LAUNCH = RowLaunch(rows=1, lane_values=4)


def fetch_rows(words_RC: Tensor, placed: Placed, memory_PC: Tensor) -> None:
    """Copy the rows that are not there yet to their places.

    Args:
        words_RC: the table's bytes as words, contiguous; they may lie in page-locked host memory,
            which is then read over the bus.
        placed: which rows, and where to.
        memory_PC: the cache's memory as such words.
    """
    width = words_RC.shape[1]
    block = FETCH_LAUNCH.block(memory_PC.device)
    with on_device_of(memory_PC):
        _fetch_rows[(len(placed.keys_L), triton.cdiv(width, block))](
            words_RC,
            memory_PC,
            placed.keys_L,
            placed.fetch_L,
            WIDTH=width,
            BLOCK=block,
            **FETCH_LAUNCH.options(),
        )


@triton.jit
def _fetch_rows(
    words_ptr, memory_ptr, keys_ptr, fetch_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """memory[fetch[l]] = words[row of key l], where there is one to fetch."""
    reference = tl.program_id(0).to(tl.int64)
    place = tl.load(fetch_ptr + reference)
    if place >= 0:
        row = row_of(tl.load(keys_ptr + reference))
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0)
        tl.store(memory_ptr + place * WIDTH + columns, words, mask=columns < WIDTH)
