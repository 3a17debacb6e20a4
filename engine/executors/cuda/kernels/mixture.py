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

from engine.executors.cuda.kernels.expert_product import expert_product
from engine.executors.cuda.kernels.linear_operands import check_groups
from engine.executors.cuda.kernels.product_tiles import block_m_for
from engine.executors.cuda.kernels.routing import route
from engine.model.grouped_weights import WeightGroups, dense_weights
from engine.model.mixture import mix_experts
from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# columns per program of the sum; not timed on a GPU
_BLOCK, _NUM_WARPS = 2048, 4


def mixture(
    residual_TD: Tensor,
    x_TD: Tensor,
    logits_TE: Tensor,
    gate_up_E2ID: Tensor | WeightGroups,
    down_EDI: Tensor | WeightGroups,
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
        gate_up_E2ID: ``[E, 2 I, D]`` in the dtype of x, or groups, contiguous: gate rows, then up
            rows.
        down_EDI: ``[E, D, I]`` in the dtype of x, or groups, contiguous.
        top_k: K, 1 to E.

    Returns:
        ``residual_TD``.

    Raises:
        ValueError: a shape, a dtype or a layout does not match.
    """
    _check(residual_TD, x_TD, logits_TE, gate_up_E2ID, down_EDI, top_k)
    num_tokens, width = x_TD.shape
    num_experts, num_inner = _sizes(gate_up_E2ID)
    if not x_TD.numel():
        return residual_TD
    num_pairs = num_tokens * top_k
    block_m = block_m_for(triton.cdiv(num_pairs, num_experts))
    routes = route(logits_TE, top_k)
    inner_PI = torch.empty((num_pairs, num_inner), dtype=x_TD.dtype, device=x_TD.device)
    out_PD = torch.empty((num_pairs, width), dtype=x_TD.dtype, device=x_TD.device)
    expert_product(x_TD, gate_up_E2ID, routes, inner_PI, block_m, pairs_per_row=top_k)
    expert_product(inner_PI, down_EDI, routes, out_PD, block_m, pairs_per_row=1)
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
    gate_up_E2ID: Tensor | WeightGroups,
    down_EDI: Tensor | WeightGroups,
    top_k: int,
) -> None:
    for name, matrix in {"x": x_TD, "residual": residual_TD, "logits": logits_TE}.items():
        if matrix.dim() != 2 or matrix.stride(1) != 1:
            found = f"{tuple(matrix.shape)} with strides {matrix.stride()}"
            raise ValueError(f"{name}: expected a matrix, rows contiguous, got {found}")
    num_tokens, width = x_TD.shape
    num_experts, inner = _sizes(gate_up_E2ID)
    shapes = {
        "residual": (residual_TD, (num_tokens, width)),
        "logits": (logits_TE, (num_tokens, num_experts)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    _check_weight("gate_up", gate_up_E2ID, (num_experts, 2 * inner, width), x_TD.dtype)
    _check_weight("down", down_EDI, (num_experts, width, inner), x_TD.dtype)
    if residual_TD.dtype != x_TD.dtype:
        raise ValueError(f"residual: expected {x_TD.dtype}, got {residual_TD.dtype}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: {top_k} is outside [1, {num_experts}], the number of experts")


def _sizes(gate_up_E2ID: Tensor | WeightGroups) -> tuple[int, int]:
    """E and I."""
    array = gate_up_E2ID if isinstance(gate_up_E2ID, Tensor) else gate_up_E2ID.values
    return array.shape[0], array.shape[1] // 2


def _check_weight(
    name: str, weight: Tensor | WeightGroups, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if isinstance(weight, WeightGroups):
        check_groups(name, weight, shape)
    elif weight.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(weight.shape)}")
    elif weight.dtype != dtype or not weight.is_contiguous():
        found = f"{weight.dtype} with strides {weight.stride()}"
        raise ValueError(f"{name}: expected contiguous {dtype}, got {found}")


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
    gate_up_E2ID: Tensor | WeightGroups,
    down_EDI: Tensor | WeightGroups,
    top_k: int,
) -> Tensor:
    """``mixture`` in plain torch: the model's function of its experts."""

    num_experts, inner = _sizes(gate_up_E2ID)

    def expert_of(gate_up_2ID: Tensor, down_DI: Tensor) -> Callable[[Tensor], Tensor]:
        def expert(x_LD: Tensor) -> Tensor:
            gate_LI, up_LI = linear(x_LD, gate_up_2ID).chunk(2, dim=1)
            return linear(torch_silu(gate_LI) * up_LI, down_DI)

        return expert

    dense = (
        [dense_weights(one.part(expert), inputs, x_TD.dtype) for expert in range(num_experts)]
        if isinstance(one, WeightGroups)
        else one
        for one, inputs in ((gate_up_E2ID, x_TD.shape[1]), (down_EDI, inner))
    )
    experts = [expert_of(*weights) for weights in zip(*dense, strict=True)]
    return residual_TD.add_(mix_experts(x_TD, logits_TE, experts, top_k))
