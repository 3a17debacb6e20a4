"""Token choice as a Triton kernel: one program per row of logits, without a host sync.

The kernel matches ``engine.sampling.choice.choose`` up to rounding, with one difference: its
weights ``exp((logit - largest) / temperature)`` are not divided by their sum. So weights below
2**-100 of the largest are dropped by a filter, instead of below 2**-100 of the sum.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from engine.sampling.choice import CHOICE, NO_TOKEN, choose
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# logits whose weights are summed in fp32; sums of blocks are added in fp64
BLOCK = tl.constexpr(256)
_MOST_WARPS = 16
# Warps per block of a tile. With one, an NVIDIA GPU's lane reads 128 bits of 16-bit logits at once.
# Rows that no wide load fits need two, because each logit takes registers for its address.
_WIDE, _NARROW = 1, 2

# constants of choice.py: a filter drops weights below TINY; weights that are below a floor by no
# more than rounding reach it
TINY = tl.constexpr(2.0**-100)
ROUNDED = tl.constexpr(1 - 1e-6)
LEAST_TEMPERATURE = tl.constexpr(1e-30)
BARREN = tl.constexpr(NO_TOKEN)


def choose_tokens(
    logits_LV: Tensor, choices_L5: Tensor, seats_L: Tensor, chosen_L: Tensor, last_token_P: Tensor
) -> None:
    """Choose one token id per row as ``choose`` does, and store it at the row's seat.

    Never waits for the device, and branches on shapes alone, so CUDA graphs can capture it. The
    vocabulary size and the row strides are compile-time constants; the number of rows is not.

    Args:
        logits_LV: fp32, bf16 or fp16, each row contiguous, with any row stride; not changed.
        choices_L5: fp64, the fields of ``CHOICE`` in their order, with any row stride.
        seats_L: int64 places in ``last_token_P``, distinct; -1 stores nothing there.
        chosen_L: int64, receives the ids, ``NO_TOKEN`` if a row's largest logit is infinite or any
            logit is NaN.
        last_token_P: int64, receives the ids at the seats, 0 in place of ``NO_TOKEN``: the next
            step reads a valid embedding row.
    """
    num_rows, vocab_size = logits_LV.shape
    assert vocab_size == 1 or logits_LV.stride(1) == 1, "the logits of a row are contiguous"
    if not num_rows:
        return
    row_stride = constant_row_stride(logits_LV)
    warps_per_block = _NARROW if vocab_size % 16 or row_stride % 16 else _WIDE
    blocks = triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK.value))
    blocks = min(blocks, _MOST_WARPS // warps_per_block)
    with on_device_of(logits_LV):
        _choose_tokens[(num_rows,)](
            logits_LV,
            choices_L5,
            seats_L,
            chosen_L,
            last_token_P,
            VOCAB_SIZE=vocab_size,
            ROW_STRIDE=row_stride,
            CHOICE_STRIDE=constant_row_stride(choices_L5),
            BLOCKS=blocks,
            TILES=triton.next_power_of_2(triton.cdiv(vocab_size, blocks * BLOCK.value)),
            num_warps=blocks * warps_per_block,
            num_stages=1,
            # every pass must round the weights alike
            enable_fp_fusion=False,
        )


def choose_tokens_reference(
    logits_LV: Tensor, choices_L5: Tensor, seats_L: Tensor, chosen_L: Tensor, last_token_P: Tensor
) -> None:
    """``choose_tokens`` in plain torch; it waits for the device."""
    choices = np.empty(len(choices_L5), dtype=CHOICE)
    for name, column in zip(CHOICE.names or (), choices_L5.cpu().numpy().T, strict=True):
        choices[name] = column
    chosen_L.copy_(choose(logits_LV, choices))
    is_seated_L = seats_L >= 0
    last_token_P[seats_L[is_seated_L]] = chosen_L[is_seated_L].clamp(min=0)


@triton.jit
def _choose_tokens(
    logits_ptr,
    choices_ptr,
    seats_ptr,
    chosen_ptr,
    last_token_ptr,
    VOCAB_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHOICE_STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """chosen[l] = the first of the largest logits, or the token at uniform * sum of weights."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * ROW_STRIDE
    choices_ptr += row * CHOICE_STRIDE
    temperature = tl.load(choices_ptr)

    largest, chosen, is_barren = _first_of_largest(logits_ptr, VOCAB_SIZE, BLOCKS)
    if is_barren:
        chosen = tl.cast(BARREN, tl.int32)
    elif temperature > 0:
        factor = (1.0 / tl.maximum(temperature, LEAST_TEMPERATURE)).to(tl.float32)
        floor = _floor(logits_ptr, choices_ptr, largest, factor, VOCAB_SIZE, BLOCKS)
        uniform = tl.load(choices_ptr + 4)
        chosen = _invert(logits_ptr, largest, factor, floor, uniform, VOCAB_SIZE, BLOCKS, TILES)

    chosen = chosen.to(tl.int64)
    tl.store(chosen_ptr + row, chosen)
    seat = tl.load(seats_ptr + row)
    tl.store(last_token_ptr + seat, tl.maximum(chosen, 0), mask=seat >= 0)


