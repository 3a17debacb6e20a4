"""Packs copies of the model's weights for the CPU kernels.

A packed product includes the norm before it: ``out = concat(W_i norm(x) + b_i)``, or, for a gated
pair of layers, ``out = silu(W_0 norm(x) + b_0) * (W_1 norm(x) + b_1)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.executors.cpu.kernels import CpuKernels
from engine.executors.cpu.packed_head_norms import PackedHeadNorms
from engine.executors.cpu.packed_linear import PackedLinear, WeightRows
from engine.model.attention import Attention
from engine.model.grouped_layers import GroupedEmbedding, GroupedLinear
from engine.model.grouped_weights import WeightGroups, group_weights, in_one_format
from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from engine.model.uninitialised import ExactLinear

Linear = nn.Linear | nn.Embedding | GroupedLinear | GroupedEmbedding


@dataclass(frozen=True)
class Packer:
    """Packs weights for the kernels; converts one product at a time if needed.

    Attributes:
        kernels: the kernels.
        dtype: dtype of inputs, outputs and, unless they are in groups, weights.
        weight_bits: bits (8 or 4) to which ``linear`` rounds weights, except those of
            ``ExactLinear``; None keeps them in ``dtype``.
    """

    kernels: CpuKernels
    dtype: torch.dtype
    weight_bits: int | None = None

    def linear(
        self,
        *layers: Linear,
        norm: RmsNorm | None = None,
        is_gated: bool = False,
        bias_scale: float = 1.0,
    ) -> PackedLinear:
        """One product of layers with the same input; the rows of an embedding give logits.

        Biases are multiplied by ``bias_scale``.
        """
        inputs = _inputs(layers[0])
        weights = in_one_format([self._weights(one) for one in layers], inputs, self.dtype)
        rows, first = [], 0
        for index, layer in enumerate(layers):
            bias = layer.bias if isinstance(layer, nn.Linear | GroupedLinear) else None
            bias_O = None if bias is None else self.cast(bias) * bias_scale
            part = index if is_gated else 0
            rows.append(WeightRows(weights[index], bias_O, first=first, part=part))
            first += 0 if is_gated else len(layer.weight)
        outputs = len(layers[0].weight) if is_gated else first
        packed_norm = None if norm is None else (self.cast(norm.weight), norm.eps)
        return self.kernels.pack(
            rows, inputs, outputs, self.dtype, norm=packed_norm, is_gated=is_gated
        )

    def subkeys(self, memory: MemoryLayer) -> PackedLinear:
        """The product of queries and subkeys: half scores in fp32, the query norm included."""
        subkeys_H2Nk, query_norm = self.cast(memory.subkeys), memory.query_norm
        rows = [WeightRows(half, block=i) for i, half in enumerate(subkeys_H2Nk.flatten(0, 1))]
        norm = None if query_norm is None else (self.cast(query_norm), memory.norm_eps)
        inputs, outputs = subkeys_H2Nk.shape[3], memory.num_subkeys
        return self.kernels.pack(
            rows, inputs, outputs, self.dtype, norm=norm, has_wide_outputs=True
        )

    def norm(self, norm: RmsNorm) -> RmsNorm:
        """The same norm in the packer's dtype."""
        made = RmsNorm(len(norm.weight), norm.eps)
        made.weight = nn.Parameter(self.cast(norm.weight), requires_grad=False)
        return made

    def head_norms(self, attention: Attention) -> PackedHeadNorms | None:
        """The norms of queries and keys, if the layer has them."""
        if attention.q_norm is None or attention.k_norm is None:
            return None
        return PackedHeadNorms(self.norm(attention.q_norm), self.norm(attention.k_norm))

    def _weights(self, layer: Linear) -> Tensor | WeightGroups:
        if isinstance(layer, GroupedLinear | GroupedEmbedding):
            return layer.groups
        if self.weight_bits is not None and not isinstance(layer, ExactLinear):
            return group_weights(layer.weight, self.weight_bits)
        return layer.weight

    def cast(self, weight: Tensor) -> Tensor:
        """A weight in the packer's dtype."""
        return weight.to(self.dtype)


def _inputs(layer: Linear) -> int:
    if isinstance(layer, nn.Embedding | GroupedEmbedding):
        return layer.embedding_dim
    return layer.in_features
