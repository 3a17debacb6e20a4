"""Weights of products in the layout of the CUDA kernels, without a second copy of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.executors.cuda.kernels.linear import linear
from engine.executors.cuda.kernels.linear_operands import LinearOperands
from engine.executors.cuda.kernels.rms_norm import Norm
from engine.model.grouped_layers import GroupedEmbedding, GroupedLinear
from engine.model.grouped_weights import VALUE_DTYPES, WeightGroups, in_one_format
from engine.model.norm import RmsNorm


class Product(NamedTuple):
    """Weights ``[outputs, inputs]``, dense or groups, and a bias of layers that read the same x."""

    weight_NK: Tensor | WeightGroups
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

    def with_scaled_bias(self, scale: float) -> "Product":
        """This product, with its bias multiplied by a number."""
        return self if self.bias_N is None else self._replace(bias_N=self.bias_N * scale)


def joined(*layers: nn.Linear | GroupedLinear) -> Product:
    """One product of layers with the same input. The weights of several layers become views of it.

    They get one format (``in_one_format``); if it is dense, layers in groups also keep their own.
    """
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return Product(_joined_weights(layers), torch.cat(biases) if biases else None)


def joined_experts(experts: Sequence[Sequence[nn.Linear | GroupedLinear]]) -> Tensor | WeightGroups:
    """The ``joined`` weights of the layers of each expert, ``[E, outputs, inputs]``."""
    weight = _joined_weights([layer for layers in experts for layer in layers])
    size = len(experts), -1
    if isinstance(weight, Tensor):
        return torch.unflatten(weight, 0, size)
    return _from_arrays(
        {name: torch.unflatten(one, 0, size) for name, one in weight.tensors.items()}
    )


def weight_of(
    layer: nn.Linear | nn.Embedding | GroupedLinear | GroupedEmbedding,
) -> Tensor | WeightGroups:
    """The weights of a layer, dense or in groups."""
    return layer.groups if isinstance(layer, GroupedLinear | GroupedEmbedding) else layer.weight


def _joined_weights(layers: Sequence[nn.Linear | GroupedLinear]) -> Tensor | WeightGroups:
    """The weights of layers with the same input, which become views of it one after the other."""
    dense = (layer.weight.dtype for layer in layers if isinstance(layer, nn.Linear))
    inputs, dtype = layers[0].in_features, next(dense, torch.float32)
    weights = [_arrays(one) for one in in_one_format([*map(weight_of, layers)], inputs, dtype)]
    if len(layers) == 1:
        return _from_arrays(weights[0])
    outputs = sum(layer.out_features for layer in layers)
    joined_arrays = {
        name: array.new_empty(outputs, array.shape[1]) for name, array in weights[0].items()
    }
    first = 0
    for index, layer in enumerate(layers):
        places = {
            name: array[first : first + layer.out_features] for name, array in joined_arrays.items()
        }
        for name, place in places.items():
            place.copy_(weights[index][name].detach())
        # frees the layer's own weights, so that there is no second copy
        weights[index] = places
        view = _from_arrays(places)
        if isinstance(view, Tensor) and isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(view, requires_grad=False)
        elif isinstance(view, WeightGroups) and isinstance(layer, GroupedLinear):
            layer.groups = view
        first += layer.out_features
    return _from_arrays(joined_arrays)


def _arrays(weight: Tensor | WeightGroups) -> dict[str, Tensor]:
    return {"weight": weight} if isinstance(weight, Tensor) else weight.tensors


def _from_arrays(arrays: Mapping[str, Tensor]) -> Tensor | WeightGroups:
    """The inverse of ``_arrays``."""
    if len(arrays) == 1:
        return arrays["weight"]
    values, scales, *minimums = arrays.values()
    bits = next(bits for bits, dtype in VALUE_DTYPES.items() if values.dtype is dtype)
    return WeightGroups(values, scales, bits, *minimums)


def norm_of(norm: RmsNorm) -> Norm:
    """A norm as the kernels take it."""
    return norm.weight, norm.eps
