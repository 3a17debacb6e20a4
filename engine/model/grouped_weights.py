"""Linear layers and embeddings whose weights have 8 or 4 bits and a scale per group of inputs.

A group is ``GROUP`` consecutive inputs of one output; its weights are integers times an fp16 scale,
as in llama.cpp's formats Q8_0 (8 bits) and Q4_0 (4 bits), which it can hold without loss:

* 8 bits: int8 ``[O, G * 32]``, from -128 to 127.
* 4 bits: uint8 ``[O, G * 16]``; byte i of a group has input i in its low half and input i + 16 in
  its high half, as the integer plus 8.

O outputs, I inputs, G groups; the last group is padded with weights of 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

GROUP = 32
WEIGHT_BITS = {"int8": 8, "int4": 4}
# where the most extreme weight of a group may lie on the scale of -8 to 7
_EXTREMES = (-8.0, -7.4, -8.6, 7.4)


class WeightGroups(NamedTuple):
    """Weights ``[O, I]`` in groups; the arrays are those of the module's docstring."""

    values: Tensor
    scales_OG: Tensor
    bits: int


def num_groups(inputs: int) -> int:
    """Groups of an output's weights."""
    return -(-inputs // GROUP)


def group_weights(weight_OI: Tensor, bits: int) -> WeightGroups:
    """Round weights to groups of ``bits`` bits.

    With 8 bits the largest weight of a group becomes 127 or -127. With 4 bits the scale is that of
    a few which has the smallest squared error.
    """
    wide_OGI = _grouped(weight_OI.float())
    if bits == 8:
        scales_OG = (wide_OGI.abs().amax(dim=2) / 127).half()
        return WeightGroups(_rounded(wide_OGI, scales_OG, -127, 127).flatten(1), scales_OG, bits)
    assert bits == 4
    places_OG1 = wide_OGI.abs().argmax(dim=2, keepdim=True)
    extremes_OG = wide_OGI.gather(2, places_OG1).squeeze(2)
    best_OG, scales_OG = None, torch.zeros_like(extremes_OG).half()
    for place in _EXTREMES:
        tried_OG = _refined(wide_OGI, (extremes_OG / place).half())
        errors_OG = _errors(wide_OGI, tried_OG)
        if best_OG is None:
            best_OG, scales_OG = errors_OG, tried_OG
            continue
        is_better_OG = errors_OG < best_OG
        best_OG = torch.where(is_better_OG, errors_OG, best_OG)
        scales_OG = torch.where(is_better_OG, tried_OG, scales_OG)
    nibbles_OGI = (_rounded(wide_OGI, scales_OG, -8, 7) + 8).to(torch.uint8)
    low_OGI, high_OGI = nibbles_OGI.split(GROUP // 2, dim=2)
    return WeightGroups((low_OGI | high_OGI << 4).flatten(1), scales_OG, bits)


def dense_weights(groups: WeightGroups, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights ``[O, I]`` in ``dtype``."""
    values_OGI = groups.values.unflatten(1, (groups.scales_OG.shape[1], -1))
    if groups.bits == 4:
        low_OGI, high_OGI = values_OGI & 15, values_OGI >> 4
        values_OGI = torch.cat([low_OGI, high_OGI], dim=2).to(torch.int8) - 8
    wide_OGI = values_OGI.float() * groups.scales_OG.float().unsqueeze(2)
    return wide_OGI.flatten(1)[:, :inputs].to(dtype)


def _grouped(weight_OI: Tensor) -> Tensor:
    inputs = weight_OI.shape[1]
    return pad(weight_OI, (0, -inputs % GROUP)).unflatten(1, (num_groups(inputs), GROUP))


def _rounded(wide_OGI: Tensor, scales_OG: Tensor, least: int, most: int) -> Tensor:
    # a group of zeros has scale 0
    scaled_OGI = (wide_OGI / scales_OG.float().unsqueeze(2)).nan_to_num(0.0)
    return scaled_OGI.round_().clamp_(least, most).to(torch.int8)


def _refined(wide_OGI: Tensor, scales_OG: Tensor) -> Tensor:
    """The scales of least squared error for the integers that these scales give."""
    integers_OGI = _rounded(wide_OGI, scales_OG, -8, 7).float()
    refined_OG = (wide_OGI * integers_OGI).sum(dim=2) / integers_OGI.square().sum(dim=2)
    return refined_OG.nan_to_num(0.0).half()


def _errors(wide_OGI: Tensor, scales_OG: Tensor) -> Tensor:
    integers_OGI = _rounded(wide_OGI, scales_OG, -8, 7).float()
    return (wide_OGI - integers_OGI * scales_OG.float().unsqueeze(2)).square().sum(dim=2)


class GroupedLinear(nn.Module):
    """A linear layer whose weights are in groups; parameters are uninitialised.

    Attributes:
        weight, weight_scales: the groups' arrays.
        bias: ``[O]``, or None.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.weight, self.weight_scales = _parameters(out_features, in_features, bits)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def groups(self) -> WeightGroups:
        """The weights."""
        return WeightGroups(self.weight, self.weight_scales, self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights ``[O, I]`` in ``dtype``."""
        return dense_weights(self.groups, self.in_features, dtype)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return ``[T, O]`` in the dtype of ``x``, which is not rounded."""
        return linear(x_TI, self.dense(x_TI.dtype), self.bias)


class GroupedEmbedding(nn.Module):
    """An embedding whose rows are in groups; parameters are uninitialised.

    Attributes:
        weight, weight_scales: the groups' arrays, with V tokens as outputs.
        dtype: dtype of the rows that it returns.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, bits: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.dtype = bits, dtype
        self.weight, self.weight_scales = _parameters(num_embeddings, embedding_dim, bits)

    @property
    def groups(self) -> WeightGroups:
        """The rows."""
        return WeightGroups(self.weight, self.weight_scales, self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows ``[V, D]`` in ``dtype``."""
        return dense_weights(self.groups, self.embedding_dim, dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        """Return ``[T, D]``."""
        some = WeightGroups(self.weight[ids_T], self.weight_scales[ids_T], self.bits)
        return dense_weights(some, self.embedding_dim, self.dtype)


def _parameters(outputs: int, inputs: int, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
    groups = num_groups(inputs)
    values = torch.empty(
        outputs, groups * GROUP * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8
    )
    scales_OG = torch.empty(outputs, groups, dtype=torch.float16)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(scales_OG, requires_grad=False)
