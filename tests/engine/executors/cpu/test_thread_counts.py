"""Packed layers give the same bits on 1 to 64 threads, even if there are fewer cores."""

import pytest
import torch

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from tests.engine.executors.cpu.packed_forward import PackedForward, threads
from tests.models import feed_forward_changes, random_model, tiny_config

# steps with few and with many rows: kernels divide them differently
TOKENS = (1, 9, 150)


def check(forward, numbers):
    with threads(1):
        wanted = [forward(num_tokens)[0] for num_tokens in TOKENS]
    for number in numbers:
        with threads(number):
            found = [forward(num_tokens)[0] for num_tokens in TOKENS]
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other), number


def model_of(dtype):
    changes = feed_forward_changes("memory_plus", "dense", num_subkeys=19)
    return random_model(tiny_config(**changes), dtype)


@pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(build, dtype):
    forward = PackedForward(model_of(dtype), CpuKernels(build))
    check(forward, (2, 3, 5, 8, 16, 31, 32, 48, 63, 64))


@pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_any_number_of_threads_gives_the_same_bits_with_weights_in_groups(build, weight_bits):
    forward = PackedForward(model_of(torch.bfloat16), CpuKernels(build), weight_bits)
    check(forward, (2, 3, 8, 17))
