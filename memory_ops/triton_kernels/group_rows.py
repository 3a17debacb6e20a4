"""Groups reads by row as a Triton kernel: one program per tile of sorted reads.

Shape suffixes: T tokens, H memory heads, K rows read per head, L = T * H * K reads, U distinct rows
among them.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_references
from memory_ops.sparse_adam import RowGroups
from memory_ops.triton_kernels.launch import on_device_of

# reads that a program places
_TILE, _WARPS = 512, 4


def group_rows(rows_THK: Tensor, weights_THK: Tensor) -> RowGroups:
    """Sort reads by row; the reads of one row keep their order.

    torch sorts the row ids: on a GPU by CUB's radix sort, which reads and writes the ids a fixed
    number of times. A sort in Triton would need a launch for each of many more passes. The call
    waits for the device once, because U is a shape. Not timed on a GPU.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, fp32, fp16 or bf16, ``[T, H, K]``.

    Raises:
        ValueError: rows and weights differ in shape.
        IndexError: a row id is negative.
    """
    check_references(rows_THK, weights_THK)
    sorted_L, order_L = rows_THK.flatten().sort(stable=True)
    count = len(sorted_L)
    if not count:
        weights_L = weights_THK.new_empty(0, dtype=torch.float32)
        return RowGroups(sorted_L, sorted_L.new_zeros(1), order_L, weights_L)
    # the number of each read's row among the distinct rows
    numbers_L = torch.zeros_like(sorted_L)
    numbers_L[1:] = (sorted_L[1:] != sorted_L[:-1]).cumsum(0)
    least, last = torch.stack((sorted_L[0], numbers_L[-1])).tolist()
    if least < 0:
        raise IndexError(f"rows: {least} is outside: row ids are not negative")
    groups = RowGroups(
        sorted_L.new_empty(last + 1),
        sorted_L.new_empty(last + 2),
        torch.empty_like(order_L),
        torch.empty(count, dtype=torch.float32, device=order_L.device),
    )
    per_token = rows_THK.shape[1] * rows_THK.shape[2]
    _launch(sorted_L, order_L, numbers_L, weights_THK.contiguous(), groups, per_token)
    return groups


def _launch(
    sorted_L: Tensor,
    order_L: Tensor,
    numbers_L: Tensor,
    weights_THK: Tensor,
    groups: RowGroups,
    per_token: int,
) -> None:
    with on_device_of(sorted_L):
        _place_reads[(triton.cdiv(len(sorted_L), _TILE),)](
            sorted_L,
            order_L,
            numbers_L,
            weights_THK,
            groups.rows_U,
            groups.starts_U1,
            groups.tokens_L,
            groups.weights_L,
            len(sorted_L),
            PER_TOKEN=per_token,
            TILE=_TILE,
            num_warps=_WARPS,
            num_stages=1,
        )


@triton.jit(do_not_specialize=["num_reads"])
def _place_reads(
    sorted_ptr,
    order_ptr,
    numbers_ptr,
    weights_ptr,
    rows_ptr,
    starts_ptr,
    tokens_ptr,
    grouped_weights_ptr,
    num_reads,
    PER_TOKEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write each read's token and weight; a row's first read also writes the row and its start."""
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = places < num_reads
    order = tl.load(order_ptr + places, mask=live, other=0)
    tl.store(tokens_ptr + places, order // PER_TOKEN, mask=live)
    weights = tl.load(weights_ptr + order, mask=live, other=0.0)
    tl.store(grouped_weights_ptr + places, weights.to(tl.float32), mask=live)
    numbers = tl.load(numbers_ptr + places, mask=live, other=0)
    before = tl.load(numbers_ptr + places - 1, mask=live & (places > 0), other=-1)
    is_first = live & ((places == 0) | (numbers != before))
    rows = tl.load(sorted_ptr + places, mask=is_first, other=0)
    tl.store(rows_ptr + numbers, rows, mask=is_first)
    tl.store(starts_ptr + numbers, places, mask=is_first)
    tl.store(starts_ptr + numbers + 1, places + 1, mask=places == num_reads - 1)
