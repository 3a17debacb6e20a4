"""Products of rows with a weight, with the norm before and gate or residual after them fused.

Shape suffixes: M rows of x, K width of x, N rows of the weight, O output columns: N, or N / 2 if
the product is gated.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

from engine.executors.cuda.kernels.narrow_product import Norm, multiply_rows
from engine.executors.cuda.kernels.product_tiles import MOST_BLOCK_M
from engine.executors.cuda.kernels.rms_norm import rms_norm
from engine.executors.cuda.kernels.silu_gate import silu_gate

# ``linear`` uses the Triton kernel up to this number of rows, cuBLAS above: more rows of a small
# weight, because launches bind small models; not timed on a GPU
MOST_ROWS = 16
MOST_ROWS_OF_SMALL, SMALL_WEIGHT = 64, 2**23
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A product with optional norm, bias, gate and residual:

        y = norm(x) W^T + b;    gated: y = silu(gate part of y) * (up part of y);    y += residual

    Shapes alone choose the code: up to ``MOST_ROWS`` rows, or 64 of a small weight, run
    ``narrow_linear``, more rows run ``wide_linear``. Both have this signature. They round at
    different places. An fp16 norm runs before, because the fused one multiplies by its weight
    first, which can overflow.

    Args:
        x_MK: fp32, fp16 or bf16, ``[M, K]`` with contiguous rows and any row stride.
        weight_NK: ``[N, K]`` in the dtype of x, contiguous rows. Gated: gate rows, then up rows.
        bias_N: ``[N]`` in the dtype of x.
        norm: (weight ``[K]``, eps) of the RMSNorm of x.
        residual_MN: ``[M, O]``, added to the result.
        is_gated: whether to gate.
        out: ``[M, O]``, receives the result. It may be the residual, but must not overlap x.
        out_dtype: dtype of the result; the default is the dtype of ``out``, else of x.

    Returns:
        ``[M, O]``: ``out`` if given.

    Raises:
        ValueError: a shape, a dtype or a layout does not match.
    """
    if norm is not None and x_MK.dtype is torch.float16:
        x_MK, norm = rms_norm(x_MK, *norm), None
    most_rows = MOST_ROWS_OF_SMALL if weight_NK.numel() <= SMALL_WEIGHT else MOST_ROWS
    function = narrow_linear if len(x_MK) <= most_rows else wide_linear
    return function(
        x_MK,
        weight_NK,
        bias_N=bias_N,
        norm=norm,
        residual_MN=residual_MN,
        is_gated=is_gated,
        out=out,
        out_dtype=out_dtype,
    )


def narrow_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``linear`` of at most 64 rows as one Triton kernel that reads the weight once.

    It multiplies x by the norm's weight, rounds that to the dtype of x (an fp16 product above 65504
    overflows), and multiplies the sums by ``1 / sqrt(mean(x^2) + eps)``. Sums are fp32; the result
    is rounded once. If few programs would run, K is split and a second kernel adds the parts in
    order. A row's bits are the same every time and do not depend on the other rows.

    Raises:
        ValueError: as ``linear``, or x has more than 64 rows.
    """
    if len(x_MK) > MOST_BLOCK_M:
        raise ValueError(f"x: {len(x_MK)} rows, at most {MOST_BLOCK_M} are allowed")
    dtype = _checked_dtype(x_MK, weight_NK, bias_N, norm, residual_MN, is_gated, out, out_dtype)
    outputs = _outputs(weight_NK, is_gated)
    if out is None:
        out = torch.empty((len(x_MK), outputs), dtype=dtype, device=x_MK.device)
    if out.numel():
        multiply_rows(x_MK, weight_NK, bias_N, norm, residual_MN, is_gated, out)
    return out


def wide_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``linear`` of any number of rows: torch's product between separate kernels.

    Norm and gate round like ``engine.model`` does.
    """
    dtype = _checked_dtype(x_MK, weight_NK, bias_N, norm, residual_MN, is_gated, out, out_dtype)
    if norm is not None:
        x_MK = rms_norm(x_MK, *norm)
    if is_gated:
        gate_MI, up_MI = torch_linear(x_MK, weight_NK, bias_N).chunk(2, dim=1)
        y_MN = silu_gate(gate_MI, up_MI)
    elif residual_MN is not None and bias_N is None and dtype == residual_MN.dtype == x_MK.dtype:
        return torch.addmm(residual_MN, x_MK, weight_NK.t(), out=out)
    elif out is not None and x_MK.is_cuda and dtype != x_MK.dtype and bias_N is residual_MN is None:
        # logits: no second copy of them
        return torch.mm(x_MK, weight_NK.t(), out_dtype=dtype, out=out)
    else:
        y_MN = _product(x_MK, weight_NK, bias_N, dtype)
    if residual_MN is not None:
        y_MN = y_MN + residual_MN
    return y_MN.to(dtype) if out is None else out.copy_(y_MN)


