"""The gated unit of SwiGLU and of Memory+."""

import torch
from torch import Tensor

from engine.ops.native.library import native_ops


def silu_gate(gate_TI: Tensor, x_TI: Tensor) -> Tensor:
    """``silu(gate) * x``, elementwise, ``[T, I]`` in the dtype of ``gate``. arXiv 2002.05202.

    ``x`` may be wider, such as sums of rows in fp32.
    """
    native = native_ops(gate_TI.device, gate_TI.dtype)
    if native is not None and x_TI.dtype is torch.float32 and not torch.is_grad_enabled():
        return native.silu_gate(gate_TI, x_TI)
    return silu_gate_by_torch(gate_TI, x_TI)


def silu_gate_by_torch(gate_TI: Tensor, x_TI: Tensor) -> Tensor:
    """``silu_gate`` on any device, at any precision, and with gradients."""
    return torch.nn.functional.silu(gate_TI) * x_TI.to(gate_TI.dtype)
