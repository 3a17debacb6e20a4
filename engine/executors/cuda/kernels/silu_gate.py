"""The gate of SwiGLU and of Memory+ as a Triton kernel.

Shape suffixes: T tokens, I width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu as torch_silu

from memory_ops.triton_kernels.launch import constant_row_stride, on_device_of

# columns per program; not timed on a GPU
_BLOCK, _NUM_WARPS = 2048, 4


def silu_gate(gate_TI: Tensor, x_TI: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * x``, rounded like torch rounds ``silu(gate) * x.to(gate.dtype)``.

    Args:
        gate_TI: fp32, fp16 or bf16, ``[T, I]`` with contiguous rows and any row stride.
        x_TI: the same shape, any of these dtypes.
        out: receives the result: the shape and dtype of the gate. It may be gate or x.

    Returns:
        ``[T, I]`` in the dtype of the gate: ``out`` if given.

    Raises:
        ValueError: a shape, a layout or the dtype of out does not match.
    """
    for name, tensor in {"gate": gate_TI, "x": x_TI, "out": out}.items():
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.shape != gate_TI.shape or tensor.stride(1) != 1:
            found = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name}: expected the gate's [T, I], rows contiguous, got {found}")
    if out is None:
        out = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
    if out.dtype != gate_TI.dtype:
        raise ValueError(f"out: expected {gate_TI.dtype}, the gate's dtype, got {out.dtype}")
    num_tokens, width = gate_TI.shape
    if out.numel():
        with on_device_of(out):
            _silu_gate[(num_tokens, triton.cdiv(width, _BLOCK))](
                gate_TI,
                x_TI,
                out,
                WIDTH=width,
                GATE_STRIDE=constant_row_stride(gate_TI),
                X_STRIDE=constant_row_stride(x_TI),
                OUT_STRIDE=constant_row_stride(out),
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return out


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) of fp32 values."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_gate(
    gate_ptr,
    x_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, i] = silu(gate[t, i]) * x[t, i]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < WIDTH
    narrow = tl.load(gate_ptr + token * GATE_STRIDE + columns, mask=live, other=0.0)
    gate = silu(narrow.to(tl.float32)).to(narrow.dtype).to(tl.float32)
    x = tl.load(x_ptr + token * X_STRIDE + columns, mask=live, other=0.0)
    x = x.to(tl.float32).to(narrow.dtype).to(tl.float32)
    tl.store(out_ptr + token * OUT_STRIDE + columns, (gate * x).to(narrow.dtype), mask=live)


def silu_gate_reference(gate_TI: Tensor, x_TI: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu_gate`` in plain torch."""
    y_TI = torch_silu(gate_TI) * x_TI.to(gate_TI.dtype)
    return y_TI if out is None else out.copy_(y_TI)
