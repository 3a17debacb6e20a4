"""Squared norms of the rows' gradients as a Triton kernel: one program per row and block.

Shape suffixes: T tokens, U distinct rows, B blocks of columns, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_groups
from memory_ops.sparse_adam import RowGroups
from memory_ops.triton_kernels.launch import on_device_of
from memory_ops.triton_kernels.segment_sums import SegmentSums, segment_sums


def squared_norm(groups: RowGroups, grad_TV: Tensor) -> float:
    """The squared norm of a table's gradient: its part of the norm that clipping uses.

    The gradients of rows are not stored: a later step sums them again, which takes less memory
    traffic. The call waits for the device. Not timed on a GPU.

    Args:
        groups: the reads; see ``group_rows``.
        grad_TV: the gradient of the gathered sums, fp32, fp16 or bf16, ``[T, V]``.

    Raises:
        ValueError: the gradient is not a matrix of such a dtype.
    """
    check_groups(groups, grad_TV)
    return float(row_squares(SegmentSums(groups, grad_TV)).double().sum())


def row_squares(segments: SegmentSums) -> Tensor:
    """The sums of squares of each row's gradient, by block of columns, fp32 ``[U, B]``."""
    squares_UB = torch.empty(segments.grid, dtype=torch.float32, device=segments.operands[0].device)
    if squares_UB.numel():
        with on_device_of(squares_UB):
            _sum_squares[segments.grid](*segments.operands, squares_UB, **segments.constants)
    return squares_UB


@triton.jit
def _sum_squares(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    squares_ptr,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """squares[u, b] = the sum of squares of the sums of segment u in the columns of block b."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = segment_sums(
        tokens_ptr,
        weights_ptr,
        starts_ptr,
        grad_ptr,
        chunks_ptr,
        segment,
        columns,
        VALUE_DIM,
        GRAD_STRIDE,
        ROWS,
        BLOCK,
        CHUNK,
    )
    place = segment * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + place, tl.sum(sums * sums, axis=0))
