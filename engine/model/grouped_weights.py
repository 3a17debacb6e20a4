"""Weights that have 8 or 4 bits and a scale per group of inputs.

A group is ``GROUP`` consecutive inputs of one output; its weights are integers times an fp16 scale,
as in llama.cpp's formats Q8_0 (8 bits) and Q4_0 (4 bits), which it can hold without loss:

* 8 bits: int8 ``[O, G * 32]``, from -128 to 127.
* 4 bits: uint8 ``[O, G * 16]``; byte i of a group has input i in its low half and input i + 16 in
  its high half, as the integer (-8 to 7) plus 8.
* 4 bits with minimums: the integers are those halves themselves (0 to 15), and an fp16 minimum of
  the group is added to the scaled integer, as in llama.cpp's Q4_1.

O outputs, I inputs, G groups; the last group is padded with weights of 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.model.weight_bits import GROUP

VALUE_DTYPES = {8: torch.int8, 4: torch.uint8}
_TENSORS = ("weight", "weight_scales", "weight_minimums")
_PART_WEIGHTS = 1 << 22
# candidates for the place of a group's most extreme weight on the scale of -8 to 7
_EXTREMES = (-8.0, -7.4, -8.6, 7.4)


class GroupFormat(NamedTuple):
    """The format of weights in groups: 8 or 4 bits; groups of 4 bits may have minimums."""

    bits: int
    has_minimums: bool = False

    def __str__(self) -> str:
        return f"int{self.bits}" + (" with minimums" if self.has_minimums else "")

    def arrays(self, outputs: int, inputs: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shapes and dtypes of the arrays of some weights, by the name that a layer gives them."""
        groups = num_groups(inputs)
        values = (outputs, groups * GROUP * self.bits // 8), VALUE_DTYPES[self.bits]
        per_group = (outputs, groups), torch.float16
        found = {"weight": values, "weight_scales": per_group}
        return found | {"weight_minimums": per_group} if self.has_minimums else found

    def tensors(self, outputs: int, inputs: int) -> dict[str, Tensor]:
        """Uninitialised arrays of some weights."""
        arrays = self.arrays(outputs, inputs).items()
        return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in arrays}

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of some weights."""
        arrays = self.arrays(outputs, inputs).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


class WeightGroups(NamedTuple):
    """Weights ``[O, I]`` in groups; the arrays are those of the module's docstring.

    Arrays of several experts have one more dimension in front, which ``part`` with an index
    removes; the functions of this module take the weights of one.
    """

    values: Tensor
    scales_OG: Tensor
    bits: int
    minimums_OG: Tensor | None = None

    @property
    def format(self) -> GroupFormat:
        """Bits, and whether there are minimums."""
        return GroupFormat(self.bits, self.minimums_OG is not None)

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.values.shape[0]

    def part(self, outputs: slice | Tensor | int) -> "WeightGroups":
        """The weights of some outputs, or of one of several weights in the same arrays."""
        values, scales, *minimums = (array[outputs] for array in self.tensors.values())
        return WeightGroups(values, scales, self.bits, *minimums)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by the name that a layer gives them."""
        arrays = self.values, self.scales_OG, self.minimums_OG
        return {name: one for name, one in zip(_TENSORS, arrays, strict=True) if one is not None}


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
    """The same weights in 8 bits; rounded, if they have minimums."""
    if groups.bits == 8:
        return groups
    if groups.minimums_OG is not None:
        outputs, count = groups.scales_OG.shape
        step = max(1, _PART_WEIGHTS // (count * GROUP))
        parts = [
            group_weights(_wide(groups.part(slice(first, first + step))).flatten(1), 8)
            for first in range(0, outputs, step)
        ]
        values, scales = ([part.tensors[name] for part in parts] for name in _TENSORS[:2])
        return WeightGroups(torch.cat(values), torch.cat(scales), 8)
    return WeightGroups(_integers(groups).flatten(1), groups.scales_OG, 8)


def in_one_format(
    weights: Sequence[Tensor | WeightGroups], inputs: int, dtype: torch.dtype
) -> list[Tensor] | list[WeightGroups]:
    """The weights of one product in one format: in ``dtype`` if one is dense, else in groups.

    Groups get 8 bits if their formats differ.
    """
    groups = [one for one in weights if isinstance(one, WeightGroups)]
    if len(groups) < len(weights):
        return [
            one.to(dtype) if isinstance(one, Tensor) else dense_weights(one, inputs, dtype)
            for one in weights
        ]
    return groups if len({one.format for one in groups}) == 1 else [widened(one) for one in groups]


def dense_weights(groups: WeightGroups, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights ``[O, I]`` in ``dtype``, contiguous; converts some outputs at a time."""
    dense_OI = torch.empty(len(groups.values), inputs, dtype=dtype, device=groups.values.device)
    step = max(1, _PART_WEIGHTS // inputs)
    for first in range(0, len(dense_OI), step):
        part = slice(first, first + step)
        dense_OI[part] = _wide(groups.part(part)).flatten(1)[:, :inputs]
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


def _wide(groups: WeightGroups) -> Tensor:
    """The weights ``[O, G, 32]`` in fp32."""
    wide_OGI = _integers(groups).float() * groups.scales_OG.float().unsqueeze(2)
    if groups.minimums_OG is None:
        return wide_OGI
    return wide_OGI + groups.minimums_OG.float().unsqueeze(2)


def _integers(groups: WeightGroups) -> Tensor:
    """The integers ``[O, G, 32]`` as int8."""
    values_OGI = torch.unflatten(groups.values, 1, (groups.scales_OG.shape[1], -1))
    if groups.bits == 8:
        return values_OGI
    halves_OGI = torch.cat([values_OGI & 15, values_OGI >> 4], dim=2).to(torch.int8)
    return halves_OGI if groups.minimums_OG is not None else halves_OGI - 8


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
