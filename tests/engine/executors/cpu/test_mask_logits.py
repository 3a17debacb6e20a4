"""Masked logits in every native build, and in plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.sampling.logit_rules import masked

MASKS = [masked, *(CpuKernels(build).mask for build in CPU_LIBRARY.runnable_builds)]


@pytest.mark.parametrize("mask", MASKS)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    vocab_size=st.sampled_from([1, 31, 32, 33, 300, 2000]),
    num_rows=st.sampled_from([0, 1, 2, 7]),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
)
def test_tokens_without_a_bit_are_minus_infinity(mask, dtype, vocab_size, num_rows, share):
    wide_LV = torch.randn(num_rows, vocab_size + 5).to(dtype)
    allowed_LV = torch.rand(num_rows, vocab_size) < share
    bits = np.zeros((num_rows, -(-vocab_size // 32) * 32), dtype=bool)
    bits[:, :vocab_size] = allowed_LV.numpy()
    bitmask_LW = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    # rows of wider ones, which stay unchanged
    logits_LV, before_LV = wide_LV[:, 2 : 2 + vocab_size], wide_LV.clone()
    found_LV = mask(logits_LV, bitmask_LW)
    assert torch.equal(found_LV, logits_LV.masked_fill(~allowed_LV, -torch.inf))
    assert torch.equal(wide_LV, before_LV)
