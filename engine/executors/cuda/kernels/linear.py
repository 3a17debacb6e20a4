"""Products of rows with a weight, with the norm before and gate or residual after them fused.

Shape suffixes: M rows of x, K width of x, N rows of the weight, O output columns: N, or N / 2 if
the product is gated.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.narrow_product import narrow_linear
from engine.executors.cuda.kernels.rms_norm import rms_norm
from engine.executors.cuda.kernels.silu_gate import silu_gate
from engine.executors.cuda.kernels.widen_groups import widen_groups
from engine.model.grouped_weights import WeightGroups, dense_weights

# ``linear`` uses the Triton kernel up to this number of rows, cuBLAS above: more rows of a small
# weight, because launches bind small models, and of groups, which cuBLAS needs as a dense copy; not
# timed on a GPU
MOST_ROWS = 16
MOST_ROWS_OF_SMALL, SMALL_WEIGHT = 64, 2**23
DENSE_PART = 2**25


def linear(operands: LinearOperands) -> Tensor:
    """A product with optional norm, bias, gate and residual:

        y = norm(x) W^T + b;    gated: y = silu(gate part of y) * (up part of y);    y += residual

    Shapes and format alone choose the code: up to ``MOST_ROWS`` rows, or 64 of a small weight or
    of groups, run ``narrow_linear``, more rows run ``wide_linear``. They round at different places.
    An fp16 norm runs before, because the fused one multiplies by its weight first, which can
    overflow.

    Returns:
        ``[M, O]``: ``out`` if given, else a new matrix in the dtype of x.

    Raises:
        ValueError: a shape, a dtype or a layout does not match.
    """
    operands.check()
    x_MK, norm = operands.x_MK, operands.norm
    if norm is not None and x_MK.dtype is torch.float16:
        operands = replace(operands, x_MK=rms_norm(x_MK, *norm), norm=None)
    weight_NK = operands.weight_NK
    is_small = isinstance(weight_NK, WeightGroups) or weight_NK.numel() <= SMALL_WEIGHT
    most_rows = MOST_ROWS_OF_SMALL if is_small else MOST_ROWS
    return narrow_linear(operands) if len(x_MK) <= most_rows else wide_linear(operands)


def wide_linear(operands: LinearOperands) -> Tensor:
    """``linear`` of any number of rows, on checked operands: torch's product between kernels.

    Norm and gate round like ``engine.model`` does. Groups are read into a dense copy first, those
    of a large weight without bias, gate and residual part by part.
    """
    x_MK, weight_NK, bias_N = operands.x_MK, operands.weight_NK, operands.bias_N
    residual_MO, out_MO = operands.residual_MO, operands.out_MO
    if operands.norm is not None:
        x_MK = rms_norm(x_MK, *operands.norm)
    if isinstance(weight_NK, WeightGroups):
        if bias_N is None and residual_MO is None and not operands.is_gated:
            return _product_by_parts(x_MK, weight_NK, out_MO)
        weight_NK = widen_groups(weight_NK, x_MK.shape[1], x_MK.dtype)
    weight_KN = weight_NK.t()
    y_out = out_MO if residual_MO is None else None
    if operands.is_gated:
        gate_MO, up_MO = torch_linear(x_MK, weight_NK, bias_N).chunk(2, dim=1)
        y_MO = silu_gate(gate_MO, up_MO, y_out)
    elif bias_N is not None:
        y_MO = torch.addmm(bias_N, x_MK, weight_KN, out=y_out)
    elif residual_MO is not None:
        return torch.addmm(residual_MO, x_MK, weight_KN, out=out_MO)
    else:
        return _product(x_MK, weight_KN, out_MO)
    return y_MO if residual_MO is None else torch.add(y_MO, residual_MO, out=out_MO)


def _product_by_parts(x_MK: Tensor, groups: WeightGroups, out_MN: Tensor | None) -> Tensor:
    """x W, with ``DENSE_PART`` dense weights at a time: a head is as large as many layers."""
    width, outputs = x_MK.shape[1], groups.num_outputs
    if out_MN is None:
        out_MN = x_MK.new_empty(len(x_MK), outputs)
    size = max(1, DENSE_PART // width)
    for first in range(0, outputs, size):
        part = slice(first, min(first + size, outputs))
        weight_KN = widen_groups(groups.part(part), width, x_MK.dtype).t()
        # torch may not write wide results into a part of each row
        y_MN = out_MN.new_empty(len(x_MK), part.stop - part.start)
        out_MN[:, part] = _product(x_MK, weight_KN, y_MN)
    return out_MN


def _product(x_MK: Tensor, weight_KN: Tensor, out_MN: Tensor | None) -> Tensor:
    """x W, not rounded to the dtype of x if ``out`` is wider."""
    if out_MN is None or out_MN.dtype == x_MK.dtype:
        return torch.mm(x_MK, weight_KN, out=out_MN)
    if x_MK.is_cuda:
        return torch.mm(x_MK, weight_KN, out_dtype=out_MN.dtype, out=out_MN)
    # torch has no such product on the CPU
    return torch.mm(x_MK.to(out_MN.dtype), weight_KN.to(out_MN.dtype), out=out_MN)


def linear_reference(operands: LinearOperands) -> Tensor:
    """``narrow_linear`` in plain torch, also for fp64."""
    x_MK, residual_MO, out_MO = operands.x_MK, operands.residual_MO, operands.out_MO
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    x, factor_M1 = x_MK, torch.ones(())
    if operands.norm is not None:
        norm_K, eps = operands.norm
        x = (x.to(wide) * norm_K).to(x.dtype)
        factor_M1 = torch.rsqrt(x_MK.to(wide).square().mean(dim=1, keepdim=True) + eps)
    weight_NK = operands.weight_NK
    if isinstance(weight_NK, WeightGroups):
        weight_NK = dense_weights(weight_NK, x.shape[1], x.dtype)
    y = x.to(wide) @ weight_NK.to(wide).t() * factor_M1
    if operands.bias_N is not None:
        y = y + operands.bias_N
    if operands.is_gated:
        gate, up = y.chunk(2, dim=1)
        y = silu(gate) * up
    if residual_MO is not None:
        y = y + residual_MO
    return y.to(x_MK.dtype) if out_MO is None else out_MO.copy_(y)
