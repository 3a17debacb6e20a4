"""The native operations in every runnable build against plain torch."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.executors.cpu import kernels
from engine.executors.cpu.executor import CpuExecutor
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.cpu.packed_head_norms import PackedHeadNorms
from engine.executors.eager import EagerExecutor
from engine.executors.executor import make_executor
from engine.model.attention import attend as attend_by_torch
from engine.model.attention import write_kv
from engine.model.layout import PagedKv, TokenLayout
from engine.model.norm import RmsNorm
from engine.model.rotary import rotate
from memory_ops.native.library import BUILDS, NativeLibrary
from tests.conftest import TOLERANCE
from tests.engine.executors.cpu.packed_forward import area_order
from tests.models import random_model, tiny_config

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
DTYPES = [torch.float32, torch.bfloat16]


def paged_batch(sequences, num_kv_heads, head_dim, block_size, dtype):
    """KV blocks in random order, NaN except at tokens, with the layout that reads them.

    ``sequences``: (number of queries, context length) of each sequence.
    """
    counts = [-(-context // block_size) for _, context in sequences]
    shape = (sum(counts) + 3, 2, num_kv_heads, block_size, head_dim)
    kv_blocks = torch.full(shape, torch.nan, dtype=dtype)
    free = torch.randperm(len(kv_blocks)).split([*counts, 3])
    table = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int64)
    for row, ids, (_, context) in zip(table, free, sequences, strict=False):
        row[: len(ids)] = ids
        at = torch.arange(context)
        lines = torch.randn(context, 2, num_kv_heads, head_dim).to(dtype)
        kv_blocks[ids[at // block_size], :, :, at % block_size] = lines
    starts = tuple(itertools.accumulate((queries for queries, _ in sequences), initial=0))
    places = [
        int(table[row, at // block_size]) * block_size + at % block_size
        for row, (queries, context) in enumerate(sequences)
        for at in range(context - queries, context)
    ]
    paged = PagedKv(torch.tensor(places), table, tuple(context for _, context in sequences))
    return kv_blocks, TokenLayout(torch.empty(0), starts, paged)


def random_qkv(layout, num_heads, num_kv_heads, head_dim, dtype):
    """(queries, keys and values of the batch in one tensor; rotary angles of its tokens)."""
    num_tokens = layout.query_starts[-1]
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    turns = torch.rand(num_tokens, 1, head_dim // 2) * 6
    return qkv, (turns.cos(), turns.sin())


def random_norms(head_dim, dtype):
    """Norms of queries and keys with random weights."""
    made = RmsNorm(head_dim, 1e-5), RmsNorm(head_dim, 1e-5)
    for norm in made:
        norm.weight = torch.nn.Parameter(torch.rand(head_dim).to(dtype) + 0.5, requires_grad=False)
    return made


def attention_by_torch(qkv, num_heads, num_kv_heads, angles, layout, kv_blocks, norms=None):
    heads = num_heads + 2 * num_kv_heads
    qkv = qkv.view(qkv.shape[0], heads, qkv.shape[1] // heads)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    q, k = rotate(q, angles), rotate(k, angles)
    write_kv(k, v, layout, kv_blocks)
    return attend_by_torch(q, k, v, layout, kv_blocks).flatten(1)


def native_attention(kernels, qkv, num_heads, angles, kv_blocks, layout, norms=None):
    """Attention alone, as decoder layers run it: ``[T, H E]`` from queries, keys and values."""
    head_dim = qkv.shape[1] // (num_heads + 2 * kv_blocks.shape[2])
    order, is_int8 = area_order(kv_blocks.shape, kv_blocks.itemsize), kv_blocks.dtype is torch.int8
    if is_int8:  # areas have unsigned keys
        kv_blocks[:, 0, ..., :head_dim] ^= -128
    areas = kv_blocks.view(-1)[order]
    packed = None if norms is None else PackedHeadNorms(*norms)
    blocks = areas.view(kv_blocks.shape)
    out = kernels.attention(qkv, num_heads, angles, layout, blocks, packed)
    kv_blocks.view(-1)[order] = areas
    if is_int8:
        kv_blocks[:, 0, ..., :head_dim] ^= -128
    return out


def attend(build, qkv, angles, kv_blocks, layout, norms=None):
    num_kv_heads, head_dim = kv_blocks.shape[2], kv_blocks.shape[4]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    return native_attention(CpuKernels(build), qkv, num_heads, angles, kv_blocks, layout, norms)


def single_queries(qkv, angles, layout):
    """Each query alone, as if earlier steps had run all before it: index, qkv, angles, layout."""
    for number, (start, end) in enumerate(itertools.pairwise(layout.query_starts)):
        table = layout.paged.block_table_SB[number : number + 1]
        context = layout.paged.context_lengths[number]
        for at in range(start, end):
            place = layout.paged.kv_index_T[at : at + 1]
            alone = PagedKv(place, table, (context - (end - 1 - at),))
            turns = angles[0][at : at + 1], angles[1][at : at + 1]
            yield at, qkv[at : at + 1], turns, TokenLayout(torch.empty(0), (0, 1), alone)


SEQUENCES = st.lists(
    # the kernel reads parts of 128 keys
    st.tuples(st.integers(1, 40), st.integers(0, 50) | st.sampled_from([100, 127, 128, 250])).map(
        lambda x: (x[0], x[0] + x[1])
    ),
    min_size=1,
    max_size=5,
)


@each_build
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    sequences=SEQUENCES,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 8, 30]),
    head_dim=st.sampled_from([2, 14, 16, 40, 64, 128]),
    block_size=st.sampled_from([4, 12, 16, 32]),
    has_norms=st.booleans(),
)
def test_attention_equals_plain_torch(
    build, dtype, sequences, num_kv_heads, group, head_dim, block_size, has_norms
):
    kv_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, block_size, dtype)
    num_heads = num_kv_heads * group
    qkv, angles = random_qkv(layout, num_heads, num_kv_heads, head_dim, dtype)
    norms = random_norms(head_dim, dtype) if has_norms else None
    wide = kv_blocks.double()
    exact = attention_by_torch(qkv.double(), num_heads, num_kv_heads, angles, layout, wide, norms)
    rtol, atol = TOLERANCE[dtype]
    found = attend(build, qkv, angles, kv_blocks, layout, norms)
    # in bf16, the kernel also rounds queries and weights before their products
    torch.testing.assert_close(found, exact.to(dtype), rtol=rtol, atol=2 * atol)
    # other positions stay unwritten; values are rounded once, normalised keys three times
    atol *= 3 if has_norms else 1
    torch.testing.assert_close(kv_blocks, wide.to(dtype), rtol=rtol, atol=atol, equal_nan=True)


@each_build
@pytest.mark.parametrize("dtype", DTYPES)
# keys whose layout allows scoring in place, and others
@pytest.mark.parametrize(("head_dim", "block_size"), [(40, 16), (64, 16), (64, 12)])
def test_attention_bits_do_not_depend_on_batch_or_chunks(build, dtype, head_dim, block_size):
    sequences = [(30, 77), (1, 300), (5, 5), (1, 33), (3, 130)]
    kv_blocks, layout = paged_batch(sequences, 2, head_dim, block_size, dtype)
    qkv, angles = random_qkv(layout, 6, 2, head_dim, dtype)
    norms = random_norms(head_dim, dtype)
    out = attend(build, qkv, angles, kv_blocks, layout, norms)
    for at, one, turns, single in single_queries(qkv, angles, layout):
        assert torch.equal(attend(build, one, turns, kv_blocks, single, norms)[0], out[at])


@each_build
def test_huge_scores_and_equal_ones(build):
    kv_blocks, layout = paged_batch([(4, 40)], 1, 16, 16, torch.float32)
    for size in (0.0, 1e4):
        qkv, angles = random_qkv(layout, 2, 1, 16, torch.float32)
        qkv[:, :32] *= size
        exact = attention_by_torch(qkv.double(), 2, 1, angles, layout, kv_blocks.double())
        found = attend(build, qkv, angles, kv_blocks, layout)
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_without_the_library_the_eager_executor_is_used(tmp_path, monkeypatch, caplog):
    model, config = random_model(tiny_config()), EngineConfig(kv_cache_gib=0.001)
    assert isinstance(make_executor(model, config), CpuExecutor)
    monkeypatch.setattr(kernels, "CPU_LIBRARY", NativeLibrary(tmp_path, {}, "it is slow"))
    kernels._best.cache_clear()
    try:
        assert isinstance(make_executor(model, config), EagerExecutor)
    finally:
        kernels._best.cache_clear()
    assert "it is slow" in caplog.text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_best_build_for_this_machine_is_installed():
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx512_bf16" in flags:
        # the kernel may refuse AMX tiles although the processor has them
        assert CPU_LIBRARY.runnable_builds in (BUILDS, BUILDS[1:])


@each_build
def test_the_block_table_may_be_strided(build):
    kv_blocks, layout = paged_batch([(3, 9), (1, 20)], 2, 16, 4, torch.float32)
    qkv, angles = random_qkv(layout, 4, 2, 16, torch.float32)
    paged = layout.paged
    wanted = attend(build, qkv, angles, kv_blocks, layout)
    wide = torch.full((2, 40), 10**9)
    wide[:, : paged.block_table_SB.shape[1]] = paged.block_table_SB
    apart = dataclasses.replace(paged, block_table_SB=wide[:, : paged.block_table_SB.shape[1]])
    layout = dataclasses.replace(layout, paged=apart)
    assert torch.equal(attend(build, qkv, angles, kv_blocks, layout), wanted)
