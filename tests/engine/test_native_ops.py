"""The native operations, every build that runs here, against their twins in plain torch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import ops
from engine.ops.attention import attention_by_torch
from engine.ops.layout import PagedKv, TokenLayout
from engine.ops.native import library
from engine.ops.native.library import OPS_LIBRARY, NativeOps
from memory_ops.native.library import NativeLibrary
from tests.conftest import TOLERANCE

each_build = pytest.mark.parametrize("build", OPS_LIBRARY.runnable_builds)
DTYPES = [torch.float32, torch.bfloat16]


def paged_batch(sequences, num_kv_heads, head_dim, block_size, dtype):
    """Blocks in a random order, NaN wherever no token stands, and the layout that reads them.

    ``sequences`` has for each the number of its queries and the length of its context.
    """
    counts = [-(-context // block_size) for _, context in sequences]
    shape = (sum(counts) + 3, 2, num_kv_heads, block_size, head_dim)
    kv_blocks = torch.full(shape, torch.nan, dtype=dtype)
    free = torch.randperm(len(kv_blocks)).split([*counts, 3])
    table = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int64)
    for row, ids, (_, context) in zip(table, free, sequences, strict=False):
        row[: len(ids)] = ids
        for at in range(context):
            kv_blocks[ids[at // block_size], :, :, at % block_size] = torch.randn(
                2, num_kv_heads, head_dim
            ).to(dtype)
    starts = tuple(itertools.accumulate((queries for queries, _ in sequences), initial=0))
    paged = PagedKv(torch.empty(0), table, tuple(context for _, context in sequences))
    return kv_blocks, TokenLayout(torch.empty(0), starts, paged)


def attend(build, q, kv_blocks, layout):
    return NativeOps(build).attention(q, layout, layout.paged, kv_blocks)


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 50)).map(lambda x: (x[0], x[0] + x[1])),
    min_size=1,
    max_size=5,
)


@each_build
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    sequences=SEQUENCES,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 8, 30]),
    head_dim=st.sampled_from([1, 7, 16, 40, 64, 128]),
    block_size=st.sampled_from([1, 4, 16, 32]),
)
def test_attention_is_its_twin(build, dtype, sequences, num_kv_heads, group, head_dim, block_size):
    kv_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, block_size, dtype)
    q = torch.randn(layout.query_starts[-1], num_kv_heads * group, head_dim).to(dtype)
    exact = attention_by_torch(q.double(), q, q, layout, kv_blocks.double())
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        attend(build, q, kv_blocks, layout), exact.to(dtype), rtol=rtol, atol=atol
    )


@each_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_bit_for_bit_the_same_in_any_company_and_any_chunks(build, dtype):
    sequences = [(30, 77), (1, 200), (5, 5), (1, 33)]
    kv_blocks, layout = paged_batch(sequences, 2, 40, 16, dtype)
    q = torch.randn(layout.query_starts[-1], 6, 40).to(dtype)
    out = attend(build, q, kv_blocks, layout)
    for number, (start, end) in enumerate(itertools.pairwise(layout.query_starts)):
        table = layout.paged.block_table_SB[number : number + 1]
        context = layout.paged.context_lengths[number]
        for at in range(start, end):
            # each query alone, as if all before it had been computed in earlier steps
            alone = PagedKv(torch.empty(0), table, (context - (end - 1 - at),))
            single = TokenLayout(torch.empty(0), (0, 1), alone)
            assert torch.equal(attend(build, q[at : at + 1], kv_blocks, single)[0], out[at])


@each_build
def test_queries_that_are_apart_in_memory(build):
    kv_blocks, layout = paged_batch([(3, 9), (2, 2)], 2, 16, 4, torch.float32)
    wide = torch.randn(5, 10, 16)
    wanted = attend(build, wide[:, :4].contiguous(), kv_blocks, layout)
    assert torch.equal(attend(build, wide[:, :4], kv_blocks, layout), wanted)
    turned = wide[:, :4].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(build, turned, kv_blocks, layout), wanted)


@each_build
def test_huge_scores_and_equal_ones(build):
    kv_blocks, layout = paged_batch([(4, 40)], 1, 16, 16, torch.float32)
    for size in (0.0, 1e4):
        q = torch.randn(4, 2, 16) * size
        exact = attention_by_torch(q.double(), q, q, layout, kv_blocks.double())
        torch.testing.assert_close(
            attend(build, q, kv_blocks, layout), exact.float(), rtol=1e-4, atol=1e-4
        )


def test_without_the_library_plain_torch_serves(tmp_path, monkeypatch):
    kv_blocks, layout = paged_batch([(3, 9), (1, 20)], 2, 16, 4, torch.float32)
    q = torch.randn(4, 4, 16)
    wanted = ops.attention(q, q, q, layout, kv_blocks)
    monkeypatch.setattr(library, "OPS_LIBRARY", NativeLibrary(tmp_path, {}, "slow"))
    library._best.cache_clear()
    try:
        torch.testing.assert_close(ops.attention(q, q, q, layout, kv_blocks), wanted)
    finally:
        library._best.cache_clear()
