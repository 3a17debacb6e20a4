"""Product-key top-K as a Triton kernel: one program per token and head, scores in tiles.

Shape suffixes: T tokens, H memory heads, N subkeys per half, K rows read per head.

The kernel sorts int64 numbers that pack a score above an inverted index. The score's bits are
mapped so that they order like integers, and equal scores prefer the smaller index. The index is a
subkey or a candidate's rank, never a row id: row ids exceed 2**31 from N = 46,341 on.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_scores
from memory_ops.triton_kernels.launch import TopkLaunch, on_device_of

# the kernel uses the first one that holds all subkeys of a half and all candidates
TOPK_LAUNCHES = (
    TopkLaunch(block=128, num_warps=1),
    TopkLaunch(block=256, num_warps=4),
    TopkLaunch(block=512, num_warps=4),
    TopkLaunch(block=1024, num_warps=8),
    TopkLaunch(block=2048, num_warps=16),
)
# if none of them holds the subkeys: tile by tile
TILES_LAUNCH = TopkLaunch(block=1024, num_warps=8)
LARGEST_TOP_K = 128
LARGEST_NUM_SUBKEYS = 65536
# smaller than every packed score
LEAST = tl.constexpr(-(2**63))


def product_topk(half_scores_TH2N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each head's ``top_k`` best rows among all N * N sums of two half scores.

        I1, I2 = top-K of s1, top-K of s2;  rows = top-K of s1[i] + s2[j];  row id = i * N + j
        weights = softmax(scores of the chosen rows)

    Equal half scores go to the smaller subkey, equal sums to the smaller rank in the first half,
    then in the second, as in the reference. A head whose scores are all -inf gets uniform weights.
    NaN orders above all numbers and makes its head's weights NaN.

    Args:
        half_scores_TH2N: scores of both halves, fp32, ``[T, H, 2, N]``, N up to 65,536.
        top_k: K, from 1 to N, and at most 128.

    Returns:
        ``rows_THK`` int64 in [0, N * N) and ``weights_THK`` fp32, both ``[T, H, K]``, best row
        first.

    Raises:
        ValueError: the scores have another shape or dtype, or N or K lies outside its range.
    """
    check_scores(half_scores_TH2N, top_k)
    num_tokens, num_heads, _, num_subkeys = half_scores_TH2N.shape
    if half_scores_TH2N.dtype != torch.float32:
        raise ValueError(f"half_scores: expected torch.float32, got {half_scores_TH2N.dtype}")
    if top_k > LARGEST_TOP_K:
        raise ValueError(f"top_k: the Triton kernel supports up to {LARGEST_TOP_K}, not {top_k}")
    if num_subkeys > LARGEST_NUM_SUBKEYS:
        allowed = f"the Triton kernel supports up to {LARGEST_NUM_SUBKEYS} subkeys"
        raise ValueError(f"half_scores: {allowed}, not {num_subkeys}")
    shape, device = (num_tokens, num_heads, top_k), half_scores_TH2N.device
    rows_THK = torch.empty(shape, dtype=torch.int64, device=device)
    weights_THK = torch.empty(shape, dtype=torch.float32, device=device)
    if rows_THK.numel():
        _launch(half_scores_TH2N, rows_THK, weights_THK)
    return rows_THK, weights_THK


def _launch(half_scores_TH2N: Tensor, rows_THK: Tensor, weights_THK: Tensor) -> None:
    num_tokens, num_heads, top_k = rows_THK.shape
    num_subkeys = half_scores_TH2N.shape[3]
    # the stride between tokens may be any, and that between halves if its alignment is certain: the
    # compiler makes a kernel for each alignment
    _, head_stride, half_stride, stride = half_scores_TH2N.stride()
    is_packed = (head_stride, half_stride, stride) == (2 * num_subkeys, num_subkeys, 1)
    is_strided = head_stride == 2 * half_stride and stride == 1 and num_subkeys % 16 == 0
    if not is_packed and not is_strided:
        half_scores_TH2N, is_packed = half_scores_TH2N.contiguous(), True
    # the sort needs a power of two of at least 2
    padded_k = triton.next_power_of_2(max(top_k, 2))
    candidates = sum(top_k // (rank + 1) for rank in range(top_k))
    padded_candidates = max(padded_k, triton.next_power_of_2(candidates))
    launch = launch_for(num_subkeys, padded_candidates)
    with on_device_of(rows_THK):
        _product_topk[(num_tokens * num_heads,)](
            half_scores_TH2N,
            rows_THK,
            weights_THK,
            half_scores_TH2N.stride(0),
            half_scores_TH2N.stride(2),
            IS_PACKED=is_packed,
            NUM_HEADS=num_heads,
            NUM_SUBKEYS=num_subkeys,
            TOP_K=top_k,
            HOOKS=math.isqrt(top_k),
            CANDIDATES=candidates,
            BLOCK=min(launch.block, triton.next_power_of_2(max(num_subkeys, 2))),
            PADDED_K=padded_k,
            PADDED_CANDIDATES=padded_candidates,
            **launch.options(),
        )


def launch_for(num_subkeys: int, padded_candidates: int) -> TopkLaunch:
    """The launch configuration for N subkeys per half and a number of candidates."""
    needed = max(num_subkeys, padded_candidates)
    return next((launch for launch in TOPK_LAUNCHES if needed <= launch.block), TILES_LAUNCH)


@triton.jit
def packed_scores(scores, indices):
    """An int64 that orders by score, then by smaller index; NaN is above all numbers."""
    # makes -0 equal to 0
    scores = scores + 0.0
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, 0x7FC00000, bits)
    # a negative number is smaller if its bits are larger, so invert them
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - indices).to(tl.int64)


