"""Weights in groups of every format, with random values."""

import torch
from torch import Tensor

from engine.model.grouped_weights import GroupFormat, WeightGroups, group_weights

FORMATS = (GroupFormat(8), GroupFormat(4), GroupFormat(4, has_minimums=True))


def random_groups(one: GroupFormat, outputs: int, inputs: int) -> WeightGroups:
    """Random weights of the order of 1."""
    return rounded(one, torch.randn(outputs, inputs))


def rounded(one: GroupFormat, weight_OI: Tensor) -> WeightGroups:
    """Weights in groups; minimums are random, an eighth of the weights' size."""
    groups = group_weights(weight_OI, one.bits)
    if not one.has_minimums:
        return groups
    minimums_OG = torch.randn(groups.scales_OG.shape) * weight_OI.std(correction=0) / 8
    return WeightGroups(groups.values, groups.scales_OG, one.bits, minimums_OG.half())
