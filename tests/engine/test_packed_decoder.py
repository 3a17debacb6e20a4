"""Packed decoder layers by every build that runs here, against plain torch, layer by layer."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import make_batch
from engine.model import packed_decoder
from engine.model.config import MemoryConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.packed_decoder import PackedDecoder
from engine.model.rotary import rope_angles
from engine.ops.attention import attention_by_torch
from engine.ops.linear import linear_by_torch
from engine.ops.native.library import OPS_LIBRARY, NativeOps
from engine.sampling_params import SamplingParams
from engine.step_plan import SequenceChunk, StepPlan
from tests.conftest import TOLERANCE
from tests.engine.test_native_ops import SEQUENCES, paged_batch
from tests.models import random_model, tiny_config

each_build = pytest.mark.parametrize("build", OPS_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MEMORY = MemoryConfig(num_heads=2, num_subkeys=8, top_k=4, query_dim=8, value_dim=32)


def layers_by_torch(model, residual_TD, layout, angles, kv_blocks):
    heads = model.config.num_heads, model.config.num_kv_heads
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        qkv_TF = linear_by_torch(residual_TD, attention.qkv)
        out_TF = attention_by_torch(qkv_TF, *heads, angles, layout, kv_blocks[index])
        residual_TD = linear_by_torch(out_TF, attention.out, residual_TD)
        gated_TI = linear_by_torch(residual_TD, mlp.gate_up)
        residual_TD = linear_by_torch(gated_TI, mlp.down, residual_TD)
    return residual_TD


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
    has_bias=st.booleans(),
)
def test_dense_layers(
    build, dtype, sequences, size, hidden, num_kv_heads, group, head_dim, num_layers, has_bias
):
    config = tiny_config(
        hidden_size=size,
        intermediate_size=hidden,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        attention_bias=has_bias,
        mlp_bias=has_bias,
    )
    model = random_model(config, dtype)
    for name, parameter in model.named_parameters():
        # outputs of the order of 1, whatever the number of inputs
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    one_layers_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, 16, dtype)
    kv_blocks = torch.stack([one_layers_blocks] * num_layers)
    turns = torch.rand(layout.query_starts[-1], 1, head_dim // 2) * 6
    angles = turns.cos(), turns.sin()
    residual = torch.randn(layout.query_starts[-1], size).to(dtype)
    written = kv_blocks.clone()
    wanted = layers_by_torch(model, residual, layout, angles, written)
    decoder = PackedDecoder(model.model.layers, config.num_heads, NativeOps(build))
    found = decoder.run(residual, layout, angles, kv_blocks, None, lambda: None)
    rtol, atol = TOLERANCE[dtype]
    # what one product rounds the next ones sum
    close = {"rtol": 10 * rtol, "atol": 10 * num_layers * atol}
    torch.testing.assert_close(found.double(), wanted.double(), **close)
    torch.testing.assert_close(kv_blocks, written, equal_nan=True, **close)


@pytest.mark.parametrize("kinds", [("dense",) * 5, ("pkm", "dense", "dense", "memory_plus", "pkm")])
@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("many_bytes", [0, 50_000, 2**28])
def test_in_whatever_runs_they_give_the_same(kinds, num_tokens, many_bytes, monkeypatch):
    memory = MEMORY if "pkm" in kinds else None
    model = random_model(tiny_config(num_layers=5, feed_forward=kinds, memory=memory))
    config = model.config
    chunk = SequenceChunk(
        "", tuple(range(num_tokens)), 0, tuple(range(9)), SamplingParams(max_tokens=1), 0, True
    )
    batch = make_batch(StepPlan((chunk,)), 8, torch.device("cpu"))
    kv_blocks = torch.zeros(5, 9, 2, config.num_kv_heads, 8, config.head_dim)
    angles = rope_angles(batch.layout.positions_T, model.rope_frequencies)
    residual = model.model.embed_tokens(batch.ids_T)
    wanted, read = residual, ForwardTrace()
    for index, layer in enumerate(model.model.layers):
        wanted = layer(wanted, batch.layout, angles, kv_blocks[index].clone(), read)

    monkeypatch.setattr(packed_decoder, "_MANY_BYTES", many_bytes)
    native = NativeOps(OPS_LIBRARY.best_build)
    decoder = PackedDecoder(copy.deepcopy(model).model.layers, config.num_heads, native)
    done, trace = [], ForwardTrace()
    found = decoder.run(
        residual, batch.layout, angles, kv_blocks, trace, lambda: done.append(len(trace.memory))
    )
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
