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

from engine.executors.cuda.kernels.product_tiles import (
    ProductLaunch,
    block_m_for,
    launch_for,
    product_sums,
)
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# a norm's weight [K] and eps
Norm = tuple[Tensor, float]

# split K if fewer programs than this would run, into parts of at least this width; not timed on a
# GPU
_FEW_PROGRAMS, _LEAST_WIDTH = 64, 1024


def num_splits(launch: ProductLaunch, outputs: int, width: int) -> int:
    """Number of parts into which K is split; separate programs compute each part."""
    programs = -(-outputs // launch.block_n)
    return max(1, min(_FEW_PROGRAMS // programs, width // _LEAST_WIDTH))


def multiply_rows(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm: Norm | None,
    residual_MO: Tensor | None,
    is_gated: bool,
    out_MO: Tensor,
) -> None:
    """``narrow_linear`` on checked operands, into an ``out_MO`` that is not empty."""
    (num_rows, outputs), width = out_MO.shape, x_MK.shape[1]
    block_m = block_m_for(num_rows)
    launch = launch_for(weight_NK, outputs, block_m, is_gated=is_gated)
    splits = num_splits(launch, outputs, width)
    steps = triton.cdiv(width, splits * launch.block_k)
    sums_SMO = squares_SM = None
    if splits > 1:
        shape = splits, 1 + is_gated, num_rows, outputs
        sums_SMO = torch.empty(shape, dtype=torch.float32, device=out_MO.device)
        squares_SM = torch.empty((splits, num_rows), dtype=torch.float32, device=out_MO.device)
    tensors = (bias_N, residual_MO, out_MO, sums_SMO, squares_SM, num_rows)
    constants = {
        "K": width,
        "OUTPUTS": outputs,
        "SPLITS": splits,
        "EPS": None if norm is None else norm[1],
        "IS_GATED": is_gated,
        "RESIDUAL_STRIDE": 0 if residual_MO is None else constant_row_stride(residual_MO),
        "OUT_STRIDE": constant_row_stride(out_MO),
        "BLOCK_M": block_m,
        "BLOCK_N": launch.block_n,
    }
    num_tiles = triton.cdiv(outputs, launch.block_n)
    with on_device_of(out_MO):
        _multiply[(num_tiles, splits)](
            x_MK,
            weight_NK,
            None if norm is None else norm[0],
            *tensors,
            **constants,
            X_STRIDE=constant_row_stride(x_MK),
            WEIGHT_STRIDE=constant_row_stride(weight_NK),
            STEPS=steps,
            IS_EVEN=steps * splits * launch.block_k == width,
            BLOCK_K=launch.block_k,
            **launch.options(),
        )
        if splits > 1:
            _add_splits[(num_tiles,)](
                *tensors, **constants, num_warps=4, num_stages=1, enable_fp_fusion=True
            )


@triton.jit
def _finish(
    sums,
    ups,
    squares,
    rows,
    columns,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    EPS: tl.constexpr,
    IS_GATED: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
):
    """out = y + residual,  y = g or silu(g) * u,  g, u = (sums, ups) / sqrt(mean + EPS) + bias."""
    live = (rows < num_rows)[:, None] & (columns < OUTPUTS)[None, :]
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
        sums = sums / (1.0 + tl.exp(-sums)) * ups
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * RESIDUAL_STRIDE + columns[None, :]
        sums += tl.load(residual_ptrs, mask=live, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows[:, None] * OUT_STRIDE + columns[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_ptr,
    weight_ptr,
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
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``_finish`` of one tile of columns, or the sums of one part of K for ``_add_splits``."""
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums, ups, squares = product_sums(
        x_ptr + rows * X_STRIDE,
        rows < num_rows,
        weight_ptr + columns.to(tl.int64) * WEIGHT_STRIDE,
        columns < OUTPUTS,
        norm_ptr,
        split * STEPS * BLOCK_K,
        K,
        STEPS,
        IS_EVEN,
        IS_GATED,
        OUTPUTS * WEIGHT_STRIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if SPLITS == 1:
        _finish(
            sums, ups, squares, rows, columns, bias_ptr, residual_ptr, out_ptr, num_rows,
            K, OUTPUTS, EPS, IS_GATED, RESIDUAL_STRIDE, OUT_STRIDE,
        )  # fmt: skip
    else:
        live = (rows < num_rows)[:, None] & (columns < OUTPUTS)[None, :]
        places = rows[:, None] * OUTPUTS + columns[None, :]
        part_ptr = sums_ptr + split.to(tl.int64) * (1 + IS_GATED) * num_rows * OUTPUTS
        tl.store(part_ptr + places, sums, mask=live)
        if IS_GATED:
            tl.store(part_ptr + num_rows * OUTPUTS + places, ups, mask=live)
        # every tile of columns has the same sums of squares
        is_first = (rows < num_rows) & (tl.program_id(0) == 0)
        tl.store(squares_ptr + split * num_rows + rows, squares, mask=is_first)


@triton.jit(do_not_specialize=["num_rows"])
def _add_splits(
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
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``_finish`` of the parts' sums, added in the order of the parts."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (rows < num_rows)[:, None] & (columns < OUTPUTS)[None, :]
    places = rows[:, None] * OUTPUTS + columns[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for split in range(SPLITS):
        part_ptr = sums_ptr + split * (1 + IS_GATED) * num_rows * OUTPUTS
        sums += tl.load(part_ptr + places, mask=live, other=0.0)
        if IS_GATED:
            ups += tl.load(part_ptr + num_rows * OUTPUTS + places, mask=live, other=0.0)
        squares += tl.load(squares_ptr + split * num_rows + rows, mask=rows < num_rows, other=0.0)
    _finish(
        sums, ups, squares, rows, columns, bias_ptr, residual_ptr, out_ptr, num_rows,
        K, OUTPUTS, EPS, IS_GATED, RESIDUAL_STRIDE, OUT_STRIDE,
    )  # fmt: skip
