"""Weighted sums of table rows as Triton kernels: one program per token and block of values.

Shape suffixes: T tokens, H memory heads, K rows read per head, C = H * K choices of a token, R rows
of the table, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import Table, check_rows, table_shape
from memory_ops.triton_kernels.int4_rows import sum_int4_rows
from memory_ops.triton_kernels.launch import RowLaunch, on_device_of
from memory_ops.triton_kernels.table_view import (
    TableView,
    ValueKind,
    has_int4_words,
    row_values,
    table_view,
    times_row_scale,
)

# by the kind of the table's values; kernels of int4 words require the 16 of a block
GATHER_LAUNCHES: dict[ValueKind, RowLaunch] = {
    "fp32": RowLaunch(rows=64, columns=64),
    "fp16": RowLaunch(rows=64, columns=64),
    "bf16": RowLaunch(rows=64, columns=64),
    "int8": RowLaunch(rows=64, columns=128),
    "fp8": RowLaunch(rows=64, columns=128),
    "int4": RowLaunch(rows=64, columns=16),
    # one warp would spill on sm_100
    "int4_row": RowLaunch(rows=64, columns=16, num_warps=2),
}


def gather_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> Tensor:
    """Sum weighted table rows over heads and choices: ``out[t] = sum_hk w[t,h,k] * table[row]``.

    The table may be in pinned host memory while rows and weights are on the GPU. The kernel then
    reads parts of rows over the bus, through unified virtual addresses. ``HostTable`` is faster: it
    reads whole rows, each once.

    Args:
        table: the value table, ``[R, V]`` of fp32, fp16 or bf16 with any row stride, or records.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R). They are not checked, because the
            host would have to wait for the device: an invalid id reads memory out of bounds.
        weights_THK: one weight per row, floating, ``[T, H, K]``.

    Returns:
        ``out_TV``, fp32 ``[T, V]`` on the rows' device, accumulated in fp32.

    Raises:
        ValueError: rows and weights differ in shape, the table is not a matrix of those dtypes, or
            (from triton) the GPU cannot access the table's memory.
    """
    check_rows(table, rows_THK, weights_THK)
    shape = len(rows_THK), table_shape(table)[1]
    out_TV = torch.empty(shape, dtype=torch.float32, device=rows_THK.device)
    gather_rows_into(out_TV, table, rows_THK, weights_THK)
    return out_TV


def gather_rows_into(out_TV: Tensor, table: Table, rows_THK: Tensor, weights_THK: Tensor) -> None:
    """Like ``gather_rows`` on checked operands, into contiguous fp32 ``[T, V]``."""
    view = table_view(table)
    num_tokens, num_choices = len(rows_THK), rows_THK.shape[1] * rows_THK.shape[2]
    rows_TC = rows_THK.reshape(num_tokens, num_choices).contiguous()
    weights_TC = weights_THK.reshape(num_tokens, num_choices).contiguous()
    if out_TV.numel():
        _launch(view, rows_TC, weights_TC, out_TV)


def _launch(view: TableView, rows_TC: Tensor, weights_TC: Tensor, out_TV: Tensor) -> None:
    launch = GATHER_LAUNCHES[view.kind]
    kernel = sum_int4_rows if has_int4_words(view.kind) else _sum_rows
    with on_device_of(rows_TC):
        kernel[(len(rows_TC), triton.cdiv(view.width, launch.columns))](
            view.values,
            view.scales,
            rows_TC,
            weights_TC,
            out_TV,
            rows_TC.shape[1],
            **view.constants(),
            ROWS=launch.rows,
            BLOCK=launch.columns,
            **launch.options(),
        )


@triton.jit
def _sum_rows(
    values_ptr,
    scales_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    num_choices,
    KIND: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, v] = sum over c of weights[t, c] * table[rows[t, c], v]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_choices, ROWS):
        choices = start + tl.arange(0, ROWS)
        live = choices < num_choices
        rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
        weights = tl.load(weights_ptr + token * num_choices + choices, mask=live, other=0.0)
        weights = times_row_scale(
            weights.to(tl.float32), scales_ptr, rows, live, SCALE_STRIDE, SCALE_START, KIND
        )
        mask = live[:, None] & (columns < WIDTH)[None, :]
        values = row_values(values_ptr, rows, columns, mask, ROW_STRIDE, KIND)
        sums += tl.sum(weights[:, None] * values, axis=0)
    tl.store(out_ptr + token * VALUE_DIM + columns, sums, mask=columns < VALUE_DIM)
