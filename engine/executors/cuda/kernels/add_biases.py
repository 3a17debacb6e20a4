"""Logit biases and bans as a Triton kernel, whose number only the device knows."""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.triton_kernels.launch import on_device_of

_BLOCK = 128


def add_biases(logits_LV: Tensor, places_N: Tensor, values_N: Tensor, count_1: Tensor) -> None:
    """Add the first ``count_1`` values to logits in place; a value of -inf bans its token.

        logits.view(-1)[places[i]] += values[i]     for i < count, in fp32

    Never waits for the device, and branches on shapes alone, so CUDA graphs can capture it. A sum
    is rounded to the dtype of the logits.

    Args:
        logits_LV: fp32, bf16 or fp16, contiguous.
        places_N: int64 places ``row * V + token id``, distinct up to the count. They are not
            checked: an invalid place writes memory out of bounds.
        values_N: fp32 or fp64. A ban sets -inf, whatever the logit is.
        count_1: int64, one number, at most N.
    """
    if not len(places_N):
        return
    with on_device_of(logits_LV):
        _add_biases[(triton.cdiv(len(places_N), _BLOCK),)](
            logits_LV,
            places_N,
            values_N,
            count_1,
            BLOCK=_BLOCK,
            num_warps=_BLOCK // 32,
            num_stages=1,
            enable_fp_fusion=True,
        )


def add_biases_reference(
    logits_LV: Tensor, places_N: Tensor, values_N: Tensor, count_1: Tensor
) -> None:
    """``add_biases`` in plain torch; it waits for the device."""
    count = int(count_1)
    places, values = places_N[:count], values_N[:count]
    sums = logits_LV.view(-1)[places].float() + values
    logits_LV.view(-1)[places] = sums.masked_fill(values == -torch.inf, -torch.inf).to(logits_LV)


@triton.jit
def _add_biases(logits_ptr, places_ptr, values_ptr, count_ptr, BLOCK: tl.constexpr):
    """logits[places[i]] += values[i]; programs past the count store nothing."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < tl.load(count_ptr)
    places = tl.load(places_ptr + index, mask=live, other=0)
    values = tl.load(values_ptr + index, mask=live, other=0.0).to(tl.float32)
    logits = tl.load(logits_ptr + places, mask=live, other=0.0).to(tl.float32)
    is_ban = values == float("-inf")
    tl.store(logits_ptr + places, tl.where(is_ban, values, logits + values), mask=live)
