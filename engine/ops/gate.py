"""The gated unit of SwiGLU and of Memory+."""

import torch
from torch import Tensor


def silu_gate(gate_TI: Tensor, x_TI: Tensor) -> Tensor:
    """``silu(gate) * x``, elementwise, ``[T, I]`` in the arguments' dtype. arXiv 2002.05202."""
    return torch.nn.functional.silu(gate_TI) * x_TI
