"""Kernels of ``gather_rows`` and ``row_dots`` for records of int4 words, eight values each.

A plane is the values at one position in the words; the planes of a word belong to eight distant
columns (see ``row_formats``). The kernels sum or multiply each plane separately, because column
order would require moves between lanes. int4 has a scale for each group of columns, int4_row one
for each row.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from memory_ops.triton_kernels.table_view import small_int_to_fp32, times_row_scale

# words of a block; one int64 holds the scales of its four groups
BLOCK_WORDS = tl.constexpr(16)


@triton.jit
def sum_int4_rows(
    words_ptr,
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
    """out[t, v] = sum over c of weights[t, c] * table[rows[t, c], v], for one block of words."""
    tl.static_assert(KIND == "int4" or KIND == "int4_row")
    tl.static_assert(BLOCK == BLOCK_WORDS and WIDTH % BLOCK == 0, "a program reads one block")
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    words = tl.arange(0, BLOCK)
    sums0, sums1 = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    sums2, sums3, sums4, sums5, sums6, sums7 = sums0, sums0, sums0, sums0, sums0, sums0
    for start in range(0, num_choices, ROWS):
        choices = start + tl.arange(0, ROWS)
        live = choices < num_choices
        rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
        weights = tl.load(weights_ptr + token * num_choices + choices, mask=live, other=0.0)
        weights = times_row_scale(
            weights.to(tl.float32), scales_ptr, rows, live, SCALE_STRIDE, SCALE_START, KIND
        )
        offsets = rows * SCALE_STRIDE + SCALE_START + block
        scales = _group_scales(scales_ptr, offsets, live, KIND)
        offsets = rows[:, None] * ROW_STRIDE + block * BLOCK + words[None, :]
        bits = tl.load(words_ptr + offsets, mask=live[:, None], other=0)
        low, high = _weighted(bits, _scaled(weights, scales, 0, KIND), 0)
        sums0, sums1 = sums0 + low, sums1 + high
        low, high = _weighted(bits, _scaled(weights, scales, 1, KIND), 1)
        sums2, sums3 = sums2 + low, sums3 + high
        low, high = _weighted(bits, _scaled(weights, scales, 2, KIND), 2)
        sums4, sums5 = sums4 + low, sums5 + high
        low, high = _weighted(bits, _scaled(weights, scales, 3, KIND), 3)
        sums6, sums7 = sums6 + low, sums7 + high
    places = block * BLOCK + words
    out_ptr += token * VALUE_DIM
    _store_planes(out_ptr, sums0, sums1, places, VALUE_DIM, 0)
    _store_planes(out_ptr, sums2, sums3, places, VALUE_DIM, 1)
    _store_planes(out_ptr, sums4, sums5, places, VALUE_DIM, 2)
    _store_planes(out_ptr, sums6, sums7, places, VALUE_DIM, 3)


@triton.jit
def dot_int4_rows(
    words_ptr,
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
    """dots[t, c] = sum over v of table[rows[t, c], v] * x[t, v]."""
    tl.static_assert(KIND == "int4" or KIND == "int4_row")
    token = tl.program_id(0).to(tl.int64)
    choices = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = choices < num_choices
    rows = tl.load(rows_ptr + token * num_choices + choices, mask=live, other=0)
    x_ptr += token * X_STRIDE
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (places < WIDTH)[None, :]
        bits = tl.load(words_ptr + rows[:, None] * ROW_STRIDE + places[None, :], mask=mask, other=0)
        offsets = rows[:, None] * SCALE_STRIDE + SCALE_START + places[None, :] // BLOCK_WORDS
        scales = _group_scales(scales_ptr, offsets, mask, KIND)
        products = _products(bits, x_ptr, places, VALUE_DIM, 0)
        sums += _scaled(products, scales, 0, KIND)
        products = _products(bits, x_ptr, places, VALUE_DIM, 1)
        sums += _scaled(products, scales, 1, KIND)
        products = _products(bits, x_ptr, places, VALUE_DIM, 2)
        sums += _scaled(products, scales, 2, KIND)
        products = _products(bits, x_ptr, places, VALUE_DIM, 3)
        sums += _scaled(products, scales, 3, KIND)
    dots = times_row_scale(
        tl.sum(sums, axis=1), scales_ptr, rows, live, SCALE_STRIDE, SCALE_START, KIND
    )
    tl.store(dots_ptr + token * num_choices + choices, dots, mask=live)


@triton.jit
def _weighted(bits, factors, GROUP: tl.constexpr):
    """A group's two planes, each summed over rows with one factor per row."""
    low, high = _codes(bits, GROUP)
    return tl.sum(low * factors[:, None], axis=0), tl.sum(high * factors[:, None], axis=0)


@triton.jit
def _products(bits, x_ptr, places, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr):
    """A group's codes times x, summed over its two planes: ``[rows, words]``.

    x is 0 past V, so that padding adds nothing.
    """
    low, high = _codes(bits, GROUP)
    first, second = _column(places, 2 * GROUP), _column(places, 2 * GROUP + 1)
    x_low = tl.load(x_ptr + first, mask=first < VALUE_DIM, other=0.0).to(tl.float32)
    x_high = tl.load(x_ptr + second, mask=second < VALUE_DIM, other=0.0).to(tl.float32)
    return low * x_low[None, :] + high * x_high[None, :]


@triton.jit
def _store_planes(out_ptr, low, high, places, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr):
    first, second = _column(places, 2 * GROUP), _column(places, 2 * GROUP + 1)
    tl.store(out_ptr + first, low, mask=first < VALUE_DIM)
    tl.store(out_ptr + second, high, mask=second < VALUE_DIM)


@triton.jit
def _codes(bits, GROUP: tl.constexpr):
    """The unscaled values of planes ``2 * GROUP`` and ``2 * GROUP + 1``."""
    low = ((bits >> (8 * GROUP)) & 15) - 8
    high = ((bits >> (8 * GROUP + 4)) & 15) - 8
    return small_int_to_fp32(low), small_int_to_fp32(high)


@triton.jit
def _group_scales(scales_ptr, offsets, mask, KIND: tl.constexpr):
    """The four bf16 scales of each block in an int64; int4_row has none, and nothing is read."""
    scales = offsets
    if KIND == "int4":
        scales = tl.load(scales_ptr + offsets, mask=mask, other=0)
    return scales


@triton.jit
def _scaled(factors, scales, GROUP: tl.constexpr, KIND: tl.constexpr):
    """Factors times a group's scale; int4_row has none."""
    if KIND == "int4":
        bits = ((scales >> (16 * GROUP)) & 0xFFFF).to(tl.int32) << 16
        factors *= bits.to(tl.float32, bitcast=True)
    return factors


@triton.jit
def _column(places, PLANE: tl.constexpr):
    """The column of each word's value in a plane."""
    return places // BLOCK_WORDS * (8 * BLOCK_WORDS) + PLANE * BLOCK_WORDS + places % BLOCK_WORDS
