"""Rounding to groups of 8 and 4 bits: errors, exact values, padding, and blocks of GGUF files."""

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.model import grouped_weights
from engine.model.grouped_weights import (
    GroupFormat,
    WeightGroups,
    dense_weights,
    group_weights,
    widened,
)
from engine.model.weight_bits import GROUP

each_width = pytest.mark.parametrize("bits", [8, 4])
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 100)


def drawn(outputs, inputs, seed):
    made = torch.Generator().manual_seed(seed)
    # groups of very different sizes, and some of zeros
    sizes_O1 = 10.0 ** torch.randint(-3, 4, (outputs, 1), generator=made)
    sizes_O1 *= torch.rand(outputs, 1, generator=made) < 0.9
    return torch.randn(outputs, inputs, generator=made) * sizes_O1


def dense(groups, inputs):
    return dense_weights(groups, inputs, torch.float32)


def by_groups(values_OI):
    return nn.functional.pad(values_OI, (0, -values_OI.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


@given(outputs=SIZES, inputs=SIZES, seed=SEEDS)
def test_8_bits_err_by_half_a_step_at_most(outputs, inputs, seed):
    weight = drawn(outputs, inputs, seed)
    groups = group_weights(weight, 8)
    errors_OGI = by_groups(dense(groups, inputs) - weight).abs()
    # scales below 2^-14 are multiples of 2^-24
    most_OG1 = groups.scales_OG.float().unsqueeze(2) * 0.5001 + 127 * 2**-25
    assert (errors_OGI <= most_OG1).all()


@given(outputs=SIZES, inputs=SIZES, seed=SEEDS)
def test_4_bits_are_never_worse_than_the_extreme_weight_at_minus_8(outputs, inputs, seed):
    weight = drawn(outputs, inputs, seed)
    wide_OGI = by_groups(weight)
    extremes_OG1 = wide_OGI.gather(2, wide_OGI.abs().argmax(dim=2, keepdim=True))
    scales_OG1 = (extremes_OG1 / -8).half().float()
    plain_OGI = (wide_OGI / scales_OG1).nan_to_num(0).round().clamp(-8, 7) * scales_OG1
    most_OG = (plain_OGI - wide_OGI).square().sum(dim=2)
    found_OG = by_groups(dense(group_weights(weight, 4), inputs) - weight).square().sum(dim=2)
    assert (found_OG <= most_OG * 1.0001).all()


@each_width
@given(outputs=SIZES, inputs=SIZES, seed=SEEDS)
def test_integers_times_an_fp16_scale_are_kept(bits, outputs, inputs, seed):
    made = torch.Generator().manual_seed(seed)
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    integers_OI = torch.randint(least, most + 1, (outputs, inputs), generator=made)
    integers_OI[:, ::GROUP] = least
    scales_OG = (torch.rand(outputs, -(-inputs // GROUP), generator=made) + 0.01).half()
    weight = integers_OI * scales_OG.float().repeat_interleave(GROUP, dim=1)[:, :inputs]
    groups = group_weights(weight, bits)
    assert torch.equal(dense(groups, inputs), weight)
    assert torch.equal(groups.scales_OG, scales_OG)


@each_width
def test_the_last_group_is_padded_with_zeros(bits):
    groups = group_weights(torch.randn(3, 33), bits)
    arrays = GroupFormat(bits).tensors(3, 33)
    assert groups.tensors.keys() == arrays.keys()
    for name, tensor in groups.tensors.items():
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype)
    assert GroupFormat(bits).num_bytes(3, 33) == sum(one.nbytes for one in groups.tensors.values())
    assert not dense(groups, 64)[:, 33:].any()


def test_widened_groups_have_the_same_values():
    groups = group_weights(torch.randn(20, 70), 4)
    assert widened(groups).bits == 8
    assert torch.equal(dense(widened(groups), 70), dense(groups, 70))


def test_groups_with_minimums_are_widened_by_rounding():
    groups = group_weights(torch.randn(20, 70), 4)
    groups = groups._replace(minimums_OG=torch.randn_like(groups.scales_OG))
    found, wanted = dense(widened(groups), 96), dense(groups, 96)
    assert widened(groups).format == GroupFormat(8)
    assert torch.equal(found, dense(group_weights(wanted, 8), 96))


@each_width
def test_rounding_in_parts_changes_nothing(bits, monkeypatch):
    weight = torch.randn(50, 40)
    whole = group_weights(weight, bits)
    for size in (1, 40, 120):
        monkeypatch.setattr(grouped_weights, "_PART_WEIGHTS", size)
        found = group_weights(weight, bits)
        assert torch.equal(found.values, whole.values)
        assert torch.equal(found.scales_OG, whole.scales_OG)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_rounding_the_values_of_gguf_blocks_gives_the_same_blocks(bits, kind):
    kind = gguf.GGMLQuantizationType[kind]
    stored = quantize(torch.randn(30, 96).numpy(), kind)
    blocks_OGB = torch.from_numpy(stored.copy()).view(30, 3, 2 + GROUP * bits // 8)
    values = blocks_OGB[:, :, 2:].flatten(1)
    scales_OG = blocks_OGB[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    groups = WeightGroups(values.view(torch.int8) if bits == 8 else values, scales_OG, bits)
    wanted = torch.from_numpy(dequantize(stored, kind))
    assert torch.equal(dense(groups, 96), wanted)
    # and rounding the values again gives the same blocks
    assert torch.equal(dense(group_weights(wanted, bits), 96), wanted)