@triton.jit
def _first_of_largest(logits_ptr, VOCAB_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """The largest logit, its first id, and whether it is infinite or any logit is NaN."""
    best = tl.full((BLOCKS, BLOCK), float("-inf"), tl.float32)
    ids = tl.full((BLOCKS, BLOCK), VOCAB_SIZE, tl.int32)
    is_nan = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCKS * BLOCK):
        columns = _columns(start, BLOCKS)
        logits = _logits(logits_ptr, columns, VOCAB_SIZE)
        is_nan |= (logits != logits).to(tl.int32)
        ids = tl.where(logits > best, columns, ids)
        best = tl.where(logits > best, logits, best)
    largest = tl.max(tl.max(best, axis=1), axis=0)
    first = tl.where(best == largest, ids, VOCAB_SIZE)
    has_nan = tl.max(tl.max(is_nan, axis=1), axis=0) != 0
    is_infinite = tl.abs(largest) == float("inf")
    return largest, tl.min(tl.min(first, axis=1), axis=0), has_nan | is_infinite


@triton.jit
def _floor(
    logits_ptr, choices_ptr, largest, factor, VOCAB_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """The floor that a weight must reach to be kept by top_k, then top_p, then min_p."""
    top_k, top_p = tl.load(choices_ptr + 1), tl.load(choices_ptr + 2)
    min_p = tl.load(choices_ptr + 3)
    floor = tl.cast(0.0, tl.float32)
    if (top_k > 0) & (top_k < VOCAB_SIZE):
        found = _floor_for(logits_ptr, largest, factor, top_k, floor, VOCAB_SIZE, BLOCKS, True)
        # tokens as likely as the k-th are kept with it
        floor = (found.to(tl.float64) * ROUNDED).to(tl.float32)
    if top_p < 1:
        # a fraction of the weights that top_k kept
        total = _total(logits_ptr, largest, factor, floor, VOCAB_SIZE, BLOCKS)
        wanted = top_p * total
        floor = _floor_for(logits_ptr, largest, factor, wanted, floor, VOCAB_SIZE, BLOCKS, False)
    if min_p > 0:
        floor = tl.maximum(floor, tl.maximum(min_p * ROUNDED, TINY).to(tl.float32))
    return floor


@triton.jit
def _total(logits_ptr, largest, factor, floor, VOCAB_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum of the weights that reach a floor, added in the order of ``_floor_for``."""
    sums = tl.zeros((BLOCKS, BLOCK), tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCKS * BLOCK):
        weights = _weights(logits_ptr, _columns(start, BLOCKS), largest, factor, VOCAB_SIZE)
        sums += tl.where(weights >= floor, weights, 0.0)
    return _sum(sums)


@triton.jit
def _floor_for(
    logits_ptr,
    largest,
    factor,
    wanted,
    least,
    VOCAB_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_COUNT: tl.constexpr,
):
    """The largest weight such that the weights that reach it add up to ``wanted``, or number it.

    It is the smallest weight of at least ``least`` if none does. Bits of non-negative floats are
    ordered as the floats: the floor's bits are in [low, end). Each round reads all weights, splits
    that range in four, and narrows it to the weights that exist. So it ends after at most 15
    rounds, and after about six if the floor is far from other weights.
    """
    low = tl.maximum(least, TINY).to(tl.int32, bitcast=True)
    end = tl.cast(1.0, tl.float32).to(tl.int32, bitcast=True) + 1
    while end - low > 1:
        step = (end - low + 3) // 4
        above = low.to(tl.float32, bitcast=True)
        below = end.to(tl.float32, bitcast=True)
        bound1 = (low + step).to(tl.float32, bitcast=True)
        bound2 = (low + step * 2).to(tl.float32, bitcast=True)
        bound3 = (low + step * 3).to(tl.float32, bitcast=True)
        sums1 = tl.zeros((BLOCKS, BLOCK), tl.float32)
        sums2, sums3, largest_below = sums1, sums1, sums1
        smallest_above = sums1 + 1.0
        for start in range(0, VOCAB_SIZE, BLOCKS * BLOCK):
            weights = _weights(logits_ptr, _columns(start, BLOCKS), largest, factor, VOCAB_SIZE)
            own = 1.0 if IS_COUNT else weights
            sums1 += tl.where(weights >= bound1, own, 0.0)
            sums2 += tl.where(weights >= bound2, own, 0.0)
            sums3 += tl.where(weights >= bound3, own, 0.0)
            smallest_above = tl.minimum(smallest_above, tl.where(weights >= above, weights, 1.0))
            largest_below = tl.maximum(largest_below, tl.where(weights < below, weights, 0.0))
        section = (_sum(sums1) >= wanted).to(tl.int32)
        section += (_sum(sums2) >= wanted).to(tl.int32)
        section += (_sum(sums3) >= wanted).to(tl.int32)
        smallest = tl.min(tl.min(smallest_above, axis=1), axis=0).to(tl.int32, bitcast=True)
        most = tl.max(tl.max(largest_below, axis=1), axis=0).to(tl.int32, bitcast=True)
        # by rounding, no weight may be left in the range: then the floor is its end
        start_of_section = low + step * section
        low = tl.maximum(start_of_section, tl.minimum(smallest, end))
        end = tl.minimum(tl.minimum(start_of_section + step, most + 1), end)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _invert(
    logits_ptr,
    largest,
    factor,
    floor,
    uniform,
    VOCAB_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first id at which the sum of kept weights exceeds ``uniform`` times their total."""
    tiles = tl.arange(0, TILES)
    tile_sums = tl.zeros((TILES,), tl.float64)
    for start in range(0, VOCAB_SIZE, BLOCKS * BLOCK):
        weights = _weights(logits_ptr, _columns(start, BLOCKS), largest, factor, VOCAB_SIZE)
        own = tl.sum(_block_sums(weights, floor), axis=0)
        tile_sums = tl.where(tiles == start // (BLOCKS * BLOCK), own, tile_sums)
    tile, target = _first_exceeding(tile_sums, uniform * tl.sum(tile_sums, axis=0), TILES)
    start = tile * (BLOCKS * BLOCK)
    weights = _weights(logits_ptr, _columns(start, BLOCKS), largest, factor, VOCAB_SIZE)
    block, target = _first_exceeding(_block_sums(weights, floor), target, BLOCKS)
    start += block * BLOCK
    weights = _weights(logits_ptr, start + tl.arange(0, BLOCK), largest, factor, VOCAB_SIZE)
    kept = tl.where(weights >= floor, weights, 0.0).to(tl.float64)
    place, _ = _first_exceeding(kept, target, BLOCK)
    return start + place


@triton.jit
def _first_exceeding(parts, target, SIZE: tl.constexpr):
    """The place at which the sum of parts first exceeds the target, and the target's rest.

    If rounding has put the target at the end, it is the last place with any weight. A place without
    weight is never returned: a parallel sum may grow there by rounding.
    """
    places = tl.arange(0, SIZE)
    sums = tl.cumsum(parts, axis=0)
    last = tl.max(tl.where(parts > 0, places, 0), axis=0)
    found = tl.min(tl.where((parts > 0) & (sums > target), places, last), axis=0)
    before = tl.sum(tl.where(places == found, sums - parts, 0.0), axis=0)
    return found, target - before


@triton.jit
def _block_sums(weights, floor):
    """Sums of the kept weights of each block, added in fp32, as fp64."""
    return tl.sum(tl.where(weights >= floor, weights, 0.0), axis=1).to(tl.float64)


@triton.jit
def _sum(parts):
    """The sum of a tile, added in fp64."""
    return tl.sum(tl.sum(parts.to(tl.float64), axis=1), axis=0)


@triton.jit
def _columns(start, BLOCKS: tl.constexpr):
    return start + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _logits(logits_ptr, columns, VOCAB_SIZE: tl.constexpr):
    logits = tl.load(logits_ptr + columns, mask=columns < VOCAB_SIZE, other=float("-inf"))
    return logits.to(tl.float32)


@triton.jit
def _weights(logits_ptr, columns, largest, factor, VOCAB_SIZE: tl.constexpr):
    """exp((logit - largest) / temperature): 1 for the largest, 0 past the vocabulary."""
    return tl.exp((_logits(logits_ptr, columns, VOCAB_SIZE) - largest) * factor)
