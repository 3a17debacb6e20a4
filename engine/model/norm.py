"""The learned weight of an RMSNorm."""

import torch
from torch import Tensor, nn

from engine import ops


class RmsNorm(nn.Module):
    """Root-mean-square normalisation; its weight uninitialised."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return ``[T, D]`` in the dtype of ``x``."""
        return ops.rms_norm(x_TD, self.weight, self.eps)
