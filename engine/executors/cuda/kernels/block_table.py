"""Updates of the block table on the device, as a Triton kernel."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

_UPDATES = 128


def update_block_table(block_table_PB: Tensor, updates_N3: Tensor, count_1: Tensor) -> None:
    """Write the first ``count_1`` updates into the block table, in place.

        block_table[updates[i, 0], updates[i, 1]] = updates[i, 2]     for i < count

    Never waits for the device, and branches on shapes alone, so CUDA graphs can capture it.

    Args:
        block_table_PB: int32 ids of KV blocks, with any row stride, one row per seat.
        updates_N3: int64 triples (seat, column, block id), contiguous; seat and column are distinct
            up to the count. They are not checked: an invalid one writes memory out of bounds.
        count_1: int64, one number, at most N.
    """
    if not len(updates_N3):
        return
    with on_device_of(block_table_PB):
        _update_block_table[(triton.cdiv(len(updates_N3), _UPDATES),)](
            block_table_PB,
            updates_N3,
            count_1,
            ROW_STRIDE=constant_row_stride(block_table_PB),
            UPDATES=_UPDATES,
            num_warps=_UPDATES // 32,
            num_stages=1,
            enable_fp_fusion=True,
        )


def update_block_table_reference(
    block_table_PB: Tensor, updates_N3: Tensor, count_1: Tensor
) -> None:
    """``update_block_table`` in plain torch; it waits for the device."""
    seats, columns, block_ids = updates_N3[: int(count_1)].T
    block_table_PB[seats, columns] = block_ids.to(block_table_PB)


@triton.jit
def _update_block_table(
    block_table_ptr, updates_ptr, count_ptr, ROW_STRIDE: tl.constexpr, UPDATES: tl.constexpr
):
    """block_table[seat, column] = block id; programs past the count store nothing."""
    index = tl.program_id(0).to(tl.int64) * UPDATES + tl.arange(0, UPDATES)
    live = index < tl.load(count_ptr)
    seats = tl.load(updates_ptr + index * 3, mask=live, other=0)
    columns = tl.load(updates_ptr + index * 3 + 1, mask=live, other=0)
    block_ids = tl.load(updates_ptr + index * 3 + 2, mask=live, other=0)
    tl.store(block_table_ptr + seats * ROW_STRIDE + columns, block_ids.to(tl.int32), mask=live)
