"""The Adam step of the rows that were read as Triton kernels: one program per row and block.

Shape suffixes: T tokens, U distinct rows, R rows of the table, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_adam
from memory_ops.sparse_adam import AdamMoments, AdamStep, RowGroups
from memory_ops.triton_kernels.launch import on_device_of
from memory_ops.triton_kernels.segment_sums import SegmentSums, segment_sums
from memory_ops.triton_kernels.squared_norm import row_squares


def sparse_adam(
    table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor, step: AdamStep
) -> None:
    """Update the rows that were read, and their moments, by one step of Adam, in place.

    See ``reference.sparse_adam`` for the formulas. A program sums a row's gradient and updates the
    row at once, so gradients of rows are never stored. The same input gives the same bits. The call
    does not wait for the device. Not timed on a GPU.

    Args:
        table_RV: the rows, fp32, contiguous.
        moments: Adam's moments, contiguous, fp32, or bf16 for two moments per value.
        groups: the reads; see ``group_rows``. Row ids are not checked on a GPU.
        grad_TV: the gradient of the gathered sums, fp32, fp16 or bf16, ``[T, V]``.
        step: the hyperparameters.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_adam(table_RV, moments, groups, grad_TV)
    if not len(groups.rows_U):
        return
    segments = SegmentSums(groups, grad_TV)
    first_RV, second = moments
    with on_device_of(table_RV):
        if first_RV is None:
            factors_U = _row_wise_factors(segments, second, groups.rows_U, step)
            _add_scaled[segments.grid](
                *segments.operands, groups.rows_U, table_RV, factors_U, **segments.constants
            )
            return
        _update_values[segments.grid](
            *segments.operands,
            groups.rows_U,
            table_RV,
            first_RV,
            second,
            step.scale,
            step.step_size,
            step.beta1,
            1 - step.beta1,
            step.beta2,
            1 - step.beta2,
            step.eps,
            **segments.constants,
        )


def _row_wise_factors(
    segments: SegmentSums, second_R: Tensor, rows_U: Tensor, step: AdamStep
) -> Tensor:
    """Update the rows' moments; return the factor of each row's gradient.

    A row's moment needs the whole row, which several programs hold: so the squares come first. The
    rest is torch's, because it is one number per row.
    """
    width = segments.constants["VALUE_DIM"]
    means_U = row_squares(segments).sum(1) * (step.scale**2 / width)
    second_U = second_R[rows_U] * step.beta2 + means_U * (1 - step.beta2)
    second_R[rows_U] = second_U
    factors_U: Tensor = -step.scale * step.step_size / (second_U.sqrt() + step.eps)
    return factors_U


@triton.jit
def _update_values(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    rows_ptr,
    table_ptr,
    first_ptr,
    second_ptr,
    scale,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row's columns of a block: both moments, then the row. Sums are in fp32."""
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
    in_row = columns < VALUE_DIM
    places = tl.load(rows_ptr + segment) * VALUE_DIM + columns
    g = sums * scale
    m = tl.load(first_ptr + places, mask=in_row, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(second_ptr + places, mask=in_row, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    row = tl.load(table_ptr + places, mask=in_row, other=0.0)
    tl.store(first_ptr + places, m.to(first_ptr.dtype.element_ty), mask=in_row)
    tl.store(second_ptr + places, v.to(second_ptr.dtype.element_ty), mask=in_row)
    tl.store(table_ptr + places, row - step_size * m / (tl.sqrt(v) + eps), mask=in_row)


@triton.jit
def _add_scaled(
    tokens_ptr,
    weights_ptr,
    starts_ptr,
    grad_ptr,
    chunks_ptr,
    rows_ptr,
    table_ptr,
    factors_ptr,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """table[rows[u]] += factors[u] * the sum of segment u."""
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
    places = tl.load(rows_ptr + segment) * VALUE_DIM + columns
    row = tl.load(table_ptr + places, mask=columns < VALUE_DIM, other=0.0)
    tl.store(
        table_ptr + places,
        row + sums * tl.load(factors_ptr + segment),
        mask=columns < VALUE_DIM,
    )
