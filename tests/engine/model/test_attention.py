"""Attention, rotary embedding and norm in torch against formulas in fp64."""

import itertools
import math

import pytest
import torch

from engine.model.attention import attend, write_kv
from engine.model.layout import PagedKv, TokenLayout
from engine.model.norm import rms_norm
from engine.model.rotary import rope_angles, rotate
from tests.conftest import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def check(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    rtol, atol = TOLERANCE[dtype]
    atol *= math.sqrt(terms)
    torch.testing.assert_close(found, exact.to(found.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, weight = torch.randn(5, 24).to(dtype), torch.rand(24).to(dtype)
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    check(rms_norm(x, weight, 1e-5), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rotates_each_pair_by_its_angle(dtype):
    positions = torch.tensor([0, 3, 100])
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = (1 / 10_000 ** (torch.arange(0, 8, 2) / 8)).to(wide)
    q, k = (torch.randn(3, heads, 8).to(dtype) for heads in (4, 2))
    turns = rope_angles(positions, frequencies)
    for given, turned in ((q, rotate(q, turns)), (k, rotate(k, turns))):
        pairs = torch.complex(given[..., :4].double(), given[..., 4:].double())
        angles = positions[:, None, None].double() * frequencies.double()
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        check(turned, torch.cat((pairs.real, pairs.imag), -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_written_at_the_slots_of_the_layout(dtype):
    kv_blocks = torch.full((3, 2, 2, 4, 8), torch.nan, dtype=dtype)
    k, v = (torch.randn(2, 2, 8).to(dtype) for _ in range(2))
    positions = torch.tensor([3, 4])
    paged = PagedKv(torch.tensor([2 * 4 + 3, 0 * 4 + 0]), torch.tensor([[2, 0]]), (5,))
    layout = TokenLayout(positions, (0, 2), paged)
    angles = rope_angles(positions, torch.ones(4))
    turned_k = rotate(k, angles)
    write_kv(turned_k, v, layout, kv_blocks)
    torch.testing.assert_close(kv_blocks[2, 0, :, 3], turned_k[0], rtol=0, atol=0)
    torch.testing.assert_close(kv_blocks[0, 0, :, 0], turned_k[1], rtol=0, atol=0)
    torch.testing.assert_close(kv_blocks[2, 1, :, 3], v[0], rtol=0, atol=0)
    torch.testing.assert_close(kv_blocks[0, 1, :, 0], v[1], rtol=0, atol=0)
    assert kv_blocks.isnan().sum() == kv_blocks.numel() - 2 * 2 * 2 * 8


def exact_attention(q, k, v):
    """Causal attention of one sequence in fp64; ``q`` are the last tokens of ``k``."""
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, 1)
    values = v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhe,lhe->hql", q.double(), keys) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[0], k.shape[0]).triu(k.shape[0] - q.shape[0] + 1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hql,lhe->qhe", weights, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_within_the_batch(dtype):
    lengths = [1, 5, 2]
    q, k, v = (torch.randn(8, heads, 16).to(dtype) for heads in (6, 2, 2))
    starts = (0, 1, 6, 8)
    layout = TokenLayout(torch.cat([torch.arange(n) for n in lengths]), starts)
    out = attend(q, k, v, layout, None)
    spans = list(itertools.pairwise(starts))
    exact = torch.cat([exact_attention(q[a:b], k[a:b], v[a:b]) for a, b in spans])
    check(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_attention_reads_the_context_from_scattered_blocks(dtype, block_size):
    contexts, queries = [9, 1, 16], [3, 1, 1]
    num_blocks = 40
    kv_blocks = torch.full((num_blocks, 2, 2, block_size, 16), torch.nan, dtype=dtype)
    free = torch.randperm(num_blocks)
    keys = [torch.randn(n, 2, 16).to(dtype) for n in contexts]
    values = [torch.randn(n, 2, 16).to(dtype) for n in contexts]
    block_ids = []
    for key, value in zip(keys, values, strict=True):
        count = -(-len(key) // block_size)
        ids, free = free[:count], free[count:]
        block_ids.append(ids)
        for at in range(len(key)):
            kv_blocks[ids[at // block_size], 0, :, at % block_size] = key[at]
            kv_blocks[ids[at // block_size], 1, :, at % block_size] = value[at]
    q = torch.randn(sum(queries), 6, 16).to(dtype)
    table = torch.nn.utils.rnn.pad_sequence(block_ids, batch_first=True)
    unused = torch.full((sum(queries), 2, 16), torch.nan, dtype=dtype)
    paged = PagedKv(torch.empty(0, dtype=torch.int64), table, tuple(contexts))
    layout = TokenLayout(torch.empty(0, dtype=torch.int64), (0, 3, 4, 5), paged)
    out = attend(q, unused, unused, layout, kv_blocks)
    parts = zip(q.split(queries), keys, values, strict=True)
    check(out, torch.cat([exact_attention(*part) for part in parts]), dtype)


def test_attention_lets_gradients_through():
    q, k, v = (
        torch.randn(5, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)
    )
    layout = TokenLayout(torch.tensor([0, 1, 2, 0, 1]), (0, 3, 5))
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, layout, None), (q, k, v))
