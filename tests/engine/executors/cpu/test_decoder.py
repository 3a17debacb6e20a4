"""Packed decoder layers in every runnable build, against plain torch, layer by layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.executors.cpu import decoder
from engine.executors.cpu.decoder import CpuDecoder
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.layers import pack_layer
from engine.executors.cpu.packing import Packer
from engine.model.config import MemoryConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.rotary import rope_angles
from engine.progress import Progress
from tests.conftest import TOLERANCE
from tests.engine.executors.cpu.packed_forward import area_order
from tests.engine.executors.cpu.test_kernels import SEQUENCES, paged_batch
from tests.models import ragged_step, random_model, tiny_config

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MEMORY = MemoryConfig(num_heads=2, num_subkeys=8, top_k=4, query_dim=8, value_dim=32)


def decoder_of(model, kernels, progress=None):
    layers = [
        pack_layer(Packer(kernels, model.model.norm.weight.dtype), layer) for layer in model.layers
    ]
    return CpuDecoder(layers, model.config.num_heads, kernels, progress or Progress())


@each_build
@each_dtype
@given(
    sequences=SEQUENCES,
    size=st.sampled_from([16, 30, 77]),
    hidden=st.integers(1, 70),
    num_kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 4]),
    head_dim=st.sampled_from([2, 18, 64]),
    num_layers=st.sampled_from([1, 2]),
    extra=st.sampled_from(
        [{}, {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True}, {"qk_norm": True}]
    ),
)
def test_dense_layers(
    build, dtype, sequences, size, hidden, num_kv_heads, group, head_dim, num_layers, extra
):
    config = tiny_config(
        hidden_size=size,
        intermediate_size=hidden,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        **extra,
    )
    model = random_model(config, dtype)
    for name, parameter in model.named_parameters():
        # outputs of the order of 1 for any number of inputs
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    one_layers_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, 16, dtype)
    kv_blocks = torch.stack([one_layers_blocks] * num_layers)
    turns = torch.rand(layout.query_starts[-1], 1, head_dim // 2) * 6
    angles = turns.cos(), turns.sin()
    residual = torch.randn(layout.query_starts[-1], size).to(dtype)
    written = kv_blocks.clone()
    wanted = residual
    for index, layer in enumerate(model.layers):
        wanted = layer(wanted, layout, angles, written[index])
    order = area_order(one_layers_blocks.shape, dtype.itemsize)
    areas = kv_blocks.flatten(1)[:, order].view(kv_blocks.shape)
    found = decoder_of(model, CpuKernels(build)).run(residual, layout, angles, areas)
    kv_blocks.flatten(1)[:, order] = areas.flatten(1)
    rtol, atol = TOLERANCE[dtype]
    # rounding errors add up over the products
    close = {"rtol": 10 * rtol, "atol": 10 * num_layers * atol}
    torch.testing.assert_close(found.double(), wanted.double(), **close)
    torch.testing.assert_close(kv_blocks, written, equal_nan=True, **close)


@pytest.mark.parametrize("kinds", [("dense",) * 5, ("pkm", "dense", "dense", "memory_plus", "pkm")])
@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("many_bytes", [0, 50_000, 2**28])
def test_any_grouping_of_layers_gives_the_same_bits(kinds, num_tokens, many_bytes, monkeypatch):
    memory = MEMORY if "pkm" in kinds else None
    model = random_model(tiny_config(num_layers=5, feed_forward=kinds, memory=memory))
    config = model.config
    ids_T, layout = ragged_step([(range(num_tokens), 0, range(9))], 8)
    kv_blocks = torch.zeros(5, 9, 2, config.num_kv_heads, 8, config.head_dim)
    angles = rope_angles(layout.positions_T, model.rope_frequencies)
    residual = model.model.embed_tokens(ids_T)
    wanted, read = residual, ForwardTrace()
    for index, layer in enumerate(model.model.layers):
        wanted = layer(wanted, layout, angles, kv_blocks[index].clone(), read)

    monkeypatch.setattr(decoder, "_MANY_BYTES", many_bytes)
    done, trace, progress = [], ForwardTrace(), Progress()
    monkeypatch.setattr(progress, "mark", lambda: done.append(len(trace.memory)))
    layers = decoder_of(model, CpuKernels(CPU_LIBRARY.best_build), progress)
    found = layers.run(residual, layout, angles, kv_blocks, trace)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert len(trace.memory) == len(read.memory) == len(config.memory_layers)
    for own, other in zip(trace.memory, read.memory, strict=True):
        assert torch.equal(own.rows_THK.sort().values, other.rows_THK.sort().values)
    if many_bytes == 0 or num_tokens > 64:
        assert len(done) == 5
    elif many_bytes == 2**28:
        assert done == ([1, 3] if memory else [0])
    else:
        assert 1 < len(done) < 5
