"""The halves of a decoder layer: packed by every build that runs here, against plain torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import ops
from engine.ops.attention import attention_by_torch
from engine.ops.linear import linear_by_torch
from engine.ops.native.library import OPS_LIBRARY, NativeOps
from tests.conftest import TOLERANCE
from tests.engine.test_linear import layer, norm
from tests.engine.test_native_ops import SEQUENCES, paged_batch

each_build = pytest.mark.parametrize("build", OPS_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def check(found, wanted, dtype):
    rtol, atol = TOLERANCE[dtype]
    # what one product rounds the next one sums
    torch.testing.assert_close(found.double(), wanted.double(), rtol=10 * rtol, atol=5 * atol)


@each_build
@each_dtype
@given(
    sequences=SEQUENCES,
    size=st.sampled_from([16, 30, 77]),
    num_kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 4]),
    head_dim=st.sampled_from([2, 18, 64]),
    has_bias=st.booleans(),
)
def test_self_attention(build, dtype, sequences, size, num_kv_heads, group, head_dim, has_bias):
    kv_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, 16, dtype)
    num_heads = num_kv_heads * group
    sizes = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    qkv = ops.Projection(*(layer(size, n, has_bias, dtype) for n in sizes), norm=norm(size, dtype))
    out = ops.Projection(layer(sizes[0], size, has_bias, dtype))
    turns = torch.rand(layout.query_starts[-1], 1, head_dim // 2) * 6
    angles = turns.cos(), turns.sin()
    residual = torch.randn(layout.query_starts[-1], size).to(dtype)
    written = kv_blocks.clone()
    qkv_rows = linear_by_torch(residual, qkv)
    shape = num_heads, num_kv_heads, angles, layout
    wanted = linear_by_torch(attention_by_torch(qkv_rows, *shape, written), out, residual)
    for projection in (qkv, out):
        projection.pack(NativeOps(build))
    found = ops.self_attention(residual, qkv, out, *shape, kv_blocks)
    assert found is residual
    check(found, wanted, dtype)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(kv_blocks, written, rtol=rtol, atol=5 * atol, equal_nan=True)


@each_build
@each_dtype
@given(
    rows=st.one_of(st.integers(1, 30), st.integers(40, 110)),
    size=st.integers(1, 70),
    hidden=st.integers(1, 70),
)
def test_feed_forward(build, dtype, rows, size, hidden):
    parts = [layer(size, hidden, True, dtype) for _ in range(2)]
    gate_up = ops.Projection(*parts, norm=norm(size, dtype), is_gated=True)
    down = ops.Projection(layer(hidden, size, True, dtype))
    residual = torch.randn(rows, size).to(dtype)
    wanted = linear_by_torch(linear_by_torch(residual, gate_up), down, residual)
    for projection in (gate_up, down):
        projection.pack(NativeOps(build))
    found = ops.feed_forward(residual, gate_up, down)
    assert found is residual
    check(found, wanted, dtype)
