"""Linear layers and embeddings whose weights have 8 or 4 bits and a scale per group of inputs.

A group is ``GROUP`` consecutive inputs of one output; its weights are integers times an fp16 scale,
as in llama.cpp's formats Q8_0 (8 bits) and Q4_0 (4 bits), which it can hold without loss:

* 8 bits: int8 ``[O, G * 32]``, from -128 to 127.
* 4 bits: uint8 ``[O, G * 16]``; byte i of a group has input i in its low half and input i + 16 in
  its high half, as the integer plus 8.

O outputs, I inputs, G groups; the last group is padded with weights of 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from engine.model.uninitialised import ExactLinear
from engine.model.weight_bits import GROUP

VALUE_DTYPES = {8: torch.int8, 4: torch.uint8}
_PART_WEIGHTS = 1 << 22
# candidates for the place of a group's most extreme weight on the scale of -8 to 7
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
    """Round weights to groups of ``bits`` bits, some outputs at a time to save memory.

    With 8 bits the largest weight of a group becomes 127 or -127. With 4 bits the scale is the one
    of several candidates that has the smallest squared error.
    """
    round_part = {8: _rounded_to_8_bits, 4: _rounded_to_4_bits}[bits]
    outputs = max(1, _PART_WEIGHTS // weight_OI.shape[1])
    parts = [round_part(_grouped(part_OI.float())) for part_OI in torch.split(weight_OI, outputs)]
    values, scales = zip(*parts, strict=True)
    return WeightGroups(torch.cat(values), torch.cat(scales), bits)


def widened(groups: WeightGroups) -> WeightGroups:
    """The same weights in 8 bits."""
    if groups.bits == 8:
        return groups
    return WeightGroups(_integers(groups).flatten(1), groups.scales_OG, 8)


def dense_weights(groups: WeightGroups, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights ``[O, I]`` in ``dtype``, contiguous; converts some outputs at a time."""
    values, scales_OG, bits = groups
    dense_OI = torch.empty(len(values), inputs, dtype=dtype, device=values.device)
    step = max(1, _PART_WEIGHTS // inputs)
    for first in range(0, len(dense_OI), step):
        part = slice(first, first + step)
        wide_OGI = _integers(WeightGroups(values[part], scales_OG[part], bits)).float()
        wide_OGI *= scales_OG[part].float().unsqueeze(2)
        dense_OI[part] = wide_OGI.flatten(1)[:, :inputs]
    return dense_OI


def _rounded_to_8_bits(wide_OGI: Tensor) -> tuple[Tensor, Tensor]:
    scales_OG = (wide_OGI.abs().amax(dim=2) / 127).half()
    return _rounded(wide_OGI, scales_OG, -127, 127).flatten(1), scales_OG


def _rounded_to_4_bits(wide_OGI: Tensor) -> tuple[Tensor, Tensor]:
    places_OG1 = wide_OGI.abs().argmax(dim=2, keepdim=True)
    extremes_OG = wide_OGI.gather(2, places_OG1).squeeze(2)
    candidates_COG = torch.stack(
        [_refined(wide_OGI, (extremes_OG / place).half()) for place in _EXTREMES]
    )
    errors_COG = torch.stack([_errors(wide_OGI, scales_OG) for scales_OG in candidates_COG])
    scales_OG = candidates_COG.gather(0, errors_COG.argmin(dim=0, keepdim=True)).squeeze(0)
    nibbles_OGI = (_rounded(wide_OGI, scales_OG, -8, 7) + 8).to(torch.uint8)
    low_OGI, high_OGI = nibbles_OGI.chunk(2, dim=2)
    return (low_OGI | high_OGI << 4).flatten(1), scales_OG


def _integers(groups: WeightGroups) -> Tensor:
    """The integers ``[O, G, 32]`` as int8."""
    values_OGI = torch.unflatten(groups.values, 1, (groups.scales_OG.shape[1], -1))
    if groups.bits == 8:
        return values_OGI
    return torch.cat([values_OGI & 15, values_OGI >> 4], dim=2).to(torch.int8) - 8


def _grouped(weight_OI: Tensor) -> Tensor:
    inputs = weight_OI.shape[1]
    padded_OI = pad(weight_OI, (0, -inputs % GROUP))
    return torch.unflatten(padded_OI, 1, (num_groups(inputs), GROUP))


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
    """The weights of a linear layer in groups; uninitialised. It cannot run: see ``dense``.

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


class GroupedEmbedding(nn.Module):
    """The rows of an embedding in groups; uninitialised.

    Attributes:
        weight, weight_scales: the groups' arrays, with V tokens as outputs.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.weight, self.weight_scales = _parameters(num_embeddings, embedding_dim, bits)

    @classmethod
    def rounded(cls, embedding: nn.Embedding, bits: int) -> "GroupedEmbedding":
        """The rows of an embedding, rounded by ``group_weights``."""
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim, bits)
        groups = group_weights(embedding.weight, bits)
        made.weight = nn.Parameter(groups.values, requires_grad=False)
        made.weight_scales = nn.Parameter(groups.scales_OG, requires_grad=False)
        return made

    @property
    def groups(self) -> WeightGroups:
        """The rows."""
        return WeightGroups(self.weight, self.weight_scales, self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows ``[V, D]`` in ``dtype``."""
        return dense_weights(self.groups, self.embedding_dim, dtype)

    def rows(self, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of some tokens, ``[T, D]`` in ``dtype``."""
        some = WeightGroups(self.weight[ids_T], self.weight_scales[ids_T], self.bits)
        return dense_weights(some, self.embedding_dim, dtype)


def use_groups(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Replace layers of a model, by name, by uninitialised ones in groups of ``bits``.

    The names are among ``groupable``.
    """
    for name, count in bits.items():
        layer, (parent, _, last) = model.get_submodule(name), name.rpartition(".")
        made: nn.Module
        if isinstance(layer, nn.Embedding):
            made = GroupedEmbedding(layer.num_embeddings, layer.embedding_dim, count)
        else:
            assert isinstance(layer, nn.Linear)
            sizes = layer.in_features, layer.out_features
            made = GroupedLinear(*sizes, count, bias=layer.bias is not None)
        setattr(model.get_submodule(parent), last, made)


def groupable(model: nn.Module) -> set[str]:
    """Names of a model's layers whose weights may be in groups."""
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Embedding) and not isinstance(layer, ExactLinear)
    }


def group_bits(model: nn.Module) -> dict[str, int]:
    """Bits of the layers whose weights are in groups, by name."""
    return {
        name: layer.bits
        for name, layer in model.named_modules()
        if isinstance(layer, GroupedLinear | GroupedEmbedding)
    }


def group_shapes(outputs: int, inputs: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the values and of the scales of a layer's groups."""
    groups = num_groups(inputs)
    return (outputs, groups * GROUP * bits // 8), (outputs, groups)


def dense_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model in ``dtype``, with dense weights instead of groups."""
    state = model.state_dict()
    for name in group_bits(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, GroupedLinear | GroupedEmbedding)
        state[f"{name}.weight"] = layer.dense(dtype)
        del state[f"{name}.weight_scales"]
    return {name: value.to(dtype) for name, value in state.items()}


def _parameters(outputs: int, inputs: int, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
    values, scales = group_shapes(outputs, inputs, bits)
    return (
        nn.Parameter(torch.empty(values, dtype=VALUE_DTYPES[bits]), requires_grad=False),
        nn.Parameter(torch.empty(scales, dtype=torch.float16), requires_grad=False),
    )
