"""Progress counters of native calls, in every runnable build."""

import pytest
import torch

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.packing import Packer
from tests.engine.executors.cpu.packed_forward import PackedForward
from tests.engine.executors.cpu.test_kernels import native_attention, paged_batch, random_qkv
from tests.engine.executors.cpu.test_packed_linear import layer
from tests.engine.executors.cpu.test_sampling import choices
from tests.models import feed_forward_changes, random_model, tiny_config

pytestmark = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def marks_of(native, call, *arguments) -> int:
    """The number of progress marks during a call."""
    before = native.work_done
    call(*arguments)
    return native.work_done - before


@each_dtype
def test_products_count_their_tiles(build, dtype):
    native = CpuKernels(build)
    small, large = (
        Packer(native, dtype).linear(layer(32, 32 * panels, False, dtype)) for panels in (10, 40)
    )
    few, many = torch.randn(10, 32).to(dtype), torch.randn(400, 32).to(dtype)
    assert marks_of(native, native.linear, small, few) >= 10
    assert marks_of(native, native.linear, large, few) >= 40
    # with many rows, one panel counts several pieces of work
    assert marks_of(native, native.linear, large, many) >= 40 * 400 // 32


@each_dtype
def test_attention_counts_parts_of_a_long_context(build, dtype):
    native = CpuKernels(build)

    def marks(context):
        kv_blocks, layout = paged_batch([(1, context)], 1, 16, 16, dtype)
        qkv, angles = random_qkv(layout, 1, 1, 16, dtype)
        return marks_of(native, native_attention, native, qkv, 1, angles, kv_blocks, layout)

    assert [marks(context) for context in (100, 1000)] == [1, 8]


@each_dtype
def test_rows_of_logits_are_counted(build, dtype):
    native, logits = CpuKernels(build), torch.randn(12, 500).to(dtype)
    assert marks_of(native, native.sample, logits, choices(12)) == 12
    rows = list(range(12)) * 2
    assert marks_of(native, native.log_probabilities, logits, rows, rows, 3) == 24


def test_layers_in_one_call_are_counted_as_they_run(build):
    native = CpuKernels(build)
    changes = feed_forward_changes("dense", "memory_plus")
    forward = PackedForward(random_model(tiny_config(**changes)), native)
    few, many = marks_of(native, forward, 2), marks_of(native, forward, 100)
    layers = forward.model.config.num_layers
    # each layer has at least four products and its attention
    assert few > 5 * layers and many > 4 * few / 3