def _product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b; a result that is wider than x is not rounded to the dtype of x."""
    if dtype == x_MK.dtype:
        return torch_linear(x_MK, weight_NK, bias_N)
    if x_MK.is_cuda:
        y_MN = torch.mm(x_MK, weight_NK.t(), out_dtype=dtype)
    else:
        # torch has no such product on the CPU
        y_MN = x_MK.to(dtype) @ weight_NK.to(dtype).t()
    return y_MN if bias_N is None else y_MN + bias_N


def _outputs(weight_NK: Tensor, is_gated: bool) -> int:
    return len(weight_NK) // 2 if is_gated else len(weight_NK)


def _checked_dtype(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm: Norm | None,
    residual_MN: Tensor | None,
    is_gated: bool,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Check the operands of a product; return the dtype of its result."""
    if x_MK.dim() != 2 or x_MK.dtype not in _DTYPES or x_MK.stride(1) != 1:
        found = f"{x_MK.dtype} {tuple(x_MK.shape)} with strides {x_MK.stride()}"
        raise ValueError(f"x: expected [M, K] of fp32, fp16 or bf16, rows contiguous, got {found}")
    num_rows, width = x_MK.shape
    if weight_NK.shape[1:] != (width,) or weight_NK.dtype != x_MK.dtype or weight_NK.stride(1) != 1:
        found = f"{weight_NK.dtype} {tuple(weight_NK.shape)} with strides {weight_NK.stride()}"
        raise ValueError(
            f"weight: expected {x_MK.dtype} [N, {width}], rows contiguous, got {found}"
        )
    if is_gated and len(weight_NK) % 2:
        raise ValueError(f"weight: {len(weight_NK)} rows, a gated product needs an even number")
    shape = num_rows, _outputs(weight_NK, is_gated)
    vectors = {"bias": (bias_N, len(weight_NK)), "norm": (norm and norm[0], width)}
    for name, (vector, size) in vectors.items():
        if vector is not None and (vector.shape != (size,) or not vector.is_contiguous()):
            raise ValueError(f"{name}: expected [{size}], got {tuple(vector.shape)}")
    if bias_N is not None and bias_N.dtype != x_MK.dtype:
        raise ValueError(f"bias: expected {x_MK.dtype}, the dtype of x, got {bias_N.dtype}")
    for name, matrix in {"residual": residual_MN, "out": out}.items():
        if matrix is not None and (matrix.shape != shape or matrix.stride(1) != 1):
            found = f"{tuple(matrix.shape)} with strides {matrix.stride()}"
            raise ValueError(f"{name}: expected {list(shape)}, rows contiguous, got {found}")
    dtype = out_dtype or (x_MK.dtype if out is None else out.dtype)
    if dtype not in (x_MK.dtype, torch.float32) or (out is not None and out.dtype != dtype):
        raise ValueError(f"out_dtype: expected {x_MK.dtype} or fp32, as out has, got {dtype}")
    return dtype


def linear_reference(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    is_gated: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``narrow_linear`` in plain torch, also for fp64."""
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    x, factor_M1 = x_MK, torch.ones(())
    if norm is not None:
        norm_K, eps = norm
        x = (x.to(wide) * norm_K).to(x.dtype)
        factor_M1 = torch.rsqrt(x_MK.to(wide).square().mean(dim=1, keepdim=True) + eps)
    y = x.to(wide) @ weight_NK.to(wide).t() * factor_M1
    if bias_N is not None:
        y = y + bias_N
    if is_gated:
        gate, up = y.chunk(2, dim=1)
        y = silu(gate) * up
    if residual_MN is not None:
        y = y + residual_MN
    return y.to(out_dtype or x_MK.dtype) if out is None else out.copy_(y)
