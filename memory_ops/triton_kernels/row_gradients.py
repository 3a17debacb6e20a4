"""The table gradient of ``gather_rows`` as a Triton kernel: one program per distinct row.

Shape suffixes: T tokens, H memory heads, K rows read per head, U distinct rows, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_gradients
from memory_ops.triton_kernels.group_rows import group_rows
from memory_ops.triton_kernels.launch import on_device_of
from memory_ops.triton_kernels.segment_sums import SegmentSums, segment_sums
from memory_ops.triton_kernels.table_view import value_kind


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` in its table: of the rows that were read.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    The same input gives the same bits (see ``segment_sums``). The call waits for the device once,
    because U is a shape. Not timed on a GPU.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        grad_TV: the gradient of the gathered sums, fp32, fp16 or bf16, ``[T, V]``.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, fp32
        ``[U, V]``.

    Raises:
        ValueError: the shapes do not match, or the gradient has another dtype.
        IndexError: a row id is negative.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    value_kind("grad", grad_TV)
    groups = group_rows(rows_THK, weights_THK)
    sums_UV = torch.empty(
        (len(groups.rows_U), grad_TV.shape[1]), dtype=torch.float32, device=grad_TV.device
    )
    if sums_UV.numel():
        segments = SegmentSums(groups, grad_TV)
        with on_device_of(sums_UV):
            _store_sums[segments.grid](*segments.operands, sums_UV, **segments.constants)
    return groups.rows_U, sums_UV


@triton.jit
def _store_sums(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    sums_ptr,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sums[u, v] = the sum of segment u."""
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
    tl.store(sums_ptr + segment * VALUE_DIM + columns, sums, mask=columns < VALUE_DIM)
