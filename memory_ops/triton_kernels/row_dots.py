"""Inner products of table rows and vectors as Triton kernels: one program a token and some rows.

Shape suffixes: T tokens, H memory heads, K rows read per head, C = H * K choices of a token, R rows
of the table, V value width.
"""

# triton and with it its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import Table, check_vectors
from memory_ops.triton_kernels.int4_rows import dot_int4_rows
from memory_ops.triton_kernels.launch import RowLaunch, on_device_of, row_step
from memory_ops.triton_kernels.table_view import (
    TableView,
    ValueKind,
    row_values,
    table_view,
    times_row_scale,
    value_kind,
)

# by the kind of the table's values, of int4 words
DOT_LAUNCHES: dict[ValueKind, RowLaunch] = {
    "fp32": RowLaunch(rows=2, columns=512),
    "fp16": RowLaunch(rows=2, columns=512),
    "bf16": RowLaunch(rows=2, columns=512),
    "int8": RowLaunch(rows=2, columns=512),
    "fp8": RowLaunch(rows=2, columns=512),
    "int4": RowLaunch(rows=2, columns=128),
}


def row_dots(table: Table, rows_THK: Tensor, x_TV: Tensor) -> Tensor:
    """Inner products of table rows and each token's vector: ``table[row[t,h,k]] . x[t]``.

    The gradient of ``gather_rows`` by its weights, and the first half of PEER. As there, the table
    may lie in pinned host memory while the rest lies on the GPU.

    Args:
        table: as for ``gather_rows``.
        rows_THK: row ids, int64, ``[T, H, K]``, each in [0, R), which is not checked.
        x_TV: a vector a token, fp32, fp16 or bf16, ``[T, V]``.

    Returns:
        ``dots_THK``, fp32 ``[T, H, K]`` on the rows' device, accumulated in fp32.

    Raises:
        ValueError: the shapes do not fit together, or table or x has another dtype.
    """
    check_vectors(table, rows_THK, x_TV)
    dots_THK = torch.empty(rows_THK.shape, dtype=torch.float32, device=rows_THK.device)
    row_dots_into(dots_THK, table, rows_THK, x_TV)
    return dots_THK


def row_dots_into(dots_THK: Tensor, table: Table, rows_THK: Tensor, x_TV: Tensor) -> None:
    """As ``row_dots``, of operands that fit together, into contiguous fp32 ``[T, H, K]``.

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
    kernel = dot_int4_rows if view.kind == "int4" else _dot_rows
    with on_device_of(rows_TC):
        kernel[(num_tokens, triton.cdiv(num_choices, launch.rows))](
            view.values,
            view.scales,
            rows_TC,
            x_TV,
            dots_TC,
            num_choices,
            **view.constants(),
            X_STRIDE=row_step(x_TV),
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

    Products are summed lane by lane over the blocks of a row; the lanes meet once, at the end.
    """
    token = tl.program_id(0).to(tl.int64)
    choices = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = choices < num_choices
    rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        # zero where a record is read past its values, so that what stands there adds nothing
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * X_STRIDE + columns, mask=columns < VALUE_DIM, other=0.0)
        mask = live[:, None] & (columns < WIDTH)[None, :]
        values = row_values(values_ptr, rows, columns, mask, ROW_STRIDE, KIND)
        sums += values * x.to(tl.float32)[None, :]
    dots = times_row_scale(
        tl.sum(sums, axis=1), scales_ptr, rows, live, SCALE_STRIDE, SCALE_START, KIND
    )
    tl.store(dots_ptr + token * num_choices + choices, dots, mask=live)
