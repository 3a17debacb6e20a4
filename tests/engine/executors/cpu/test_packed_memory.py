"""Memory layers in every runnable build, inside and outside the native call."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.layers import pack_layer
from engine.executors.cpu.packing import Packer
from engine.model.config import PLACEMENTS, MemoryConfig
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.table_statistics import TableStatistics
from tests.conftest import TOLERANCE
from tests.engine.executors.cpu.packed_forward import PackedForward, UnreadableTable, threads
from tests.models import random_model, tiny_config

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_build
@each_dtype
@given(
    kind=st.sampled_from(["memory_plus", "pkm"]),
    num_tokens=st.sampled_from([1, 3, 64, 65, 150]),
    num_heads=st.sampled_from([1, 3]),
    num_subkeys=st.sampled_from([4, 19, 70]),
    top_k=st.sampled_from([1, 4]),
    query_dim=st.sampled_from([2, 10, 64]),
    value_dim=st.sampled_from([1, 30, 300]),
    qk_norm=st.booleans(),
    share_values=st.booleans(),
    placement=st.sampled_from(PLACEMENTS),
    scalar_gate=st.booleans(),
    table_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_outputs_inside_and_outside_the_call_agree(
    build, dtype, kind, num_tokens, table_dtype, num_threads, **sizes
):
    memory = MemoryConfig(value_projection=kind == "pkm", **sizes)
    # two layers per call in fp32 only: bf16 rounding in the first changes choices of the second
    kinds = (kind, "dense", kind) if dtype is torch.float32 else ("dense", kind)
    config = tiny_config(num_layers=len(kinds), feed_forward=kinds, memory=memory)
    model = random_model(config, dtype)
    stored = {}
    for layer in config.memory_layers:
        table = model.model.layers[layer].memory.table
        stored.setdefault(id(table), DeviceTable(table.rows.to(table_dtype)))
        model.model.layers[layer].memory.attach(stored[id(table)])
    separate = copy.deepcopy(model)
    for layer in config.memory_layers:
        block = separate.model.layers[layer].memory
        block.attach(UnreadableTable(block.table))
    native = CpuKernels(build)
    with threads(num_threads):
        found, inside = PackedForward(model, native)(num_tokens)
    wanted, outside = PackedForward(separate, native)(num_tokens)
    assert len(inside) == len(outside) == len(config.memory_layers)
    for own, other in zip(inside, outside, strict=True):
        assert torch.equal(own.rows_THK, other.rows_THK)
        torch.testing.assert_close(own.weights_THK, other.weights_THK, rtol=1e-4, atol=1e-4)
    # rounding errors add up over the layers
    rtol = 10 * TOLERANCE[dtype][0]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_lookups_are_counted():
    memory = MemoryConfig(num_heads=2, num_subkeys=8, top_k=4, query_dim=8, value_dim=32)
    kinds = ("memory_plus", "dense", "memory_plus")
    model = random_model(tiny_config(num_layers=3, feed_forward=kinds, memory=memory))
    table = model.model.layers[0].memory.table
    PackedForward(model, CpuKernels(CPU_LIBRARY.best_build))(5)
    # five tokens of one prompt, three of the other
    assert dict(table.statistics()) == dict.fromkeys((0, 2), TableStatistics(8 * 2 * 4, lookups=1))


def test_a_table_that_kernels_cannot_read_is_read_outside_the_call():
    memory = MemoryConfig(num_heads=2, num_subkeys=8, top_k=4, query_dim=8, value_dim=32)
    model = random_model(tiny_config(num_layers=1, feed_forward=("memory_plus",), memory=memory))
    wide = copy.deepcopy(model)
    block = wide.layers[0].memory
    block.attach(DeviceTable(block.table.rows.double()))
    packer = Packer(CpuKernels(CPU_LIBRARY.best_build), torch.float32)
    assert not pack_layer(packer, model.layers[0]).is_apart
    assert pack_layer(packer, wide.layers[0]).is_apart


@pytest.mark.parametrize("kind", ["memory_plus", "pkm"])
def test_a_table_of_fp64_gives_the_logits_of_a_narrower_one(kind):
    memory = MemoryConfig(*(2, 8, 4), query_dim=8, value_dim=32, value_projection=kind == "pkm")
    model = random_model(tiny_config(num_layers=1, feed_forward=(kind,), memory=memory))
    kernels = CpuKernels(CPU_LIBRARY.best_build)
    wanted, _ = PackedForward(model, kernels)(9)
    table = model.tables["memory.table"]
    model.attach_tables({"memory.table": DeviceTable(table.rows.double())})
    found, _ = PackedForward(model, kernels)(9)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
