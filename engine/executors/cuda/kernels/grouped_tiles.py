"""Tiles of products with weights in groups of 8 or 4 bits, and single rows of such weights.

The layout is that of ``engine.model.grouped_weights``. Shape suffixes: M rows of x, K width of x,
N rows of the weight.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.product_tiles import product_sums
from engine.model.grouped_weights import WeightGroups
from engine.model.weight_bits import GROUP

_GROUP = tl.constexpr(GROUP)


def weight_arrays(
    weight: Tensor | WeightGroups,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], int | None]:
    """Values, scales and minimums, or None, as kernels take them; and the bits of groups."""
    if isinstance(weight, WeightGroups):
        return (weight.values, weight.scales_OG, weight.minimums_OG), weight.bits
    return (weight, None, None), None


@triton.jit
def _integers(values, half, BITS: tl.constexpr, HAS_MINIMUMS: tl.constexpr):
    """The integers of bytes, of their low (0) or high (1) half with 4 bits, in fp32."""
    if BITS == 8:
        integers = values
    else:
        integers = (values.to(tl.int32) >> (4 * half)) & 15
        if not HAS_MINIMUMS:
            integers -= 8
    return integers.to(tl.float32)


@triton.jit
def group_row(
    values_ptr, scales_ptr, minimums_ptr, row, groups, NUM_GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """Columns ``[groups, 32]`` of an output, and its weights there in fp32.

    ``row`` is an int64 output; groups from NUM_GROUPS on are not read.
    """
    live = groups < NUM_GROUPS
    values_ptr += row * (NUM_GROUPS * _GROUP * BITS // 8)
    scales_ptr += row * NUM_GROUPS
    if minimums_ptr is not None:
        minimums_ptr += row * NUM_GROUPS
    inputs = tl.arange(0, _GROUP)
    if BITS == 8:
        places, halves = groups[:, None] * _GROUP + inputs[None, :], 0
    else:
        places = groups[:, None] * (_GROUP // 2) + (inputs % (_GROUP // 2))[None, :]
        halves = (inputs // (_GROUP // 2))[None, :]
    values = tl.load(values_ptr + places, mask=live[:, None], other=0)
    scales = tl.load(scales_ptr + groups, mask=live, other=0.0).to(tl.float32)
    weights = _integers(values, halves, BITS, minimums_ptr is not None) * scales[:, None]
    if minimums_ptr is not None:
        minimums = tl.load(minimums_ptr + groups, mask=live, other=0.0).to(tl.float32)
        weights += minimums[:, None]
    return groups[:, None] * _GROUP + inputs[None, :], weights


@triton.jit
def _group_tile(
    values,
    scales,
    minimums,
    half,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Weights ``[BLOCK_N, GROUPS * SIZE]`` in fp32; with 4 bits, those of low or high halves."""
    integers = _integers(values, half, BITS, minimums is not None)
    weights = tl.reshape(integers, [BLOCK_N, GROUPS, SIZE]) * scales.to(tl.float32)[:, :, None]
    if minimums is not None:
        weights += minimums.to(tl.float32)[:, :, None]
    return tl.reshape(weights, [BLOCK_N, GROUPS * SIZE])


