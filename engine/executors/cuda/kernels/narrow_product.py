"""The Triton kernel of products with few rows, which reads the weight once.

Shape suffixes: M rows of x, K width of x, N rows of the weight, O output columns: N, or N / 2 if
the product is gated; S parts of K.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.grouped_tiles import weight_arrays, weight_sums
from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.product_tiles import (
    MOST_BLOCK_M,
    ProductLaunch,
    block_m_for,
    launch_for,
)
from engine.executors.cuda.kernels.silu_gate import silu
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# split K if fewer programs than this would run, into parts of at least this width; not timed on a
# GPU
_FEW_PROGRAMS, _LEAST_WIDTH = 64, 1024


def num_splits(launch: ProductLaunch, outputs: int, width: int) -> int:
    """Number of parts into which K is split; separate programs compute each part."""
    programs = -(-outputs // launch.block_n)
    return max(1, min(_FEW_PROGRAMS // programs, width // _LEAST_WIDTH))


def narrow_linear(operands: LinearOperands) -> Tensor:
    """``linear`` of at most 64 rows as one Triton kernel, on checked operands.

    It multiplies x by the norm's weight, rounds that to the dtype of x (an fp16 product above 65504
    overflows), and multiplies the sums by ``1 / sqrt(mean(x^2) + eps)``. Sums are fp32; the result
    is rounded once. Groups are rounded to the dtype of x first, like their dense copy. If few
    programs would run, K is split and a second launch adds the parts in order. A row's bits are the
    same every time and do not depend on the other rows.
    """
    x_MK, out_MO = operands.x_MK, operands.out_MO
    assert len(x_MK) <= MOST_BLOCK_M
    if out_MO is None:
        shape = len(x_MK), operands.num_outputs
        out_MO = torch.empty(shape, dtype=x_MK.dtype, device=x_MK.device)
    if out_MO.numel():
        _launch(operands, out_MO)
    return out_MO


def _launch(operands: LinearOperands, out_MO: Tensor) -> None:
    x_MK, residual_MO = operands.x_MK, operands.residual_MO
    (num_rows, outputs), width, is_gated = out_MO.shape, x_MK.shape[1], operands.is_gated
    norm_K, eps = operands.norm or (None, None)
    block_m = block_m_for(num_rows)
    weights, bits = weight_arrays(operands.weight_NK)
    has_groups = bits is not None
    launch = launch_for(x_MK, outputs, block_m, is_gated=is_gated, has_groups=has_groups)
    splits = num_splits(launch, outputs, width)
    steps = triton.cdiv(width, splits * launch.block_k)
    sums_SMO = squares_SM = None
    if splits > 1:
        shape = splits, 1 + is_gated, num_rows, outputs
        sums_SMO = torch.empty(shape, dtype=torch.float32, device=out_MO.device)
        squares_SM = torch.empty((splits, num_rows), dtype=torch.float32, device=out_MO.device)
    tensors = norm_K, operands.bias_N, residual_MO, out_MO, sums_SMO, squares_SM
    constants = {
        "K": width,
        "OUTPUTS": outputs,
        "SPLITS": splits,
        "EPS": eps,
        "IS_GATED": is_gated,
        "X_STRIDE": constant_row_stride(x_MK),
        "WEIGHT_STRIDE": constant_row_stride(weights[0]),
        "BITS": bits,
        "RESIDUAL_STRIDE": 0 if residual_MO is None else constant_row_stride(residual_MO),
        "OUT_STRIDE": constant_row_stride(out_MO),
        "STEPS": steps,
        "IS_EVEN": steps * splits * launch.block_k == width,
        "BLOCK_M": block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    options = constants | launch.options()
    num_tiles = triton.cdiv(outputs, launch.block_n)
    with on_device_of(out_MO):
        _multiply[(num_tiles, splits)](
            x_MK, *weights, *tensors, num_rows, ADDS_PARTS=False, **options
        )
        if splits > 1:
            _multiply[(num_tiles, 1)](
                x_MK, *weights, *tensors, num_rows, ADDS_PARTS=True, **options
            )


@triton.jit
def _added_parts(
    sums_ptr,
    squares_ptr,
    rows,
    columns,
    num_rows,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """The sums that ``_multiply`` stored, added in the order of the parts."""
    is_row = rows < num_rows
    live = is_row[:, None] & (columns < OUTPUTS)[None, :]
    places = rows[:, None] * OUTPUTS + columns[None, :]
    sums = tl.zeros(live.shape, dtype=tl.float32)
    ups = tl.zeros(live.shape, dtype=tl.float32)
    squares = tl.zeros(rows.shape, dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        part_ptr = sums_ptr + part * (1 + IS_GATED) * num_rows * OUTPUTS
        sums += tl.load(part_ptr + places, mask=live, other=0.0)
        if IS_GATED:
            ups += tl.load(part_ptr + num_rows * OUTPUTS + places, mask=live, other=0.0)
        squares += tl.load(squares_ptr + part * num_rows + rows, mask=is_row, other=0.0)
    return sums, ups, squares


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_ptr,
    weight_ptr,
    scales_ptr,
    minimums_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    sums_ptr,
    squares_ptr,
    num_rows,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    IS_GATED: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADDS_PARTS: tl.constexpr,
):
    """out = y + residual,  y = g or silu(g) * u,  g, u = norm(x) W^T + bias, by tile of columns.

    If K is split, one launch stores the sums of each part, and the next one adds them in order.
    """
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ADDS_PARTS:
        sums, ups, squares = _added_parts(
            sums_ptr, squares_ptr, rows, columns, num_rows, OUTPUTS, SPLITS, IS_GATED
        )
    else:
        sums, ups, squares = weight_sums(
            x_ptr + rows * X_STRIDE,
            rows < num_rows,
            weight_ptr,
            scales_ptr,
            minimums_ptr,
            columns.to(tl.int64),
            columns < OUTPUTS,
            norm_ptr,
            split * STEPS * BLOCK_K,
            K,
            STEPS,
            IS_EVEN,
            IS_GATED,
            OUTPUTS,
            WEIGHT_STRIDE,
            BITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    live = (rows < num_rows)[:, None] & (columns < OUTPUTS)[None, :]
    if SPLITS > 1 and not ADDS_PARTS:
        places = rows[:, None] * OUTPUTS + columns[None, :]
        part_ptr = sums_ptr + split.to(tl.int64) * (1 + IS_GATED) * num_rows * OUTPUTS
        tl.store(part_ptr + places, sums, mask=live)
        if IS_GATED:
            tl.store(part_ptr + num_rows * OUTPUTS + places, ups, mask=live)
        # every tile of columns has the same sums of squares
        is_first = (rows < num_rows) & (tl.program_id(0) == 0)
        tl.store(squares_ptr + split * num_rows + rows, squares, mask=is_first)
    else:
        if EPS is not None:
            factors = tl.rsqrt(squares / K + EPS)[:, None]
            sums *= factors
            ups *= factors
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < OUTPUTS, other=0.0)
            sums += bias.to(tl.float32)[None, :]
        if IS_GATED:
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + OUTPUTS + columns, mask=columns < OUTPUTS, other=0.0)
                ups += bias.to(tl.float32)[None, :]
            sums = silu(sums) * ups
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + rows[:, None] * RESIDUAL_STRIDE + columns[None, :]
            sums += tl.load(residual_ptrs, mask=live, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + rows[:, None] * OUT_STRIDE + columns[None, :]
        tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=live)
