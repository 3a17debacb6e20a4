"""Weights of products in the layout of the CUDA kernels, without a second copy of them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.executors.cuda.kernels.linear import linear
from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.rms_norm import Norm
from engine.model.norm import RmsNorm


class Product(NamedTuple):
    """``[outputs, inputs]`` weights and a bias of one or more layers with the same input."""

    weight_NK: Tensor
    bias_N: Tensor | None = None

    def __call__(
        self,
        x_MK: Tensor,
        *,
        norm: Norm | None = None,
        residual_MO: Tensor | None = None,
        is_gated: bool = False,
        out_MO: Tensor | None = None,
    ) -> Tensor:
        """``norm(x) W^T + b``, gated or added to a residual stream in place; see ``linear``."""
        out_MO = residual_MO if out_MO is None else out_MO
        return linear(
            LinearOperands(x_MK, self.weight_NK, self.bias_N, norm, residual_MO, is_gated, out_MO)
        )


def joined(*layers: nn.Linear) -> Product:
    """One product of layers with the same input. The layers' weights become views of it."""
    if len(layers) == 1:
        return Product(layers[0].weight, layers[0].bias)
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    weight_NK = torch.cat(weights)
    bias_N = torch.cat(biases) if biases else None
    first = 0
    for layer in layers:
        last = first + len(layer.weight)
        layer.weight = nn.Parameter(weight_NK[first:last], requires_grad=False)
        first = last
    return Product(weight_NK, bias_N)


def norm_of(norm: RmsNorm) -> Norm:
    """A norm as the kernels take it."""
    return norm.weight, norm.eps
