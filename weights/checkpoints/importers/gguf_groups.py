"""Weights in groups from blocks of GGUF files: Q8_0, Q4_0, Q4_1 and Q4_K."""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.model.grouped_weights import GroupFormat, WeightGroups
from engine.model.weight_bits import GROUP
from weights.errors import CheckpointError

_KINDS = gguf.GGMLQuantizationType
GROUP_FORMATS = {
    _KINDS.Q8_0: GroupFormat(8),
    _KINDS.Q4_0: GroupFormat(4),
    _KINDS.Q4_1: GroupFormat(4, has_minimums=True),
    _KINDS.Q4_K: GroupFormat(4, has_minimums=True),
}
_SCALE_BYTES = 2


def block_groups(tensor: Any, reorder: Callable[[Tensor], Tensor]) -> WeightGroups:
    """The groups of a tensor of a kind in ``GROUP_FORMATS``, its rows reordered.

    Weights keep their values, but for Q4_K, whose scales and minimums are rounded to fp16: by a
    2,048th of themselves at most.

    Raises:
        CheckpointError: a scale or minimum is NaN, or too large for fp16.
    """
    read = _q4_k if tensor.tensor_type == _KINDS.Q4_K else _simple
    groups = read(np.array(tensor.data), GROUP_FORMATS[tensor.tensor_type])
    for array in groups.tensors.values():
        if array.is_floating_point() and not array.isfinite().all():
            raise CheckpointError(f"tensor {tensor.name} has scales that are NaN or too large")
    values, scales, *minimums = (reorder(array) for array in groups.tensors.values())
    return WeightGroups(values, scales, groups.bits, *minimums)


def _simple(rows: np.ndarray, group_format: GroupFormat) -> WeightGroups:
    """Blocks of one group: fp16 scale, fp16 minimum if it has one, integers."""
    halves = 1 + group_format.has_minimums
    blocks = rows.reshape(len(rows), -1, _SCALE_BYTES * halves + GROUP * group_format.bits // 8)
    scales, integers = np.split(blocks, [_SCALE_BYTES * halves], axis=2)
    values = torch.from_numpy(np.ascontiguousarray(integers).reshape(len(rows), -1))
    if group_format.bits == 8:
        values = values.view(torch.int8)
    floats = torch.from_numpy(np.ascontiguousarray(scales)).view(torch.float16)
    return WeightGroups(values, floats[:, :, 0], group_format.bits, *floats.unbind(dim=2)[1:])


def _q4_k(rows: np.ndarray, group_format: GroupFormat) -> WeightGroups:
    """Blocks of 8 groups: a scale of scales, one of minimums, 6 bits for each of both, nibbles.

    Two groups share 32 bytes: the first one has the low halves.
    """
    blocks_OB = torch.from_numpy(rows.reshape(len(rows), -1, 144))
    wholes_OB2 = blocks_OB[:, :, :4].contiguous().view(torch.float16).float()
    six_bits_OB12 = blocks_OB[:, :, 4:16].int()
    first, second, third = six_bits_OB12.chunk(3, dim=2)
    scales_OB8 = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=2)
    minimums_OB8 = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=2)
    bytes_OB4Q = torch.unflatten(blocks_OB[:, :, 16:], 2, (4, GROUP))
    halves_OB42Q = torch.stack([bytes_OB4Q & 15, bytes_OB4Q >> 4], dim=3)
    low, high = halves_OB42Q.chunk(2, dim=4)
    return WeightGroups(
        (low | high << 4).flatten(1),
        (wholes_OB2[:, :, :1] * scales_OB8).flatten(1).half(),
        group_format.bits,
        (wholes_OB2[:, :, 1:] * -minimums_OB8).flatten(1).half(),
    )
