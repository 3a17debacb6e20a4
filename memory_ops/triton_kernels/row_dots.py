"""Inner products of table rows and vectors as Triton kernels: one program per tile of rows.

Shape suffixes: T tokens, H memory heads, K rows read per head, C = H * K choices of a token, R rows
of the table, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import Table, check_vectors
from memory_ops.triton_kernels.int4_rows import dot_int4_rows
from memory_ops.triton_kernels.launch import RowLaunch, constant_row_stride, on_device_of
from memory_ops.triton_kernels.table_view import (
    TableView,
    ValueKind,
    has_int4_words,
    row_values,
    table_view,
    times_row_scale,
    value_kind,
)

# by the kind of the table's values; columns of both int4 kinds are words
DOT_LAUNCHES: dict[ValueKind, RowLaunch] = {
    "fp32": RowLaunch(rows=2, columns=512),
    "fp16": RowLaunch(rows=2, columns=512),
    "bf16": RowLaunch(rows=2, columns=512),
    "int8": RowLaunch(rows=2, columns=512),
    "fp8": RowLaunch(rows=2, columns=512),
    "int4": RowLaunch(rows=2, columns=128),
    "int4_row": RowLaunch(rows=2, columns=128),
}


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    This is the gradient of ``gather_rows`` in its weights, and the first half of PEER. As there,
    the table may be in pinned host memory while the other operands are on the GPU.

    Args:
        table: as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R); they are not checked.
        x_TV: one vector per token, fp32, fp16 or bf16, ``[T, V]``.

    Returns:
        ``dots_THK``, fp32 ``[T, H, K]`` on the rows' device, accumulated in fp32.

    Raises:
        ValueError: the shapes do not match, or table or x has another dtype.
    """
    check_vectors(table, rows_THK, x_TV)
    dots_THK = torch.empty(rows_THK.shape, dtype=torch.float32, device=rows_THK.device)
    row_dots_into(dots_THK, table, rows_THK, x_TV)
    return dots_THK


def row_dots_into(dots_THK: Tensor, table: Table, rows_THK: Tensor, x_TV: Tensor) -> None:
    """Like ``row_dots`` on checked operands, into contiguous fp32 ``[T, H, K]``.

    Raises:
        ValueError: table or x has another dtype.
    """
    view = table_view(table)
    value_kind("x", x_TV)
    num_tokens, num_choices = len(rows_THK), rows_THK.shape[1] * rows_THK.shape[2]
    rows_TC = rows_THK.reshape(num_tokens, num_choices).contiguous()
    x_TV = x_TV if x_TV.stride(1) == 1 else x_TV.contiguous()
    if dots_THK.numel():
        _launch(view, rows_TC, x_TV, dots_THK.view(num_tokens, num_choices))


def _launch(view: TableView, rows_TC: Tensor, x_TV: Tensor, dots_TC: Tensor) -> None:
    launch = DOT_LAUNCHES[view.kind]
    num_tokens, num_choices = rows_TC.shape
    kernel = dot_int4_rows if has_int4_words(view.kind) else _dot_rows
    with on_device_of(rows_TC):
        kernel[(num_tokens, triton.cdiv(num_choices, launch.rows))](
            view.values,
            view.scales,
            rows_TC,
            x_TV,
            dots_TC,
            num_choices,
            **view.constants(),
            X_STRIDE=constant_row_stride(x_TV),
            ROWS=launch.rows,
            BLOCK=launch.columns,
            **launch.options(),
        )


@triton.jit
def _dot_rows(
    values_ptr,
    scales_ptr,
    rows_ptr,
    x_ptr,
    dots_ptr,
    num_choices,
    KIND: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dots[t, c] = sum over v of table[rows[t, c], v] * x[t, v].

    Each lane sums its products over the blocks of a row; one reduction at the end sums the lanes.
    """
    token = tl.program_id(0).to(tl.int64)
    choices = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = choices < num_choices
    rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        # x is 0 past V, so that bytes after a record's values add nothing
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * X_STRIDE + columns, mask=columns < VALUE_DIM, other=0.0)
        mask = live[:, None] & (columns < WIDTH)[None, :]
        values = row_values(values_ptr, rows, columns, mask, ROW_STRIDE, KIND)
        sums += values * x.to(tl.float32)[None, :]
    dots = times_row_scale(
        tl.sum(sums, axis=1), scales_ptr, rows, live, SCALE_STRIDE, SCALE_START, KIND
    )
    tl.store(dots_ptr + token * num_choices + choices, dots, mask=live)
