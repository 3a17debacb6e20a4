"""RMSNorm as a Triton kernel.

Shape suffixes: T tokens, D width of a row, W rows of the norm's weight.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model import norm as model_norm
from memory_ops.triton_kernels.launch import on_device_of

# a norm's weight [D] and eps
Norm = tuple[Tensor, float]

# (largest width, warps per row); not timed on a GPU
_WARPS = ((256, 1), (4096, 4), (1 << 20, 8))


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``engine.model.norm.rms_norm``, with the same rounding:

        y = x / sqrt(mean(x^2) + eps) * weight

    Args:
        x_TD: fp32, fp16 or bf16, ``[T, ..., D]``. Tokens may have any stride; the values of one
            token are contiguous.
        weight_D: ``[D]``, or ``[W, D]`` if W is the last dimension but one of x: a weight for each.
        eps: added to the mean.

    Returns:
        y, contiguous, in the shape and dtype of x.

    Raises:
        ValueError: a shape or a layout does not match.
    """
    _check(x_TD, weight_D)
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if out.numel():
        width = x_TD.shape[-1]
        per_token = x_TD[0].numel() // width
        with on_device_of(x_TD):
            _rms_norm[(len(x_TD) * per_token,)](
                x_TD,
                weight_D,
                out,
                EPS=eps,
                WIDTH=width,
                PER_TOKEN=per_token,
                WEIGHT_ROWS=weight_D.numel() // width,
                # a single token's stride may be any number
                X_STRIDE=x_TD.stride(0) if len(x_TD) > 1 else x_TD.numel(),
                BLOCK=triton.next_power_of_2(width),
                num_warps=next(warps for most, warps in _WARPS if width <= most),
                num_stages=1,
                enable_fp_fusion=True,
            )
    return out


def _check(x_TD: Tensor, weight_D: Tensor) -> None:
    if x_TD.dim() < 2 or weight_D.shape not in (x_TD.shape[-1:], x_TD.shape[-2:]):
        shapes = f"{tuple(weight_D.shape)} for {tuple(x_TD.shape)}"
        raise ValueError(f"weight: expected the last one or two dimensions of x, got {shapes}")
    if x_TD.dim() == 2 and weight_D.dim() == 2:
        raise ValueError("weight: two dimensions, expected one for an x of [T, D]")
    if not weight_D.is_contiguous():
        raise ValueError(f"weight: expected contiguous values, got strides {weight_D.stride()}")
    if len(x_TD) and not x_TD[0].is_contiguous():
        raise ValueError(f"x: expected contiguous values per token, got strides {x_TD.stride()}")


@triton.jit
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = weight[r % W] * (x[r] / sqrt(mean(x[r]^2) + eps)), by row r."""
    row = tl.program_id(0).to(tl.int64)
    token, part = row // PER_TOKEN, row % PER_TOKEN
    columns = tl.arange(0, BLOCK)
    live = columns < WIDTH
    places = x_ptr + token * X_STRIDE + part * WIDTH + columns
    narrow = tl.load(places, mask=live, other=0.0)
    x = narrow.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + EPS)
    weight = tl.load(weight_ptr + row % WEIGHT_ROWS * WIDTH + columns, mask=live, other=0.0)
    y = weight.to(tl.float32) * normed.to(narrow.dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, y.to(narrow.dtype), mask=live)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in plain torch: the model's norm."""
    return model_norm.rms_norm(x_TD, weight_D, eps)
