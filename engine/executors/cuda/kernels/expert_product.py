"""The product of tokens with the weights of their experts, as a Triton kernel.

Shape suffixes: R rows of x, C columns of x, E experts, N rows of an expert's weight, P pairs of a
token and an expert, O output columns: N, or N / 2 if the product is gated.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from engine.executors.cuda.kernels.grouped_tiles import weight_arrays, weight_sums
from engine.executors.cuda.kernels.product_tiles import launch_for
from engine.executors.cuda.kernels.routing import Routes
from engine.executors.cuda.kernels.silu_gate import silu
from engine.model.grouped_weights import WeightGroups
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of


def expert_product(
    x_RC: Tensor,
    weight_ENC: Tensor | WeightGroups,
    routes: Routes,
    out_PO: Tensor,
    block_m: int,
    *,
    pairs_per_row: int,
) -> None:
    """Multiply row p // pairs_per_row of x by the weight of pair p's expert, into row p.

    A product that is not gated is also multiplied by the weight of its pair. Operands are not
    checked.

    Args:
        x_RC: contiguous rows.
        weight_ENC: in the dtype of x, or groups; contiguous. N is 2 O if the product is gated.
        routes: the pairs.
        out_PO: contiguous; receives the products.
        block_m: rows per program.
        pairs_per_row: number of pairs of each row of x.
    """
    outputs, width = out_PO.shape[1], x_RC.shape[1]
    num_pairs, num_experts = len(out_PO), len(routes.bounds_E1) - 1
    arrays, bits = weight_arrays(weight_ENC)
    is_gated = arrays[0].shape[1] == 2 * outputs
    has_groups = bits is not None
    launch = launch_for(x_RC, outputs, block_m, is_gated=is_gated, has_groups=has_groups)
    # c pairs of an expert are at most (c + block_m - 1) / block_m tiles
    num_tiles = (num_pairs + (block_m - 1) * min(num_experts, num_pairs)) // block_m
    with on_device_of(out_PO):
        _multiply_pairs[(num_tiles, triton.cdiv(outputs, launch.block_n))](
            x_RC,
            *arrays,
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
            BITS=bits,
            BLOCK_M=block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            **launch.options(),
        )


@triton.jit
def _multiply_pairs(
    x_ptr,
    weight_ptr,
    scales_ptr,
    minimums_ptr,
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
    BITS: tl.constexpr,
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
    x_rows = x_ptr + pairs // PAIRS_PER_ROW * X_STRIDE
    rows = expert.to(tl.int64) * ((1 + IS_GATED) * OUTPUTS) + columns
    sums, ups, _ = weight_sums(
        x_rows,
        is_pair,
        weight_ptr,
        scales_ptr,
        minimums_ptr,
        rows,
        columns < OUTPUTS,
        None,
        0,
        K,
        tl.cdiv(K, BLOCK_K),
        K % BLOCK_K == 0,
        IS_GATED,
        OUTPUTS,
        K,
        BITS,
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