@triton.jit
def weight_sums(
    x_rows,
    live_m,
    weight_ptr,
    scales_ptr,
    minimums_ptr,
    rows_n,
    live_n,
    norm_ptr,
    first_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    UP_ROWS: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``product_sums`` with rows of a dense weight, if BITS is None, or of one in groups.

    ``rows_n`` are int64 ``[BLOCK_N]``; ``live_n`` says which of them exist. Gated products have a
    second sum, of the weight rows UP_ROWS rows further on. WEIGHT_STRIDE is that of dense rows.
    """
    if BITS is None:
        sums, ups, squares = product_sums(
            x_rows,
            live_m,
            weight_ptr + rows_n * WEIGHT_STRIDE,
            live_n,
            norm_ptr,
            first_k,
            K,
            STEPS,
            IS_EVEN,
            IS_GATED,
            UP_ROWS * WEIGHT_STRIDE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        sums, ups, squares = _group_sums(
            x_rows,
            live_m,
            weight_ptr,
            scales_ptr,
            minimums_ptr,
            rows_n,
            live_n,
            norm_ptr,
            first_k,
            K,
            STEPS,
            IS_EVEN,
            IS_GATED,
            UP_ROWS,
            BITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    return sums, ups, squares


@triton.jit
def _group_sums(
    x_rows,
    live_m,
    weight_ptr,
    scales_ptr,
    minimums_ptr,
    rows_n,
    live_n,
    norm_ptr,
    first_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    UP_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``product_sums`` with weights in groups, which are rounded to the dtype of x.

    k runs over STEPS blocks of whole groups. ``minimums_ptr`` may be None.
    """
    HALVES: tl.constexpr = 8 // BITS
    SIZE: tl.constexpr = _GROUP // HALVES
    GROUPS: tl.constexpr = BLOCK_K // _GROUP
    ALL_GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP
    UP_GROUPS: tl.constexpr = UP_ROWS * ALL_GROUPS
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, GROUPS * SIZE // 8), dtype=tl.float32)
    groups = first_k // _GROUP + tl.arange(0, GROUPS)
    places = first_k // HALVES + tl.arange(0, GROUPS * SIZE)
    value_rows = weight_ptr + rows_n * (ALL_GROUPS * SIZE)
    scale_rows = scales_ptr + rows_n * ALL_GROUPS
    if minimums_ptr is not None:
        minimum_rows = minimums_ptr + rows_n * ALL_GROUPS
    for _ in range(STEPS):
        mask_g, mask_v = live_n[:, None], live_n[:, None]
        if not IS_EVEN:
            mask_g = mask_g & (groups < ALL_GROUPS)[None, :]
            mask_v = mask_v & (places < ALL_GROUPS * SIZE)[None, :]
        value_ptrs = value_rows[:, None] + places[None, :]
        values = tl.load(value_ptrs, mask=mask_v, other=0)
        scales = tl.load(scale_rows[:, None] + groups[None, :], mask=mask_g, other=0.0)
        minimums = None
        if minimums_ptr is not None:
            minimums = tl.load(minimum_rows[:, None] + groups[None, :], mask=mask_g, other=0.0)
        if IS_GATED:
            up_values = tl.load(value_ptrs + UP_GROUPS * SIZE, mask=mask_v, other=0)
            up_ptrs = scale_rows[:, None] + UP_GROUPS + groups[None, :]
            up_scales = tl.load(up_ptrs, mask=mask_g, other=0.0)
            up_minimums = None
            if minimums_ptr is not None:
                up_ptrs = minimum_rows[:, None] + UP_GROUPS + groups[None, :]
                up_minimums = tl.load(up_ptrs, mask=mask_g, other=0.0)
        for half in tl.static_range(HALVES):
            columns = places // SIZE * _GROUP + places % SIZE + half * SIZE
            mask_x = live_m[:, None]
            if not IS_EVEN:
                mask_x = mask_x & (columns < K)[None, :]
            x = tl.load(x_rows[:, None] + columns[None, :], mask=mask_x, other=0.0)
            if norm_ptr is not None:
                wide = x.to(tl.float32)
                # a lane loads eight values of a row, so that it adds them without the other lanes
                squares += tl.sum(tl.reshape(wide * wide, [BLOCK_M, GROUPS * SIZE // 8, 8]), axis=2)
                norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
                x = (wide * norm[None, :]).to(x.dtype)
            weight = _group_tile(values, scales, minimums, half, BITS, BLOCK_N, GROUPS, SIZE)
            sums = tl.dot(x, weight.to(x.dtype).T, sums, input_precision="ieee")
            if IS_GATED:
                up = _group_tile(
                    up_values, up_scales, up_minimums, half, BITS, BLOCK_N, GROUPS, SIZE
                )
                ups = tl.dot(x, up.to(x.dtype).T, ups, input_precision="ieee")
        places += GROUPS * SIZE
        groups += GROUPS
    return sums, ups, tl.sum(squares, axis=1)
