"""A mixture of experts as Triton kernels: routing, products by expert, the sum of each token's.

Shape suffixes: T tokens, D model width, E experts, K experts per token, P = T * K pairs of a token
and an expert, pair p being of token p // K, I width of an expert.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import silu as torch_silu

from engine.executors.cuda.kernels.product_tiles import block_m_for, launch_for, product_sums
from engine.executors.cuda.kernels.routing import Routes, route
from engine.executors.cuda.kernels.silu_gate import silu
from engine.model.mixture import mix_experts
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# columns per program of the sum; not timed on a GPU
_BLOCK, _NUM_WARPS = 2048, 4


def mixture(
    residual_TD: Tensor,
    x_TD: Tensor,
    logits_TE: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    top_k: int,
) -> Tensor:
    """Add ``engine.model.mixture.mix_experts`` of SwiGLU experts to a residual stream, in place:

        y += sum over the K largest of p_e / (their sum) * down_e(silu(gate_e x) * up_e x)

    Kernels read the weights of chosen experts only, once per tile of at most 64 tokens. Grids
    depend on shapes alone, so that CUDA graphs can capture the call. A token's experts are added in
    the order of their logits, without atomics. Equal logits go to the smaller expert.

    Args:
        residual_TD: y, in the dtype of x, with contiguous rows.
        x_TD: fp32, fp16 or bf16, normed, ``[T, D]`` with contiguous rows and any row stride.
        logits_TE: the router's logits, fp32, fp16 or bf16, with contiguous rows.
        gate_up_E2ID: ``[E, 2 I, D]`` in the dtype of x, contiguous: gate rows, then up rows.
        down_EDI: ``[E, D, I]`` in the dtype of x, contiguous.
        top_k: K, 1 to E.

    Returns:
        ``residual_TD``.

    Raises:
        ValueError: a shape, a dtype or a layout does not match.
    """
    _check(residual_TD, x_TD, logits_TE, gate_up_E2ID, down_EDI, top_k)
    (num_tokens, width), inner = x_TD.shape, down_EDI.shape[2]
    if not x_TD.numel():
        return residual_TD
    num_pairs = num_tokens * top_k
    block_m = block_m_for(triton.cdiv(num_pairs, len(down_EDI)))
    routes = route(logits_TE, top_k)
    inner_PI = torch.empty((num_pairs, inner), dtype=x_TD.dtype, device=x_TD.device)
    out_PD = torch.empty((num_pairs, width), dtype=x_TD.dtype, device=x_TD.device)
    _multiply(x_TD, gate_up_E2ID, routes, inner_PI, block_m, pairs_per_row=top_k)
    _multiply(inner_PI, down_EDI, routes, out_PD, block_m, pairs_per_row=1)
    with on_device_of(residual_TD):
        _add_pairs[(num_tokens, triton.cdiv(width, _BLOCK))](
            out_PD,
            residual_TD,
            WIDTH=width,
            TOP_K=top_k,
            STRIDE=constant_row_stride(residual_TD),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return residual_TD


def _check(
    residual_TD: Tensor,
    x_TD: Tensor,
    logits_TE: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    top_k: int,
) -> None:
    for name, matrix in {"x": x_TD, "residual": residual_TD, "logits": logits_TE}.items():
        if matrix.dim() != 2 or matrix.stride(1) != 1:
            found = f"{tuple(matrix.shape)} with strides {matrix.stride()}"
            raise ValueError(f"{name}: expected a matrix, rows contiguous, got {found}")
    num_tokens, width = x_TD.shape
    num_experts, inner = len(down_EDI), down_EDI.shape[-1]
    shapes = {
        "residual": (residual_TD, (num_tokens, width)),
        "logits": (logits_TE, (num_tokens, num_experts)),
        "gate_up": (gate_up_E2ID, (num_experts, 2 * inner, width)),
        "down": (down_EDI, (num_experts, width, inner)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    for name, weight in {"gate_up": gate_up_E2ID, "down": down_EDI}.items():
        if weight.dtype != x_TD.dtype or not weight.is_contiguous():
            found = f"{weight.dtype} with strides {weight.stride()}"
            raise ValueError(f"{name}: expected contiguous {x_TD.dtype}, got {found}")
    if residual_TD.dtype != x_TD.dtype:
        raise ValueError(f"residual: expected {x_TD.dtype}, got {residual_TD.dtype}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: {top_k} is outside [1, {num_experts}], the number of experts")


def _multiply(
    x_RC: Tensor,
    weight_ENC: Tensor,
    routes: Routes,
    out_PO: Tensor,
    block_m: int,
    *,
    pairs_per_row: int,
) -> None:
    """Multiply row p // pairs_per_row of x by the weight of pair p's expert, into row p.

    The first product, with several pairs per row, is gated; the second has the pairs' weights.
    """
    outputs, width = out_PO.shape[1], x_RC.shape[1]
    num_pairs, num_experts = len(out_PO), len(weight_ENC)
    is_gated = weight_ENC.shape[1] == 2 * outputs
    launch = launch_for(weight_ENC, outputs, block_m, is_gated=is_gated)
    # c pairs of an expert are at most (c + block_m - 1) / block_m tiles
    num_tiles = (num_pairs + (block_m - 1) * min(num_experts, num_pairs)) // block_m
    with on_device_of(out_PO):
        _multiply_pairs[(num_tiles, triton.cdiv(outputs, launch.block_n))](
            x_RC,
            weight_ENC,
            routes.pairs_P,
            None if is_gated else routes.weights_P,
            routes.bounds_E1,
            out_PO,
            NUM_EXPERTS=num_experts,
            PADDED_EXPERTS=triton.next_power_of_2(num_experts),
            PAIRS_PER_ROW=pairs_per_row,
            K=width,
            OUTPUTS=outputs,
            X_STRIDE=constant_row_stride(x_RC),
            IS_GATED=is_gated,
            BLOCK_M=block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            **launch.options(),
        )


@triton.jit
def _multiply_pairs(
    x_ptr,
    weight_ptr,
    pairs_ptr,
    pair_weights_ptr,
    bounds_ptr,
    out_ptr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[p] = gated product of x[p // PAIRS_PER_ROW], or pair_weights[p] * product, by expert."""
    tile = tl.program_id(0)
    experts = tl.arange(0, PADDED_EXPERTS)
    starts = tl.load(bounds_ptr + tl.minimum(experts, NUM_EXPERTS))
    ends = tl.load(bounds_ptr + tl.minimum(experts + 1, NUM_EXPERTS))
    tile_ends = tl.cumsum(tl.cdiv(ends - starts, BLOCK_M), axis=0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    if expert >= NUM_EXPERTS:
        # fewer tiles than the shapes allow
        return
    first_tile = tl.max(tl.where(experts < expert, tile_ends, 0), axis=0)
    first_pair = tl.sum(tl.where(experts == expert, starts, 0), axis=0)
    last_pair = tl.sum(tl.where(experts == expert, ends, 0), axis=0)
    places = first_pair + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pair = places < last_pair
    pairs = tl.load(pairs_ptr + places, mask=is_pair, other=0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr += expert.to(tl.int64) * ((1 + IS_GATED) * OUTPUTS * K)
    sums, ups, _ = product_sums(
        x_ptr + pairs // PAIRS_PER_ROW * X_STRIDE,
        is_pair,
        weight_ptr + columns.to(tl.int64) * K,
        columns < OUTPUTS,
        None,
        0,
        K,
        tl.cdiv(K, BLOCK_K),
        K % BLOCK_K == 0,
        IS_GATED,
        OUTPUTS * K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if IS_GATED:
        sums = silu(sums) * ups
    else:
        weights = tl.load(pair_weights_ptr + pairs, mask=is_pair, other=0.0)
        sums *= weights[:, None]
    live = is_pair[:, None] & (columns < OUTPUTS)[None, :]
    out_ptrs = out_ptr + pairs[:, None] * OUTPUTS + columns[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _add_pairs(
    pairs_ptr,
    residual_ptr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """residual[t] += sum over k of pairs[t * K + k], in this order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        places = pairs_ptr + (token * TOP_K + k) * WIDTH + columns
        sums += tl.load(places, mask=live, other=0.0).to(tl.float32)
    places = residual_ptr + token * STRIDE + columns
    sums += tl.load(places, mask=live, other=0.0).to(tl.float32)
    tl.store(places, sums.to(residual_ptr.dtype.element_ty), mask=live)


def mixture_reference(
    residual_TD: Tensor,
    x_TD: Tensor,
    logits_TE: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    top_k: int,
) -> Tensor:
    """``mixture`` in plain torch: the model's function of its experts."""

    def expert_of(gate_up_2ID: Tensor, down_DI: Tensor) -> Callable[[Tensor], Tensor]:
        def expert(x_LD: Tensor) -> Tensor:
            gate_LI, up_LI = linear(x_LD, gate_up_2ID).chunk(2, dim=1)
            return linear(torch_silu(gate_LI) * up_LI, down_DI)

        return expert

    experts = [expert_of(*weights) for weights in zip(gate_up_E2ID, down_EDI, strict=True)]
    return residual_TD.add_(mix_experts(x_TD, logits_TE, experts, top_k))
