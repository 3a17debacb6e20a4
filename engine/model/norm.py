"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """Root-mean-square normalisation with a learned, uninitialised weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalise over the last dimension; return the shape and dtype of ``x``."""
        return rms_norm(x_TD, self.weight, self.eps)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, with fp32 statistics.

    Returns the shape and dtype of ``x``. Source: arXiv 1910.07467.
    """
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    # a trainer's weight may be wider than x
    return (weight_D * normed.to(x_TD.dtype)).to(x_TD.dtype)
