"""Weights of products in the layout of the CUDA kernels, without a second copy of them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.executors.cuda.kernels.linear import linear
from engine.model.norm import RmsNorm

Norm = tuple[Tensor, float]


class Product(NamedTuple):
    """``[outputs, inputs]`` weights and a bias of one or more layers with the same input."""

    weight_NK: Tensor
    bias_N: Tensor | None = None

    def __call__(
        self,
        x_MK: Tensor,
        *,
        norm: Norm | None = None,
        residual_MN: Tensor | None = None,
        is_gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """``norm(x) W^T + b``, gated or added to a residual stream in place; see ``linear``."""
        return linear(
            x_MK,
            self.weight_NK,
            bias_N=self.bias_N,
            norm=norm,
            residual_MN=residual_MN,
            is_gated=is_gated,
            out=residual_MN if out is None else out,
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