@triton.jit
def score_of(packed):
    """The score of a packed number."""
    bits = (packed >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def index_of(packed):
    """The index of a packed number."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _best_of_tile(
    scores_ptr,
    half_stride,
    start,
    IS_PACKED: tl.constexpr,
    NUM_SUBKEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """The best scores of one tile of both halves, packed and sorted, ``[2, PADDED_K]``."""
    subkeys = start + tl.arange(0, BLOCK)[None, :]
    halves = tl.arange(0, 2)[:, None]
    starts = halves * NUM_SUBKEYS if IS_PACKED else halves.to(tl.int64) * half_stride
    # past the end, -inf and a larger index order after every existing subkey
    scores = tl.load(
        scores_ptr + starts + subkeys,
        mask=(subkeys < NUM_SUBKEYS) & (halves < 2),
        other=float("-inf"),
    )
    return tl.topk(packed_scores(scores, subkeys), PADDED_K)


@triton.jit
def _candidate_pairs(places, TOP_K: tl.constexpr, HOOKS: tl.constexpr):
    """Candidates: pairs of ranks (a, b) in the two halves with (a + 1) * (b + 1) <= K.

    No other pair can be chosen: at least K pairs with smaller or equal ranks have sums at least as
    large, because rounding is monotone, and win ties. Pairs are enumerated in hooks: hook c is row
    c from (c, c) on, then column c below it. Their order does not matter, because they are sorted.
    """
    first = tl.zeros_like(places)
    second = tl.zeros_like(places)
    hook_start = 0
    for corner in tl.static_range(HOOKS):
        arm = TOP_K // (corner + 1) - corner
        offset = places - hook_start
        inside = offset >= 0
        first = tl.where(inside, tl.where(offset < arm, corner, offset - arm + corner + 1), first)
        second = tl.where(inside, tl.where(offset < arm, corner + offset, corner), second)
        hook_start += 2 * arm - 1
    return first, second


@triton.jit
def _product_topk(
    scores_ptr,
    rows_ptr,
    weights_ptr,
    token_stride,
    half_stride,
    IS_PACKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_SUBKEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    HOOKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_CANDIDATES: tl.constexpr,
):
    """rows = top-K of s1[i] + s2[j] over i in top-K of s1, j in top-K of s2;  w = softmax."""
    head = tl.program_id(0).to(tl.int64)
    head_stride = 2 * NUM_SUBKEYS if IS_PACKED else 2 * half_stride
    scores_ptr += head // NUM_HEADS * token_stride + head % NUM_HEADS * head_stride

    if NUM_SUBKEYS <= BLOCK:
        best = _best_of_tile(scores_ptr, half_stride, 0, IS_PACKED, NUM_SUBKEYS, BLOCK, PADDED_K)
    else:
        best = tl.full([2, PADDED_K], LEAST, tl.int64)
        for start in range(0, NUM_SUBKEYS, BLOCK):
            tile = _best_of_tile(
                scores_ptr, half_stride, start, IS_PACKED, NUM_SUBKEYS, BLOCK, PADDED_K
            )
            best = tl.topk(tl.reshape(tl.join(best, tile), [2, 2 * PADDED_K]), PADDED_K)
    halves = tl.reshape(best, [2 * PADDED_K])

    places = tl.arange(0, PADDED_CANDIDATES)
    is_pair = places < CANDIDATES
    first, second = _candidate_pairs(places, TOP_K, HOOKS)
    first = tl.where(is_pair, first, 0)
    second = tl.where(is_pair, second, 0)
    sums = score_of(tl.gather(halves, first, 0)) + score_of(tl.gather(halves, second + PADDED_K, 0))
    pairs = tl.where(is_pair, packed_scores(sums, first * TOP_K + second), LEAST)
    chosen = tl.topk(pairs, PADDED_K)

    places = tl.arange(0, PADDED_K)
    live = places < TOP_K
    ranks = tl.where(live, index_of(chosen), 0)
    first = index_of(tl.gather(halves, ranks // TOP_K, 0)).to(tl.int64)
    second = index_of(tl.gather(halves, ranks % TOP_K + PADDED_K, 0)).to(tl.int64)
    tl.store(rows_ptr + head * TOP_K + places, first * NUM_SUBKEYS + second, mask=live)

    scores = tl.where(live, score_of(chosen), float("-inf"))
    # NaN counts as a score, although the maximum ignores it
    has_score = tl.max((scores != float("-inf")).to(tl.int32), 0) > 0
    scores = tl.where(has_score, scores - tl.max(scores, 0), tl.where(live, 0.0, scores))
    exponentials = tl.exp(scores)
    weights = exponentials / tl.sum(exponentials, 0)
    tl.store(weights_ptr + head * TOP_K + places, weights, mask=live)
