"""Routing of tokens to experts as Triton kernels: choice, weights, pairs sorted by expert.

Shape suffixes: T tokens, E experts, K experts per token, P = T * K pairs of a token and an expert,
pair p being of token p // K.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of
from memory_ops.triton_kernels.product_topk import index_of, packed_scores, score_of

# logits and pairs per program; not timed on a GPU
_LOGITS, _PAIRS = 1024, 1024
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


class Routes(NamedTuple):
    """The experts of each token, as pairs.

    Attributes:
        pairs_P: int64, sorted by expert, then by token.
        weights_P: fp32, the weight of each pair's expert, by pair.
        bounds_E1: int64 ``[E + 1]``; the pairs of expert e are ``pairs[bounds[e]:bounds[e + 1]]``.
    """

    pairs_P: Tensor
    weights_P: Tensor
    bounds_E1: Tensor


def route(logits_TE: Tensor, top_k: int) -> Routes:
    """Choose the K experts with the largest logits for each token, and sort the pairs by expert.

        weights = softmax(logits of the chosen experts) = p_e / (sum of the chosen p)

    Equal logits go to the smaller expert; torch's ``topk`` leaves that open. NaN orders above all
    numbers, and makes its token's weights NaN. Grids depend on shapes alone.

    Args:
        logits_TE: the router's logits, fp32, fp16 or bf16, ``[T, E]`` with contiguous rows,
            T at least 1.
        top_k: K, 1 to E.
    """
    num_tokens, num_experts = logits_TE.shape
    num_pairs, device = num_tokens * top_k, logits_TE.device
    experts_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    weights_P = torch.empty(num_pairs, dtype=torch.float32, device=device)
    pairs_P = torch.empty(num_pairs, dtype=torch.int64, device=device)
    bounds_E1 = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    # the sort needs powers of two of at least 2
    padded_experts = triton.next_power_of_2(max(num_experts, 2))
    block_t = max(1, _LOGITS // padded_experts)
    with on_device_of(logits_TE):
        _choose_experts[(triton.cdiv(num_tokens, block_t),)](
            logits_TE,
            experts_P,
            weights_P,
            num_tokens,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            LOGITS_STRIDE=constant_row_stride(logits_TE),
            BLOCK_T=block_t,
            PADDED_EXPERTS=padded_experts,
            PADDED_K=triton.next_power_of_2(max(top_k, 2)),
            **_OPTIONS,
        )
        _sort_pairs[(num_experts,)](
            experts_P, pairs_P, bounds_E1, num_pairs, BLOCK_P=_PAIRS, **_OPTIONS
        )
    return Routes(pairs_P, weights_P, bounds_E1)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_experts(
    logits_ptr,
    experts_ptr,
    weights_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """experts[t] = top-K of logits[t];  weights[t] = softmax(logits[t, experts[t]])."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    experts = tl.arange(0, PADDED_EXPERTS)[None, :]
    live = (tokens < num_tokens) & (experts < NUM_EXPERTS)
    places = logits_ptr + tokens * LOGITS_STRIDE + experts
    # past the end, -inf and a larger index order after every existing expert
    logits = tl.load(places, mask=live, other=float("-inf")).to(tl.float32)
    chosen = tl.topk(packed_scores(logits, experts), PADDED_K)
    ranks = tl.arange(0, PADDED_K)[None, :]
    scores = tl.where(ranks < TOP_K, score_of(chosen), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    is_pair = (tokens < num_tokens) & (ranks < TOP_K)
    tl.store(experts_ptr + tokens * TOP_K + ranks, index_of(chosen), mask=is_pair)
    tl.store(weights_ptr + tokens * TOP_K + ranks, weights, mask=is_pair)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_pairs(experts_ptr, pairs_ptr, bounds_ptr, num_pairs, BLOCK_P: tl.constexpr):
    """pairs = a stable counting sort of pairs by expert; each program places one expert's pairs."""
    expert = tl.program_id(0)
    places = tl.arange(0, BLOCK_P)
    before = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK_P):
        is_pair = start + places < num_pairs
        experts = tl.load(experts_ptr + start + places, mask=is_pair, other=-1)
        before += (is_pair & (experts < expert)).to(tl.int32)
    end = tl.sum(before, axis=0)
    tl.store(bounds_ptr + expert, end)
    for start in range(0, num_pairs, BLOCK_P):
        is_pair = start + places < num_pairs
        experts = tl.load(experts_ptr + start + places, mask=is_pair, other=-1)
        is_own = is_pair & (experts == expert)
        ranks = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(pairs_ptr + end + ranks - 1, (start + places).to(tl.int64), mask=is_own)
        end += tl.sum(is_own.to(tl.int32), axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(bounds_ptr + expert + 1, end)


def route_reference(logits_TE: Tensor, top_k: int) -> Routes:
    """``route`` in plain torch."""
    sorted_TE = logits_TE.float().sort(dim=-1, descending=True, stable=True)
    weights_TK = sorted_TE.values[:, :top_k].softmax(-1)
    experts_P, pairs_P = sorted_TE.indices[:, :top_k].flatten().sort(stable=True)
    bounds_E1 = torch.searchsorted(experts_P, torch.arange(logits_TE.shape[1] + 1))
    return Routes(pairs_P, weights_TK.flatten(), bounds_E1)
